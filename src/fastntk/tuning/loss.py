"""What fitting minimises and the unlearning step linearises, and what it must know of itself.

The step is that of least squares, ``1/2 sum |J_i d - r_i|^2``. A loss whose Hessian with respect to the logits is
``H = L L'`` takes that form with the rows ``L'J_i`` and the residuals ``L^+ r_i``, where ``r_i`` is the negative
gradient: ``sum J_i'H J_i`` is the generalised Gauss-Newton matrix, and ``sum J_i'r_i`` stays as it is.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.common.errors import InputError

Labels = Int[Tensor, " samples"] | Float[Tensor, "samples classes"]
"""The class of every sample, or, as a soft label, what share of it is of each class."""


@cache
def contrasts(count: int) -> Float[Tensor, "count fewer"]:
    """V, an orthonormal basis of the vectors of that length that sum to 0: one column fewer than it has rows."""
    k = torch.arange(1, count, dtype=torch.float64)
    steps = torch.ones(count, count - 1, dtype=torch.float64).triu() - torch.diag(k, -1)[:, : count - 1]
    return steps / (k * (k + 1)).sqrt()


@dataclass(frozen=True)
class Kept:
    """A loss as a function of some of each sample's logits, the others staying as they are.

    Where adding a number to all logits changes nothing (``contrasted``), it is a function of ``y = V'z`` with V the
    ``contrasts`` of the kept logits z, whose mean stays as it is too: one row fewer a sample, and nothing is lost where
    all classes are kept.

    Attributes:
        targets: ``t`` of the logits that are kept.
        total: the sum of a sample's targets over all classes (cross-entropy).
        tail: the logsumexp of the logits that are not kept, -inf if there are none (cross-entropy).
        mean: of the kept logits.
    """

    targets: Float[Tensor, "samples kept"]
    total: Float[Tensor, " samples"]
    tail: Float[Tensor, " samples"]
    mean: Float[Tensor, " samples"]

    def logits(self, y: Float[Tensor, "samples outputs"]) -> Float[Tensor, "samples kept"]:
        """z of ``y = V'z``."""
        return y @ contrasts(self.targets.shape[1]).to(y).T + self.mean[:, None]

    def __getitem__(self, samples: Any) -> "Kept":
        return Kept(*(getattr(self, each.name)[samples] for each in fields(Kept)))

    def __add__(self, other: "Kept") -> "Kept":
        return Kept(*(torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in fields(Kept)))


def kept_of(
    loss: "Loss",
    logits: Float[Tensor, "samples classes"],
    labels: "Labels",
    classes: Int[Tensor, "samples outputs"],
) -> Kept:
    """The loss as a function of the logits of some ``classes`` of each sample."""
    targets = loss.targets(labels, logits.shape[1]).to(logits)
    tail = logits.scatter(1, classes, -torch.inf).logsumexp(1)
    return Kept(targets.gather(1, classes), targets.sum(1), tail, logits.gather(1, classes).mean(1))


@dataclass(frozen=True)
class Loss(ABC):
    """A loss of the logits ``f`` of one sample: convex, with a gradient and a Hessian ``H = L L'`` that are known.

    A frozen dataclass whose fields are numbers, or sequences of numbers. Another package's is declared as an entry
    point in ``fastntk.losses`` (``fastntk.common.plugins``), under its ``name``.

    Attributes:
        name: by which it is asked for, and known again.
        curved: whether H is other than the identity.
        contrasted: whether adding a number to all logits changes nothing; see ``Kept``.
        unit: what distances between models are of: ``"logits"``, or ``"probabilities"`` where logits have no scale.
    """

    name: str = field(default="", init=False)
    curved: ClassVar[bool]
    contrasted: ClassVar[bool]
    unit: ClassVar[str]

    @property
    def scale(self) -> float:
        """How large targets are."""
        return 1.0

    @property
    def weighted(self) -> bool:
        """Whether classes weigh differently."""
        return False

    @abstractmethod
    def targets(self, labels: Labels, classes: int) -> Float[Tensor, "batch classes"]:
        """``t_i`` of samples with the given labels; may raise ``InputError``, as ``shares`` does."""

    @abstractmethod
    def residual(self, logits: Float[Tensor, "batch classes"], labels: Labels) -> Float[Tensor, "batch classes"]:
        """``r_i``, the negative gradient with respect to the logits."""

    @abstractmethod
    def curve(
        self, vectors: Float[Tensor, "batch classes"], logits: Float[Tensor, "batch classes"], labels: Labels
    ) -> Float[Tensor, "batch classes"]:
        """``H_i v_i``."""

    @abstractmethod
    def root(self, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes classes"] | None:
        """``L_i``; None if it is the identity."""

    @abstractmethod
    def whitened(
        self, vectors: Float[Tensor, "batch classes"], logits: Float[Tensor, "batch classes"]
    ) -> Float[Tensor, "batch classes"]:
        """``L_i^+ v_i``."""

    @abstractmethod
    def value_of(self, z: Float[Tensor, "samples outputs"], kept: Kept) -> Float[Tensor, " samples"]:
        """The loss as a function of what is kept of each sample, up to a number that does not depend on it."""

    @abstractmethod
    def gradient_of(self, z: Float[Tensor, "samples outputs"], kept: Kept) -> Float[Tensor, "samples outputs"]:
        """Its gradient with respect to that."""

    @abstractmethod
    def root_of(self, z: Float[Tensor, "samples outputs"], kept: Kept) -> Float[Tensor, "samples outputs outputs"]:
        """L with ``L L'`` its Hessian with respect to that."""

    @abstractmethod
    def __call__(self, logits: Float[Tensor, "batch classes"], labels: Labels) -> Float[Tensor, ""]:
        """The mean over a batch."""


def predictions(logits: Float[Tensor, "samples classes"], unit: str) -> Float[Tensor, "samples classes"]:
    """What distances are taken of: the logits, or, where these have no scale of their own, the probabilities."""
    return logits.softmax(1) if unit == "probabilities" else logits


def check_loss(loss: object) -> None:
    """Raises ``InputError`` unless it is a ``Loss``: a memory needs more of it than its value."""
    if not isinstance(loss, Loss):
        raise InputError(
            f"the loss must be fastntk.CrossEntropy, fastntk.SquaredLoss or another fastntk.tuning.loss.Loss, not a "
            f"{type(loss).__name__}: its gradient and its Hessian are needed too."
        )


def check_labels(labels: Int[Tensor, " batch"], classes: int) -> None:
    """Raises ``InputError`` if the class of a sample is outside ``0 .. classes - 1``."""
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise InputError(
            f"label {int(outside[0])} is outside the model's classes 0 .. {classes - 1}. "
            "Give the model a head with more classes, or relabel the data."
        )


def shares(labels: Labels, classes: int) -> Float[Tensor, "batch classes"]:
    """q: ``onehot(y)`` of the class of each sample, or the soft labels as they are.

    Raises:
        InputError: a label is outside ``0 .. classes - 1``, or the shares of a soft one do not add up to 1.
    """
    if labels.ndim == 2:
        if labels.shape[1] != classes or (labels < 0).any() or not ((labels.sum(1) - 1).abs() <= 1e-4).all():
            raise InputError(f"soft labels must be {classes} shares a sample, none negative, that add up to 1.")
        return labels
    check_labels(labels, classes)
    return torch.nn.functional.one_hot(labels.long(), classes).to(torch.get_default_dtype())
