"""The neural tangent kernel of stored rows, and these as a Gram operator."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fastntk.common.progress import track
from fastntk.jacobians.jacobian import Jacobian
from fastntk.jacobians.rows import Rows
from fastntk.solve.linalg import add_product_, mirror_

# The kernel's products run in the Jacobian's own dtype, over this many parameters at a time, and add up in float64.
_COLUMNS = 4096

_SAMPLES = 256  # whose head's part is worked out at once


def kernel(rows: Rows) -> Float[Tensor, "rows rows"]:
    """``K = J J'``, ``[n C, n C]``, of all pairs of samples and classes, in float64.

    Only blocks on and below the diagonal are multiplied. The head's part ``h_i'h_j I_C`` is added without its zeros.
    """
    rest, features = rows.jacobian.rest.flatten(0, 1), rows.jacobian.features
    n, outputs = rows.residual.shape
    total = torch.zeros(n * outputs, n * outputs, dtype=torch.float64, device=rest.device)
    for columns in track(rest.split(_COLUMNS, 1), "kernel"):
        columns = columns.contiguous()
        add_product_(total, columns, columns)
    if rows.jacobian.kept is not None:
        return _add_kept_(mirror_(total), rows.jacobian, rows.jacobian)
    return _add_head_(mirror_(total), features, features, outputs)


def kernel_between(rows: Rows, others: Rows) -> Float[Tensor, "rows others"]:
    """``J J_other'``, ``[n C, m C]``, in float64."""
    left, right = rows.jacobian, others.jacobian
    total = (left.rest.flatten(0, 1) @ right.rest.flatten(0, 1).T).double()
    if left.kept is not None:
        return _add_kept_(total, left, right)
    return _add_head_(total, left.features, right.features, rows.residual.shape[1])


def _add_head_(total: Tensor, left: Tensor, right: Tensor, outputs: int) -> Tensor:
    """Add the head's part ``h_i'h_j I_C`` to a kernel, in place, without its zeros."""
    head = (left @ right.T).double()
    for c in range(outputs):
        total[c::outputs, c::outputs] += head
    return total


def _add_kept_(total: Tensor, left: Jacobian, right: Jacobian) -> Tensor:
    """The same where each sample keeps classes of its own: ``h_i'h_j`` times what two rows have of the same classes."""
    outputs = left.rest.shape[1]
    own, other = left.combined().double(), right.combined().double()
    for some in torch.arange(len(left), device=own.device).split(_SAMPLES):
        shared = torch.einsum("nca,kcb->nakb", own[some], other)
        head = (left.features[some] @ right.features.T).double()
        rows = slice(int(some[0]) * outputs, (int(some[-1]) + 1) * outputs)
        total[rows] += (shared * head[:, None, :, None]).reshape(-1, total.shape[1])
    return total


@dataclass(frozen=True)
class Stored:
    """Stored rows as a ``Gram`` operator: ``G = J'J`` and ``b = J'r`` from every ``J_i`` and ``r_i``.

    Attributes:
        rows: of the samples.
    """

    rows: Rows

    @property
    def count(self) -> int:
        """n."""
        return len(self.rows)

    @property
    def outputs(self) -> int:
        """Rows a sample."""
        return self.rows.residual.shape[1]

    @property
    def rhs(self) -> Float[Tensor, " p"]:
        """``b``."""
        return self.rows.jacobian.rmatvec(self.rows.residual.double())

    @property
    def trace(self) -> float:
        """``tr G = tr K``."""
        rest = self.rows.jacobian.rest
        return self.rows.mean_diagonal(rest.dtype, rest.device) * self.rows.residual.numel()

    def matvec(self, vector: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """``J'(J v)``."""
        return self.rows.jacobian.rmatvec(self.rows.jacobian.matvec(vector))

    @property
    def dtype(self) -> torch.dtype:
        """Of the basis of a Krylov space."""
        return self.rows.jacobian.rest.dtype
