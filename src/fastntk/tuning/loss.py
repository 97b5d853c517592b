"""The losses that fitting minimises and that the unlearning step linearises.

The step is that of least squares, ``1/2 sum |J_i d - r_i|^2``. A loss whose Hessian with respect to the logits is
``H = L L'`` takes that form with the rows ``L'J_i`` and the residuals ``L^+ r_i``, where ``r_i`` is the negative
gradient: ``sum J_i'H J_i`` is the generalised Gauss-Newton matrix, and ``sum J_i'r_i`` stays as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.common.errors import InputError


@dataclass(frozen=True)
class SquaredLoss:
    """Squared loss on centred, scaled targets: ``1/2 |f(x) - t|^2`` per sample.

    ``t = scale * (onehot(y) - 1/C)``. The Gauss-Newton matrix of this loss is ``sum J'J``, which is what makes one
    unlearning step enough; see docs/how-it-works.md. ``scale`` is in logits. A scale of 1 trains badly with Adam's
    usual learning rates (58 % against 88 % on CIFAR-10, docs/benchmarks.md); 10 tests as well as cross-entropy.
    """

    curved: ClassVar[bool] = False  # its Hessian is the identity
    scale: float = 10.0
    name: str = field(default="squared", init=False)

    def targets(self, labels: Int[Tensor, " batch"], classes: int) -> Float[Tensor, "batch classes"]:
        """The target logits ``t_i`` of samples with the given labels.

        Raises:
            InputError: a label is outside ``0 .. classes - 1``.
        """
        return self.scale * (_onehot(labels, classes) - 1 / classes)

    def residual(
        self, logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch classes"]:
        """``r_i = t_i - f(x_i)``, the negative gradient of the loss with respect to the logits."""
        return self.targets(labels, logits.shape[1]).to(logits) - logits

    def root(self, logits: Float[Tensor, "batch classes"]) -> None:
        """L is the identity."""

    def whitened(
        self, vectors: Float[Tensor, "batch classes"], logits: Float[Tensor, "batch classes"]
    ) -> Float[Tensor, "batch classes"]:
        """``L^+ v_i``: themselves."""
        return vectors

    def __call__(self, logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        """The mean over the batch of ``1/2 |f(x_i) - t_i|^2``."""
        return self.residual(logits, labels).square().sum(1).mean() / 2


@dataclass(frozen=True)
class CrossEntropy:
    """``-log p_y`` per sample, with ``p = softmax(f(x))``: ``r = onehot(y) - p``, ``H = diag(p) - pp'``.

    ``H = L L'`` with ``L = (I - p 1') diag(sqrt(p))``. One step of it goes less far than one of squared loss: where the
    fit is sure of itself, H all but vanishes. ``fastntk.evidence.methods.Iterated`` takes several.
    """

    curved: ClassVar[bool] = True
    name: str = field(default="cross-entropy", init=False)
    scale: ClassVar[float] = 1.0

    def residual(
        self, logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch classes"]:
        """``r_i = onehot(y_i) - p_i``, the negative gradient of the loss with respect to the logits."""
        return _onehot(labels, logits.shape[1]).to(logits) - logits.softmax(1)

    def root(self, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes classes"]:
        """``L_i``."""
        p = logits.softmax(1)
        return (torch.eye(p.shape[1]).to(p) - p[:, :, None]) * p.sqrt()[:, None, :]

    def whitened(
        self, vectors: Float[Tensor, "batch classes"], logits: Float[Tensor, "batch classes"]
    ) -> Float[Tensor, "batch classes"]:
        """``v_i / sqrt(p_i)``. ``L`` times it is ``v_i``, if that sums to 0, as a gradient does; and where ``v_i`` is
        ``L'z``, it is z, up to what is the same for every class."""
        return vectors * (-logits.log_softmax(1) / 2).exp()

    def __call__(self, logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        """The mean over the batch."""
        _onehot(labels, logits.shape[1])
        return torch.nn.functional.cross_entropy(logits, labels)


Loss = SquaredLoss | CrossEntropy
LOSSES: dict[str, type[Loss]] = {kind().name: kind for kind in (SquaredLoss, CrossEntropy)}


def loss_from(record: Mapping[str, Any]) -> Loss:
    """The reverse of ``dataclasses.asdict``. Raises ``InputError`` for a loss that there is not."""
    kind = type(loss_named(record["name"]))
    return kind(**{each.name: record[each.name] for each in fields(kind) if each.init})


def loss_named(name: str) -> Loss:
    """The loss of that name, as it is by default.

    Raises:
        InputError: there is none.
    """
    if name not in LOSSES:
        raise InputError(f"the loss is one of {', '.join(LOSSES)}, not {name!r}.")
    return LOSSES[name]()


def _onehot(labels: Int[Tensor, " batch"], classes: int) -> Float[Tensor, "batch classes"]:
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise InputError(
            f"label {int(outside[0])} is outside the model's classes 0 .. {classes - 1}. "
            "Give the model a head with more classes, or relabel the data."
        )
    return torch.nn.functional.one_hot(labels.long(), classes).to(torch.get_default_dtype())
