"""Undoing the fit by climbing the forgotten samples' loss, alone or against the retained ones'."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from fastntk.common.errors import InputError
from fastntk.evidence.methods.descent import descend, endlessly, shuffled
from fastntk.evidence.methods.problem import Problem, Unlearned
from fastntk.tuning.losses import CrossEntropy


@dataclass(frozen=True)
class GradientAscent:
    """Minimise ``a L_R - (1 - a) L_F`` from ``theta*``: with ``a = 0`` gradient ascent ("max loss"), else NegGrad+.

    A step takes a batch of each. An epoch is one over the forgotten samples with ``a = 0``, else over the retained
    ones, the forgotten ones repeating as often as it takes. Under squared loss climbing is a pull without bound; the
    sources have cross-entropy, which ``climbed`` takes whatever the fit's loss.

    The official code of NegGrad+ goes through R with F repeating likewise, with an ``a`` of 0.95 or 0.9999 by data set,
    in small experiments for 10 epochs after a fit of 31; that of ascent takes some epochs over F. Here rates and epochs
    are of the fit, whatever it was, and the rate is lower than that of other methods, since climbing has no end
    (``descend`` has the rest).

    Attributes:
        retained_share: ``a``, from 0 to 1.
        climbed: ``L_F``: ``fit`` for the fit's loss, or ``cross-entropy``.
        share: of the fit's epochs.
        rate: of Adam, constant, as a factor of the fit's.
        seed: of the order.

    Source: Golatkar, Achille, Soatto 2020 (arXiv 1911.04933) for ascent; Kurmanji et al. 2023, "Towards unbounded
    machine unlearning" (arXiv 2302.09880) for NegGrad+.
    """

    retained_share: float = 0.0
    climbed: str = "fit"
    share: float = 1 / 6
    rate: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.climbed not in ("fit", "cross-entropy"):
            raise InputError(f"climbed is 'fit' or 'cross-entropy', not {self.climbed!r}.")

    def __call__(self, problem: Problem) -> Unlearned:
        """Answer the request by training on."""
        return descend(problem, self.losses, problem.rate(self.rate))

    def losses(self, problem: Problem, model: nn.Module) -> Iterator[Tensor]:
        """The loss of every step."""
        loss, kept, epochs = problem.recipe.loss, self.retained_share, problem.epochs(self.share)
        climbed = loss if self.climbed == "fit" else CrossEntropy()
        forgotten = endlessly(problem, problem.forgotten, self.seed)
        for epoch in range(epochs):
            if not kept:
                for images, labels in shuffled(problem, problem.forgotten, self.seed + epoch):
                    yield -climbed(model(images), labels)
                continue
            for images, labels in shuffled(problem, problem.retain, self.seed + epoch):
                others, other_labels = next(forgotten)
                yield kept * loss(model(images), labels) - (1 - kept) * climbed(model(others), other_labels)
