"""What a set of samples contributes to the unlearning step: additive, so that sets can be streamed and subtracted.

Two forms carry the same information about a set S. ``Sums`` holds the p x p Gram matrix ``G_S = sum J_i'J_i`` and
``b_S = sum J_i'r_i`` and does not grow with the number of samples; ``Rows`` holds every ``J_i`` and ``r_i`` and does
not grow with p squared. ``Sums`` add up entry by entry, ``Rows`` by concatenation.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from fastntk.data import batches, checked
from fastntk.jacobian import Jacobian, PerSampleJacobian, concatenate
from fastntk.linalg import add_product_
from fastntk.loss import SquaredLoss
from fastntk.progress import track

# The kernel's products run in the Jacobian's own dtype, over this many parameters at a time, and add up in float64.
_COLUMNS = 4096


@dataclass(frozen=True)
class Sums:
    """The sums over a set of samples that the primal step needs. ``+`` and ``-`` act on every field.

    The head's blocks keep their structure: head-head is ``I_C (x) head`` and rest-head is C products, none of whose
    zeros are stored.
    """

    rest: Float[Tensor, "rest rest"]
    cross: Float[Tensor, "rest classes features"]
    head: Float[Tensor, "features features"]
    rhs: Float[Tensor, " p"]
    square: Float[Tensor, ""]
    count: Int[Tensor, ""]

    @classmethod
    def of(cls, jacobian: Jacobian, residual: Float[Tensor, "batch classes"]) -> "Sums":
        """The sums of one batch: ``rhs = sum J'r`` and ``square = sum |r|^2`` with ``residual`` r, in float64."""
        j, h = jacobian.rest, jacobian.features
        rows = j.flatten(0, 1)
        return cls(
            rest=(rows.T @ rows).double(),
            cross=torch.einsum("ncq,nf->qcf", j, h).double(),
            head=(h.T @ h).double(),
            rhs=jacobian.rmatvec(residual).double(),
            square=residual.double().square().sum(),
            count=torch.tensor(len(j)),
        )

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: "Sums") -> "Sums":
        return Sums(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def add_(self, other: "Sums") -> "Sums":
        """``+`` in place, for streaming."""
        for f in fields(self):
            getattr(self, f.name).add_(getattr(other, f.name))
        return self

    def gram(self) -> Float[Tensor, "p p"]:
        """``G`` written out: ``[[rest, cross], [cross', I_C (x) head]]``."""
        classes = self.cross.shape[1]
        cross = self.cross.flatten(1)
        head = torch.block_diag(*[self.head] * classes) if self.head.numel() else self.head
        return torch.cat([torch.cat([self.rest, cross], 1), torch.cat([cross.T, head], 1)], 0)

    def matvec(self, vector: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """``G v`` from the blocks."""
        rest, classes, features = self.cross.shape
        cross = self.cross.flatten(1)
        upper, lower = vector[:rest], vector[rest:]
        head = (lower.view(classes, features) @ self.head).flatten()
        return torch.cat([self.rest @ upper + cross @ lower, cross.T @ upper + head])

    @property
    def trace(self) -> float:
        """``tr G = sum |J_i|^2``."""
        return float(self.rest.trace() + self.cross.shape[1] * self.head.trace())


@dataclass(frozen=True)
class Rows:
    """The Jacobians and residuals of a set of samples, which the dual step needs. ``+`` concatenates."""

    jacobian: Jacobian
    residual: Float[Tensor, "samples classes"]

    @classmethod
    def of(cls, batches: Iterable[tuple[Jacobian, Tensor]]) -> "Rows":
        """The rows of at least one batch."""
        parts = list(batches)
        return cls(concatenate([jacobian for jacobian, _ in parts]), torch.cat([residual for _, residual in parts]))

    def __add__(self, other: "Rows") -> "Rows":
        return Rows(concatenate([self.jacobian, other.jacobian]), torch.cat([self.residual, other.residual]))

    def __getitem__(self, samples: Any) -> "Rows":
        return Rows(self.jacobian[samples], self.residual[samples])

    def kernel(self) -> Float[Tensor, "rows rows"]:
        """The neural tangent kernel ``K = J J'``, ``[n C, n C]``, of all pairs of samples and classes.

        Only blocks on and below the diagonal are multiplied. The head's part ``h_i'h_j I_C`` is added without its
        zeros.
        """
        rest, features = self.jacobian.rest.flatten(0, 1), self.jacobian.features
        n, classes = self.residual.shape
        kernel = torch.zeros(n * classes, n * classes, dtype=torch.float64, device=rest.device)
        for columns in track(rest.split(_COLUMNS, 1), "kernel"):
            columns = columns.contiguous()
            add_product_(kernel, columns, columns)
        head = (features @ features.T).double()
        for c in range(classes):
            kernel[c::classes, c::classes] += head
        return kernel

    @property
    def trace(self) -> float:
        """``tr K = sum |J_i|^2``."""
        classes = self.residual.shape[1]
        squares = self.jacobian.rest.square().sum(dtype=torch.float64)
        return float(squares + classes * self.jacobian.features.square().sum(dtype=torch.float64))


def total(parts: Iterable[Sums]) -> Sums:
    """The sum of many, added up in the first one's place, so that two exist at a time."""
    iterator = iter(parts)
    result = next(iterator)
    for part in iterator:
        result.add_(part)
    return result


def stream(
    jacobian: PerSampleJacobian, samples: Dataset, loss: SquaredLoss, batch_size: int, description: str
) -> Iterator[tuple[Jacobian, Tensor]]:
    """The Jacobian and residual of every sample, batch by batch.

    Raises:
        InputError: a pixel is not finite, or a label is outside the classes.
    """
    device = next(iter(jacobian.parameters.values())).device
    for images, labels in track(batches(samples, batch_size), description):
        batch = jacobian(checked(images).to(device))
        yield batch, loss.residual(batch.logits, labels.to(device))
