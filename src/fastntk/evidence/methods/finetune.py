"""Training on with what is retained, in the hope that the rest fades."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from fastntk.evidence.methods.descent import descend, shuffled
from fastntk.evidence.methods.problem import Problem, Unlearned


@dataclass(frozen=True)
class FineTune:
    """Minimise ``L_R`` from ``theta*``, and with ``sparsity`` ``L_R + s_t |theta|_1`` with ``s_t`` falling to 0.

    Attributes:
        share: of the fit's epochs, over the retained samples.
        rate: of Adam, constant, as a factor of the fit's.
        sparsity: ``s_0``; ``s_t = s_0 (1 - t / T)`` at step t of T. Jia et al.'s l1-sparse.
        seed: of the order.

    Golatkar et al.'s code takes 10 epochs after fits of 25 to 31, which is a share of a third and costs as much of a
    retraining. The official code of l1-sparse lowers ``s_t`` by the epoch; by the step, as here, it is a third less in
    all where there are two. So few are usual here, that by the epoch there would be one step of it.

    Source: the usual baseline, as in Golatkar, Achille, Soatto 2020 (arXiv 1911.04933); for l1-sparse, Jia et al. 2023,
    "Model sparsity can simplify machine unlearning" (arXiv 2304.04934).
    """

    share: float = 1 / 6
    rate: float = 1.0
    sparsity: float = 0.0
    seed: int = 0

    def __call__(self, problem: Problem) -> Unlearned:
        """Answer the request by training on."""
        return descend(problem, self.losses, problem.rate(self.rate))

    def losses(self, problem: Problem, model: nn.Module) -> Iterator[Tensor]:
        """The loss of every step."""
        moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
        epochs = problem.epochs(self.share)
        steps = epochs * -(-len(problem.staying) // problem.recipe.batch_size)
        taken = 0
        for epoch in range(epochs):
            for images, labels in shuffled(problem, problem.retain, self.seed + epoch):
                loss = problem.recipe.loss(model(images), labels)
                if self.sparsity:
                    size = sum(parameter.abs().sum() for parameter in moving)
                    loss = loss + self.sparsity * (1 - taken / steps) * size
                yield loss
                taken += 1
