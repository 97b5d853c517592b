"""As the fitted model on what is forgotten, but that it does not know the right class."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastntk.evidence.methods.descent import descend, shuffled
from fastntk.evidence.methods.problem import Problem, Unlearned
from fastntk.evidence.metrics.predictions import divergence
from fastntk.inputs.batches import hard
from fastntk.tuning.outputs import model_at

_MASKED = -1e4  # a logit of a class that is not there; minus infinity has no product with a probability of 0


@dataclass(frozen=True)
class Delete:
    """Minimise ``KL(q || student)`` over F, with q the fitted model's probabilities without the sample's class.

    The retained samples are not touched. The official code descends by SGD, for 20 epochs where fitting took 80 to 150
    and at 0.0005 to 0.005 of its rate, without random requests. Adam's steps have the length of its rate whatever the
    gradient's, so the share of the fit's rate is another one here.

    Attributes:
        share: of the fit's epochs, over the forgotten samples.
        rate: of Adam, constant, as a factor of the fit's.
        seed: of the order.

    Source: Zhou et al. 2025, "Decoupled distillation to erase" (DELETE, arXiv 2503.23751).
    """

    share: float = 5 / 6
    rate: float = 0.1
    seed: int = 0

    def __call__(self, problem: Problem) -> Unlearned:
        """Answer the request by training on."""
        return descend(problem, self.losses, problem.rate(self.rate))

    def losses(self, problem: Problem, model: nn.Module) -> Iterator[Tensor]:
        """The loss of every step."""
        teacher = model_at(problem.model, problem.state.anchor)
        for epoch in range(problem.epochs(self.share)):
            for images, labels in shuffled(problem, problem.forgotten, self.seed + epoch):
                with torch.no_grad():
                    taught = teacher(images).scatter(1, hard(labels)[:, None], _MASKED)
                yield divergence(taught, model(images))
