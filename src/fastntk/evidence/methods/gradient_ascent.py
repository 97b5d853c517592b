"""Undoing the fit by climbing the forgotten samples' loss, alone or against the retained ones'."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from fastntk.evidence.methods.descent import descend, endlessly, shuffled
from fastntk.evidence.methods.problem import Problem, Unlearned


@dataclass(frozen=True)
class GradientAscent:
    """Minimise ``a L_R - (1 - a) L_F`` from ``theta*``: with ``a = 0`` gradient ascent ("max loss"), else NegGrad+.

    A step takes a batch of each. An epoch is one over the forgotten samples with ``a = 0``, else over the retained
    ones, the forgotten ones repeating as often as it takes.

    Attributes:
        retained_share: ``a``, from 0 to 1.
        epochs: see above.
        learning_rate: of Adam, constant.
        seed: of the order.

    Source: Golatkar, Achille, Soatto 2020 (arXiv 1911.04933) for ascent; Kurmanji et al. 2023, "Towards unbounded
    machine unlearning" (arXiv 2302.09880) for NegGrad+.
    """

    retained_share: float = 0.0
    epochs: int = 2
    learning_rate: float = 1e-4
    seed: int = 0

    def __call__(self, problem: Problem) -> Unlearned:
        """Answer the request by training on."""
        return descend(problem, self.losses, self.learning_rate)

    def losses(self, problem: Problem, model: nn.Module) -> Iterator[Tensor]:
        """The loss of every step."""
        loss, share = problem.recipe.loss, self.retained_share
        forgotten = endlessly(problem, problem.forgotten, self.seed)
        for epoch in range(self.epochs):
            if not share:
                for images, labels in shuffled(problem, problem.forgotten, self.seed + epoch):
                    yield -loss(model(images), labels)
                continue
            for images, labels in shuffled(problem, problem.retain, self.seed + epoch):
                others, other_labels = next(forgotten)
                yield share * loss(model(images), labels) - (1 - share) * loss(model(others), other_labels)
