"""The Gram matrix itself: additive over samples, so that sets can be streamed and subtracted.

``Sums`` holds ``G_S = sum J_i'J_i`` and ``b_S = sum J_i'r_i`` and does not grow with the number of samples.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.jacobians.jacobian import Jacobian, concatenate
from fastntk.solve.linalg import add_product_, mirror_

# Rows that are multiplied at once: enough for the products to run at full rate.
ROWS = 2048


@dataclass(frozen=True)
class Sums:
    """The sums over a set of samples, as a ``Gram`` operator. ``-`` acts on every field.

    The head's blocks keep their structure: head-head is ``I_C (x) head`` and rest-head is C products, none of whose
    zeros are stored. Products are taken and added up in the dtype of the fields, float64 unless asked otherwise.
    """

    rest: Float[Tensor, "rest rest"]
    cross: Float[Tensor, "classes rest features"]
    head: Float[Tensor, "features features"]
    rhs: Float[Tensor, " p"]
    square: Float[Tensor, ""]
    samples: Int[Tensor, ""]

    @classmethod
    def zero(cls, like: Jacobian, dtype: torch.dtype = torch.float64) -> "Sums":
        """The sums over no samples, for Jacobians of the sizes of ``like``; vectors are float64 in any case."""
        _, classes, rest = like.rest.shape
        features = like.features.shape[1]
        zeros = like.rest.new_zeros
        return cls(
            rest=zeros(rest, rest, dtype=dtype),
            cross=zeros(classes, rest, features, dtype=dtype),
            head=zeros(features, features, dtype=dtype),
            rhs=zeros(like.size, dtype=torch.float64),
            square=zeros((), dtype=torch.float64),
            samples=zeros((), dtype=torch.long),
        )

    @classmethod
    def of(cls, jacobian: Jacobian, residual: Float[Tensor, "batch classes"]) -> "Sums":
        """The sums of one batch: ``rhs = sum J'r`` and ``square = sum |r|^2`` with ``residual`` r, in float64."""
        return cls.zero(jacobian).observe_(jacobian, residual).complete_()

    def observe_(self, jacobian: Jacobian, residual: Float[Tensor, "batch classes"], sign: int = 1) -> "Sums":
        """Add a batch (or take it away again, with a ``sign`` of -1), in place.

        Products are taken in the dtype of the fields: what is taken away must round as it did when it was added. Of the
        symmetric blocks only the lower triangles are brought up to date: ``complete_`` does the rest.
        """
        j, h = jacobian.rest.to(self.rest.dtype), jacobian.features.to(self.rest.dtype)
        rows = j.flatten(0, 1).T
        add_product_(self.rest, rows, rows, sign)
        for c, block in enumerate(self.cross if h.numel() else ()):
            block.addmm_(j[:, c].T, h, alpha=sign)
        add_product_(self.head, h.T, h.T, sign)
        self.rhs.add_(Jacobian(j, h).rmatvec(residual.double()), alpha=sign)
        self.square.add_(residual.double().square().sum(), alpha=sign)
        self.samples.add_(sign * len(j))
        return self

    def complete_(self) -> "Sums":
        """Mirror the lower triangles of the symmetric blocks, in place, once all batches are in."""
        mirror_(self.rest)
        mirror_(self.head)
        return self

    def __sub__(self, other: "Sums") -> "Sums":
        return Sums(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def gram(self) -> Float[Tensor, "p p"]:
        """``G`` written out, zeros included: ``[[rest, cross], [cross', I_C (x) head]]``. Large; for inspection."""
        classes = len(self.cross)
        cross = self.cross.transpose(0, 1).flatten(1)
        head = torch.block_diag(*[self.head] * classes) if self.head.numel() else self.head
        return torch.cat([torch.cat([self.rest, cross], 1), torch.cat([cross.T, head], 1)], 0)

    def matvec(self, vector: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """``G v``, from the blocks."""
        classes, rest, features = self.cross.shape
        v = vector.to(self.rest.dtype)
        upper, lower = v[:rest], v[rest:].view(classes, features)
        first = self.rest @ upper + self.across(lower)
        second = lower @ self.head + self.down(upper)
        return torch.cat([first, second.flatten()]).to(vector.dtype)

    def across(self, lower: Float[Tensor, "classes features"]) -> Float[Tensor, " rest"]:
        """``sum_c X_c v_c`` with the blocks ``X_c`` of ``cross``."""
        return torch.stack([block @ own for block, own in zip(self.cross, lower, strict=True)]).sum(0)

    def down(self, upper: Float[Tensor, " rest"]) -> Float[Tensor, "classes features"]:
        """``X_c' v`` of every class."""
        return torch.stack([block.T @ upper for block in self.cross])

    @property
    def count(self) -> int:
        """n."""
        return int(self.samples)

    @property
    def outputs(self) -> int:
        """Rows a sample."""
        return len(self.cross)

    @property
    def dtype(self) -> torch.dtype:
        """Of the basis of a Krylov space."""
        return self.rhs.dtype

    @property
    def trace(self) -> float:
        """``tr G = sum |J_i|^2``."""
        return float(self.rest.trace() + len(self.cross) * self.head.trace())


def accumulate(batches: Iterable[tuple[Jacobian, Tensor]], sums: Sums) -> Sums:
    """Add Jacobians and residuals to ``sums``, in place, put together until their products run at full rate.

    ``complete_`` must follow once all are in.
    """
    for jacobian, residual in grouped(batches):
        sums.observe_(jacobian, residual)
    return sums


def grouped(batches: Iterable[tuple[Jacobian, Tensor]]) -> Iterator[tuple[Jacobian, Tensor]]:
    """The batches put together to at least ``ROWS`` rows (samples times classes) each, but for the last."""
    waiting: list[tuple[Jacobian, Tensor]] = []
    for batch in batches:
        waiting.append(batch)
        if sum(residual.numel() for _, residual in waiting) >= ROWS:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(batches: list[tuple[Jacobian, Tensor]]) -> tuple[Jacobian, Tensor]:
    if len(batches) == 1:
        return batches[0]
    return concatenate([jacobian for jacobian, _ in batches]), torch.cat([residual for _, residual in batches])
