"""The unlearning step, in its primal (p x p) and its dual (nC x nC) form.

For a set S, linearised at ``theta*`` with ``u = theta* - theta_0``:

    s(S) = argmin_d  1/2 sum_S |J_i d - r_i|^2 + ridge/2 |d + u|^2
         = (G_S + ridge I)^-1 (b_S - ridge u)                      primal
         = J_S' (J_S J_S' + ridge I)^-1 (r_S + J_S u) - u          dual

is the step to the optimum that S predicts. Forgetting F out of D = R + F moves the tuned parameters by
``s(R) - s(D)``, anchored at what ``theta*`` itself falls short of. With ``B = (G_D + ridge I)^-1`` and
``A = (K_D + ridge I)^-1``, the forgotten samples alone give that difference:

    s(R) - s(D) = -B J_F' (I - J_F B J_F')^-1 (r_F - J_F s(D))     primal
                = -J_D' A_DF A_FF^-1 a_F,   a = A (r_D + J_D u)    dual

``(I - J_F B J_F')^-1 (r_F - J_F s(D))`` is the error that the linearised model makes on F when it has not seen F.
The ridge is a total over the set, the same for D and R: half of it times ``|theta - theta_0|^2`` is what fitting adds
to the summed loss. Source: Golatkar et al. 2020 (arXiv 2003.02960) for the step without ``u``, Li et al. 2023 (arXiv
2312.14923) for taking it over parameter-efficient parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.jacobian import Jacobian
from fastntk.linalg import add_product_, conjugate_gradients, invert_, mirror_, ridge_inverse
from fastntk.removal import Removal, RowsOf
from fastntk.statistics import Rows, Sums


def targets(rows: Rows, displacement: Float[Tensor, " p"]) -> Float[Tensor, " rows"]:
    """``r_S + J_S u``, what the linearised model must add to its value at ``theta_0``."""
    return (rows.residual.double() + rows.jacobian.matvec(displacement)).flatten()


@dataclass
class PrimalSolution:
    """``B = (G_S + ridge I)^-1`` and ``s(S)`` for a set S that samples leave; the size does not depend on S.

    G consists of blocks: R (rest), X_c (rest by the head's inputs, one a class) and ``I_C (x) H`` (head). B is kept as
    the inverses of ``H + ridge I`` and of the Schur complement ``R + ridge I - sum_c X_c (H + ridge I)^-1 X_c'``, which
    is B's own block for the rest. So the head's C^2 blocks are never written out, and products with B go through X_c.

    Attributes:
        sums: of S.
        displacement: ``u``.
        ridge: a total.
        inverse: of the Schur complement.
        head_inverse: ``(H + ridge I)^-1``.
        step: ``s(S)``.
    """

    form: ClassVar[Literal["primal"]] = "primal"
    residual: ClassVar[None] = None
    sums: Sums
    displacement: Float[Tensor, " p"]
    ridge: float
    inverse: Float[Tensor, "rest rest"]
    head_inverse: Float[Tensor, "features features"]
    step: Float[Tensor, " p"]

    @classmethod
    def of(cls, sums: Sums, displacement: Float[Tensor, " p"], ridge: float) -> "PrimalSolution":
        """Solve for the set that ``sums`` are over."""
        head_inverse = ridge_inverse(sums.head, ridge)
        inverse = sums.rest.clone()
        inverse.diagonal().add_(ridge)
        for block in sums.cross if head_inverse.numel() else ():
            add_product_(inverse, block @ head_inverse, block, -1)
        solution = cls(sums, displacement, ridge, invert_(inverse), head_inverse, torch.zeros_like(displacement))
        rhs = sums.rhs - ridge * displacement
        for _ in range(2):  # the second time takes off the rounding of the first
            solution.step += solution.solve((rhs - solution._apply(solution.step))[:, None])[:, 0]
        return solution

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the ridge, by name."""
        sums = {f"sums.{field.name}": getattr(self.sums, field.name) for field in fields(Sums)}
        return {**sums, **{name: getattr(self, name) for name in ("displacement", "inverse", "head_inverse", "step")}}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], ridge: float) -> "PrimalSolution":
        """The reverse of ``tensors``."""
        sums = Sums(*(tensors[f"sums.{field.name}"] for field in fields(Sums)))
        own = (tensors[name] for name in ("inverse", "head_inverse", "step"))
        return cls(sums, tensors["displacement"], ridge, *own)

    def _apply(self, vector: Tensor) -> Tensor:
        """``(G + ridge I) v``."""
        return self.sums.matvec(vector) + self.ridge * vector

    def solve(self, vectors: Float[Tensor, "p m"]) -> Float[Tensor, "p m"]:
        """``B V``, in the dtype of the vectors."""
        classes, rest, features = self.sums.cross.shape
        v = vectors.to(self.inverse.dtype)
        head = self.head_inverse @ v[rest:].view(classes, features, v.shape[1])
        upper = self.inverse @ (v[:rest] - torch.einsum("cqf,cfm->qm", self.sums.cross, head))
        head = head - self.head_inverse @ torch.einsum("cqf,qm->cfm", self.sums.cross, upper)
        return torch.cat([upper, head.flatten(0, 1)]).to(vectors.dtype)

    def removal(self, positions: Int[Tensor, " samples"], rows: RowsOf) -> Removal:
        """What taking the samples at ``positions`` out of S would change, changing nothing."""
        forgotten = rows(positions)
        jacobian = forgotten.jacobian
        lifted = self._lift(jacobian)
        core = torch.eye(lifted.shape[1]).to(lifted) - jacobian.matmat(lifted).flatten(0, 1)
        factor = torch.linalg.cholesky(core)
        error = (forgotten.residual.double() - jacobian.matvec(self.step)).flatten()
        weights = torch.cholesky_solve(error[:, None].to(factor), factor)
        return Removal(-(lifted @ weights)[:, 0].to(self.step), positions, forgotten, (lifted, factor))

    def remove_(self, removal: Removal) -> None:
        """Take the samples of a ``removal`` out of S, in place."""
        lifted, factor = removal.low_rank
        forgotten = cast(Rows, removal.forgotten)
        upper = lifted[: len(self.inverse)]
        add_product_(self.inverse, upper, torch.cholesky_solve(upper.T, factor).T)
        mirror_(self.inverse)
        self.step += removal.change
        self.sums.observe_(forgotten.jacobian, forgotten.residual, -1).complete_()
        self.head_inverse = ridge_inverse(self.sums.head, self.ridge)

    def _lift(self, jacobian: Jacobian) -> Float[Tensor, "p rows"]:
        """``B J'``. The head's part of J' has one block a class, ``h_i`` in the columns of that class."""
        j, h = jacobian.rest.to(self.inverse.dtype), jacobian.features.to(self.inverse.dtype)
        samples, classes, _ = j.shape
        solved = self.head_inverse @ h.T
        reduced = j.permute(2, 0, 1) - torch.einsum("cqf,fn->qnc", self.sums.cross, solved)
        upper = self.inverse @ reduced.flatten(1)
        head = -(self.head_inverse @ torch.einsum("cqf,qm->cfm", self.sums.cross, upper))
        for c in range(classes):
            head[c].view(len(solved), samples, classes)[:, :, c] += solved
        return torch.cat([upper, head.flatten(0, 1)])

    def resolve(
        self, positions: Int[Tensor, " samples"], rows: RowsOf, displacement: Float[Tensor, " p"], ridge: float
    ) -> Float[Tensor, " p"]:
        """``s(S - F)`` for any displacement and ridge: conjugate gradients on the sums, preconditioned by ``B``."""
        removal = self.removal(positions, rows)
        lifted, factor = removal.low_rank
        forgotten = cast(Rows, removal.forgotten)
        jacobian = forgotten.jacobian

        def apply(v: Tensor) -> Tensor:
            return self.sums.matvec(v) + ridge * v - jacobian.rmatvec(jacobian.matvec(v))

        def precondition(v: Tensor) -> Tensor:
            low_rank = lifted @ torch.cholesky_solve(lifted.T @ v.to(lifted)[:, None], factor)
            return self.solve(v[:, None])[:, 0] + low_rank[:, 0].to(v)

        rhs = self.sums.rhs - jacobian.rmatvec(forgotten.residual.to(self.step)) - ridge * displacement
        return conjugate_gradients(apply, rhs, precondition)


@dataclass
class DualSolution:
    """``A``, ``a`` and the rows of a set S that samples leave; ``s(S) = J_S' a - u``.

    Samples that have left have zeros in every array.

    Attributes:
        rows: of S.
        displacement: ``u``.
        ridge: a total.
        kernel: ``K_S = J_S J_S'``.
        inverse: ``A = (K_S + ridge I)^-1``.
        coefficients: ``a = A (r_S + J_S u)``.
    """

    form: ClassVar[Literal["dual"]] = "dual"
    residual: ClassVar[None] = None
    rows: Rows
    displacement: Float[Tensor, " p"]
    ridge: float
    kernel: Float[Tensor, "rows rows"]
    inverse: Float[Tensor, "rows rows"]
    coefficients: Float[Tensor, " rows"]

    @classmethod
    def of(
        cls,
        rows: Rows,
        displacement: Float[Tensor, " p"],
        ridge: float,
        kernel: Float[Tensor, "rows rows"] | None = None,
    ) -> "DualSolution":
        """Solve for the set whose ``rows`` are given, and its ``kernel`` where that is known already."""
        kernel = rows.kernel() if kernel is None else kernel
        inverse = ridge_inverse(kernel, ridge)
        return cls(rows, displacement, ridge, kernel, inverse, inverse @ targets(rows, displacement))

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the ridge, by name."""
        jacobian = {f"rows.{field.name}": getattr(self.rows.jacobian, field.name) for field in fields(Jacobian)}
        own = {name: getattr(self, name) for name in ("displacement", "kernel", "inverse", "coefficients")}
        return {**jacobian, "rows.residual": self.rows.residual, **own}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], ridge: float) -> "DualSolution":
        """The reverse of ``tensors``."""
        jacobian = Jacobian(*(tensors[f"rows.{field.name}"] for field in fields(Jacobian)))
        rows = Rows(jacobian, tensors["rows.residual"])
        return cls(rows, tensors["displacement"], ridge, tensors["kernel"], tensors["inverse"], tensors["coefficients"])

    @property
    def step(self) -> Float[Tensor, " p"]:
        """``s(S)``."""
        return self.rows.jacobian.rmatvec(self.coefficients.view_as(self.rows.residual)) - self.displacement

    def removal(self, positions: Int[Tensor, " samples"], rows: RowsOf) -> Removal:
        """What taking the samples at ``positions`` out of S would change, changing nothing."""
        gone = self._rows(positions)
        columns = self.inverse[:, gone]
        factor = torch.linalg.cholesky(columns[gone])
        weights = columns @ torch.cholesky_solve(self.coefficients[gone, None], factor)[:, 0]
        change = -self.rows.jacobian.rmatvec(weights.view_as(self.rows.residual))
        return Removal(change, positions, None, (weights, columns, factor))

    def remove_(self, removal: Removal) -> None:
        """Take the samples of a ``removal`` out of S, in place."""
        weights, columns, factor = removal.low_rank
        rows = self._rows(removal.positions)
        add_product_(self.inverse, columns, torch.cholesky_solve(columns.T, factor).T, sign=-1)
        mirror_(self.inverse)
        self.coefficients -= weights
        self.coefficients[rows] = 0
        for square in (self.inverse, self.kernel):
            square[rows] = 0
            square[:, rows] = 0
        for stored in (self.rows.jacobian.rest, self.rows.jacobian.features, self.rows.residual):
            stored[removal.positions] = 0

    def _rows(self, positions: Tensor) -> Tensor:
        """The rows of the kernel that belong to the samples at ``positions``."""
        classes = self.rows.residual.shape[1]
        first = positions.to(self.inverse.device)[:, None] * classes
        return (first + torch.arange(classes, device=first.device)).flatten()

    def resolve(
        self, positions: Int[Tensor, " samples"], rows: RowsOf, displacement: Float[Tensor, " p"], ridge: float
    ) -> Float[Tensor, " p"]:
        """``s(S - F)`` for any displacement and ridge: conjugate gradients on the kernel, preconditioned by ``A``."""
        _, columns, factor = self.removal(positions, rows).low_rank
        gone = self._rows(positions)

        def apply(v: Tensor) -> Tensor:
            return (self.kernel @ v + ridge * v).index_fill_(0, gone, 0)

        def precondition(v: Tensor) -> Tensor:
            return self.inverse @ v - columns @ torch.cholesky_solve((columns.T @ v)[:, None], factor)[:, 0]

        target = targets(self.rows, displacement).index_fill_(0, gone, 0)
        coefficients = conjugate_gradients(apply, target, precondition)
        return self.rows.jacobian.rmatvec(coefficients.view_as(self.rows.residual)) - displacement
