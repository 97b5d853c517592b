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
    """By turns minimise ``a D + g L_R`` over R and maximise ``D`` over F, ``D = T^2 KL(teacher || student)``.

    The teacher is the fitted model. Every epoch is a pass over R, after which all but the last ``minimising`` have one
    over F. The official code begins with F: there the student is in training mode, here it is the teacher, logit for
    logit, and its first pass over F would have no gradient.

    Attributes:
        teaching: ``a``.
        fitting: ``g``.
        share: of the fit's epochs, at least one more than minimise alone.
        minimising: epochs over R alone at the end, at least one.
        temperature: T of the softmax.
        rate: of Adam, constant, as a factor of the fit's.
        seed: of the order.

    Weights and temperature are those of that code's ResNet-50 (Adam); its large experiments have 0.001 and 0.99, its
    small ones a T of 2. Of it are not here: rates that fall tenfold after given epochs, weight decay, batches of
    another size over F, and the choice of an earlier epoch by the accuracy on F (SCRUB+R), as a request comes with no
    held-out images of its classes. ``L_R`` is the fit's loss: with squared loss ``a : g`` weigh otherwise than in the
    source. Rate and epochs are of the fit's (there 3 to 10 epochs after fits of 31), as every method's here
    (``descend``).

    Source: Kurmanji et al. 2023, "Towards unbounded machine unlearning" (arXiv 2302.09880).
    """

    teaching: float = 0.5
    fitting: float = 1.0
    share: float = 1 / 4
    minimising: int = 1
    temperature: float = 4.0
    rate: float = 0.5
    seed: int = 0

    def __call__(self, problem: Problem) -> Unlearned:
        """Answer the request by training on."""
        return descend(problem, self.losses, problem.rate(self.rate))

    def losses(self, problem: Problem, model: nn.Module) -> Iterator[Tensor]:
        """The loss of every step."""
        teacher = model_at(problem.model, problem.state.anchor)

        def apart(images: Tensor, logits: Tensor) -> Tensor:
            with torch.no_grad():
                taught = teacher(images)
            return self.temperature**2 * divergence(taught, logits, self.temperature)

        last = max(1, self.minimising)
        epochs = max(problem.epochs(self.share), 1 + last)
        for epoch in range(epochs):
            for images, labels in shuffled(problem, problem.retain, self.seed + epoch):
                logits = model(images)
                yield self.teaching * apart(images, logits) + self.fitting * problem.recipe.loss(logits, labels)
            if epoch < epochs - last:
                for images, _ in shuffled(problem, problem.forgotten, self.seed + epoch):
                    yield -apart(images, model(images))
