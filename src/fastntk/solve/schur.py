"""The inverse of the Gram matrix and a ridge from its blocks, for rows that are not written out.

G consists of blocks: R (rest), X_c (rest by the head's inputs, one a class) and ``I_C (x) H`` (head). The inverse's own
block for the rest is that of the Schur complement

    R + ridge I - sum_c X_c (H + ridge I)^-1 X_c',

and products with the rest of it go through X_c, so the head's C^2 blocks are never written out.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fastntk.jacobians.rows import Rows
from fastntk.solve.linalg import add_product_, near_factor, regularised_factor, shifted, solved_by
from fastntk.solve.sums import Sums

Product = Callable[[Float[Tensor, " p"]], Float[Tensor, " p"]]
"""With a matrix."""


def complement(
    sums: Sums, head_inverse: Float[Tensor, "features features"], ridge: float
) -> Float[Tensor, "rest rest"]:
    """The lower triangle of the Schur complement, in the dtype of the sums."""
    matrix = shifted(sums.rest, ridge)
    for block in sums.cross if head_inverse.numel() else ():
        add_product_(matrix, block @ head_inverse, block, -1)
    return matrix


def factored(schur: Float[Tensor, "rest rest"]) -> Float[Tensor, "rest rest"]:
    """The Cholesky factor of a Schur complement, near enough to precondition with. Raises like ``near_factor``."""
    return near_factor(lambda dtype: schur.to(dtype, copy=True))


@dataclass(frozen=True)
class Blockwise:
    """``B = (G + ridge I)^-1``, as nearly as the factor has it.

    Attributes:
        sums: G.
        head_inverse: ``(H + ridge I)^-1``.
        factor: of the Schur complement, lower, or of one that is near.
    """

    sums: Sums
    head_inverse: Float[Tensor, "features features"]
    factor: Float[Tensor, "rest rest"]

    def solve(self, vector: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """``B v``, in the dtype of the vector."""
        classes, rest, features = self.sums.cross.shape
        v = vector.to(self.sums.rest.dtype)
        head = v[rest:].view(classes, features) @ self.head_inverse
        upper = solved_by(self.factor, (v[:rest] - self.sums.across(head))[:, None])[:, 0]
        head = head - self.sums.down(upper) @ self.head_inverse
        return torch.cat([upper, head.flatten()]).to(vector.dtype)

    def reduced(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """The head's inputs h, ``(H + ridge I)^-1 h'``, and the rest's rows of J' less what the head takes up of them,
        V; one column a sample and class."""
        j, h = (part.to(self.sums.rest.dtype) for part in (rows.jacobian.rest, rows.jacobian.features))
        solved = self.head_inverse @ h.T
        return h, solved, (j.permute(2, 0, 1) - (self.sums.cross @ solved).permute(1, 2, 0)).flatten(1)

    def projected(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same, and the Schur complement's inverse times V."""
        h, solved, reduced = self.reduced(rows)
        return h, solved, reduced, solved_by(self.factor, reduced)

    def observe_(self, schur: Float[Tensor, "rest rest"], rows: Rows, sign: int) -> None:
        """Bring the lower triangle of the Schur complement up to date for rows that leave G (``sign`` -1) or join it,
        in place and before the sums are: by ``sign V (I + sign h (H + ridge I)^-1 h' (x) I_C)^-1 V'``."""
        h, solved, reduced = self.reduced(rows)
        inverse = torch.linalg.inv(shifted(sign * (h @ solved), 1.0))
        blocks = reduced.unflatten(1, (len(h), len(self.sums.cross)))
        right = torch.einsum("rnc,nm->rmc", blocks, inverse).flatten(1)
        add_product_(schur, right.to(schur), reduced.to(schur), sign)

    def updated(self, rows: Rows, sign: int) -> tuple[Product, Product]:
        """Products with ``G + sign J'J`` of some rows, and nearly with the inverse of this and the ridge:
        ``B - sign B J'(I + sign J B J')^-1 J B``."""
        jacobian = rows.jacobian.to(torch.float64)
        h, solved, reduced, upper = self.projected(rows)
        core = reduced.T @ upper + torch.kron(h @ solved, torch.eye(len(self.sums.cross)).to(h))
        factor = regularised_factor(shifted(sign * core, 1.0))

        def lifted(weights: Tensor) -> Tensor:
            """``B J'w``."""
            change = upper @ weights
            own = weights.view(solved.shape[1], len(self.sums.cross)).T @ solved.T
            head = own - self.sums.down(change) @ self.head_inverse
            return torch.cat([change, head.flatten()]).double()

        def apply(v: Tensor) -> Tensor:
            return self.sums.matvec(v) + sign * jacobian.rmatvec(jacobian.matvec(v))

        def precondition(v: Tensor) -> Tensor:
            image = self.solve(v)
            weights = solved_by(factor, jacobian.matvec(image).flatten()[:, None].to(upper))[:, 0]
            return image - sign * lifted(weights)

        return apply, precondition
