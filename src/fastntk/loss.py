"""The loss that fitting minimises and that the unlearning step linearises."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.errors import InputError


@dataclass(frozen=True)
class SquaredLoss:
    """Squared loss on centred, scaled targets: ``1/2 |f(x) - t|^2`` per sample.

    ``t = scale * (onehot(y) - 1/C)``. The Gauss-Newton matrix of this loss is ``sum J'J``, which is what makes one
    unlearning step enough; see docs/how-it-works.md. ``scale`` is in logits. A scale of 1 trains badly with Adam's
    usual learning rates (58 % against 88 % on CIFAR-10, docs/benchmarks.md); 10 tests as well as cross-entropy.
    """

    scale: float = 10.0

    def targets(self, labels: Int[Tensor, " batch"], classes: int) -> Float[Tensor, "batch classes"]:
        """The target logits ``t_i`` of samples with the given labels.

        Raises:
            InputError: a label is outside ``0 .. classes - 1``.
        """
        outside = labels[(labels < 0) | (labels >= classes)]
        if len(outside):
            raise InputError(
                f"label {int(outside[0])} is outside the model's classes 0 .. {classes - 1}. "
                "Give the model a head with more classes, or relabel the data."
            )
        onehot = torch.nn.functional.one_hot(labels.long(), classes)
        return self.scale * (onehot.to(torch.get_default_dtype()) - 1 / classes)

    def residual(
        self, logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch classes"]:
        """``r_i = t_i - f(x_i)``, the negative gradient of the loss with respect to the logits."""
        return self.targets(labels, logits.shape[1]).to(logits) - logits

    def __call__(self, logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        """The mean over the batch of ``1/2 |f(x_i) - t_i|^2``."""
        return self.residual(logits, labels).square().sum(1).mean() / 2
