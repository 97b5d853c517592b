"""Away from the fitted model on what is forgotten, near it on what is retained."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastntk.evidence.methods.descent import descend, shuffled
from fastntk.evidence.methods.problem import Problem, Unlearned
from fastntk.evidence.metrics.predictions import divergence
from fastntk.tuning.outputs import model_at


@dataclass(frozen=True)
class Scrub:
    """By turns maximise ``KL(teacher || student)`` over F and minimise ``a KL(teacher || student) + g L_R`` over R.

    The teacher is the fitted model. The first ``maximising`` epochs begin with a pass over F; all have one over R.

    Attributes:
        teaching: ``a``.
        fitting: ``g``.
        epochs: of minimising.
        maximising: how many of them begin with maximising.
        temperature: T of the softmax.
        learning_rate: of Adam, constant.
        seed: of the order.

    Source: Kurmanji et al. 2023, "Towards unbounded machine unlearning" (arXiv 2302.09880).
    """

    teaching: float = 0.5
    fitting: float = 1.0
    epochs: int = 3
    maximising: int = 2
    temperature: float = 4.0
    learning_rate: float = 5e-4
    seed: int = 0

    def __call__(self, problem: Problem) -> Unlearned:
        """Answer the request by training on."""
        return descend(problem, self.losses, self.learning_rate)

    def losses(self, problem: Problem, model: nn.Module) -> Iterator[Tensor]:
        """The loss of every step."""
        teacher = model_at(problem.model, problem.state.anchor)

        def apart(images: Tensor, logits: Tensor) -> Tensor:
            with torch.no_grad():
                taught = teacher(images)
            return divergence(taught, logits, self.temperature)

        for epoch in range(self.epochs):
            if epoch < self.maximising:
                for images, _ in shuffled(problem, problem.forgotten, self.seed + epoch):
                    yield -apart(images, model(images))
            for images, labels in shuffled(problem, problem.retain, self.seed + epoch):
                logits = model(images)
                yield self.teaching * apart(images, logits) + self.fitting * problem.recipe.loss(logits, labels)
