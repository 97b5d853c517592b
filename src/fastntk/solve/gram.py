"""The contract of a Gram operator: what a set of samples contributes to the step, in whatever way it is kept."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fastntk.solve.linalg import lanczos


@dataclass(frozen=True)
class Spectrum:
    """What ``|J s(S)|`` depends on, for every ridge at once: the problem in the eigenvectors of G in a Krylov space.

    With ``s = (G + ridge I)^-1 (b + G u) - u``, ``|J s|^2 = sum_k mu_k a_k^2 - 2 sum_k a_k c_k + |J u|^2`` where
    ``a_k = g_k / (mu_k + ridge)``.

    Attributes:
        values: ``mu``, the eigenvalues.
        start: ``g``, what ``b + G u`` has of each eigenvector.
        cross: ``c``, what ``G u`` has of it.
        square: ``|J u|^2``.
    """

    values: Float[Tensor, " m"]
    start: Float[Tensor, " m"]
    cross: Float[Tensor, " m"]
    square: Float[Tensor, ""]

    def outputs(self, ridges: Float[Tensor, " ridges"]) -> Float[Tensor, " ridges"]:
        """``|J s(S)|^2`` at each of the ridges, which are totals."""
        coefficients = self.start / (self.values + ridges[:, None])
        return (coefficients.square() * self.values).sum(1) - 2 * coefficients @ self.cross + self.square


Enough = Callable[[Spectrum], bool]
"""Whether a Krylov space need not grow."""


def never(spectrum: Spectrum) -> bool:
    """It is to grow to the end."""
    return False


@runtime_checkable
class Gram(Protocol):
    """``G = sum_S J_i'H_i J_i`` and ``b = sum_S J_i'r_i`` over a set S of samples.

    Sums (``sums``) hold G, stored rows (``kernel``) hold every ``J_i``, network passes (``passes``) hold neither.
    """

    @property
    def count(self) -> int:
        """n, the number of samples in S."""

    @property
    def outputs(self) -> int:
        """The number of rows a sample: C, or fewer where the classes are probed."""

    @property
    def rhs(self) -> Float[Tensor, " p"]:
        """``b``."""

    @property
    def trace(self) -> float:
        """``tr G = sum |L_i'J_i|^2``; network passes estimate it, without bias."""

    def matvec(self, vector: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """``G v``, in the dtype of the vector."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the basis of a Krylov space."""


@dataclass(frozen=True)
class Krylov:
    """A Krylov space of G at ``b + G u``, by Lanczos's method.

    Attributes:
        basis: Q, orthonormal.
        projected: ``T = Q'G Q``, float64.
        start: ``Q'(b + G u)``.
        cross: ``Q'G u``.
        square: ``u'G u``.
    """

    basis: Float[Tensor, "p m"]
    projected: Float[Tensor, "m m"]
    start: Float[Tensor, " m"]
    cross: Float[Tensor, " m"]
    square: Float[Tensor, ""]

    @classmethod
    def of(cls, gram: Gram, displacement: Float[Tensor, " p"], steps: int, enough: Enough = never) -> "Krylov":
        """At most so many steps, and fewer where a spectrum is ``enough``; the basis is kept in the operator's
        ``dtype``."""
        image = gram.matvec(displacement)
        start = (gram.rhs + image).to(gram.dtype)

        def space(basis: Tensor, projected: Tensor) -> Krylov:
            inside, cross = ((basis.T @ vector.to(basis)).double() for vector in (start, image))
            return cls(basis, projected.double(), inside, cross, displacement @ image)

        return space(*lanczos(gram.matvec, start, steps, lambda *found: enough(space(*found).spectrum)))

    @property
    def spectrum(self) -> Spectrum:
        """The problem in this space."""
        values, vectors = torch.linalg.eigh(self.projected)
        return Spectrum(values, vectors.T @ self.start, vectors.T @ self.cross, self.square)
