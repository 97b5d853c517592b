"""Taking samples out of a solved linear problem, or adding them: what all of its forms have in common."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.common.errors import InputError
from fastntk.solve.sums import Rows

RowsOf = Callable[[Tensor], Rows]
"""The rows of the samples at some positions of the training set, computed when asked for."""


@dataclass(frozen=True)
class Update:
    """What adding samples F to a set S, or taking them out, changes.

    Attributes:
        change: ``s(S + F) - s(S)`` or ``s(S - F) - s(S)``.
        positions: of F in the training set.
        sign: 1 where F is added, -1 where it is taken out.
        rows: of F, where the form needs them.
        low_rank: what the form needs to carry it out, see there.
        reached: matrix-free: the relative residual of the solve.
    """

    change: Float[Tensor, " p"]
    positions: Int[Tensor, " samples"]
    sign: int
    rows: Rows | None = None
    low_rank: tuple[Tensor, ...] = ()
    reached: float | None = None


def factorised(core: Float[Tensor, "rows rows"]) -> Float[Tensor, "rows rows"]:
    """The Cholesky factor of the small matrix that an update inverts.

    Raises:
        InputError: it is not positive definite, as it is for samples that are in the sums.
    """
    factor, info = torch.linalg.cholesky_ex(core)
    if info != 0:
        raise InputError(
            "the samples' Jacobians are not among those that the memory was made of: the images, the model or the "
            "arithmetic have changed. Prepare again."
        )
    return factor


def relative(residual: Tensor, rhs: Tensor) -> float:
    """``|residual| / |rhs|``; 0 where both vanish."""
    size = float(rhs.norm())
    return float(residual.norm()) / size if size else float(residual.norm())
