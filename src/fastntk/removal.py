"""Taking samples out of a solved linear problem: what all of its forms have in common."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from fastntk.statistics import Rows

RowsOf = Callable[[Tensor], Rows]
"""The rows of the samples at some positions of the training set, computed when asked for."""


@dataclass(frozen=True)
class Removal:
    """What taking samples F out of a set S changes.

    Attributes:
        change: ``s(S - F) - s(S)``.
        positions: of F in the training set.
        forgotten: the rows of F, where the form needs them.
        low_rank: primal: ``B J_F'`` and the Cholesky factor of ``I - J_F B J_F'``; dual: the change of ``a``, ``A_SF``
            and the Cholesky factor of ``A_FF``; nothing for the matrix-free form.
    """

    change: Float[Tensor, " p"]
    positions: Int[Tensor, " samples"]
    forgotten: Rows | None = None
    low_rank: tuple[Tensor, ...] = ()
