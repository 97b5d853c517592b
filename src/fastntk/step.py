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
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.jacobian import Jacobian
from fastntk.linalg import add_product_, cholesky, conjugate_gradients, ridge_inverse
from fastntk.statistics import Rows, Sums


def primal_step(sums: Sums, displacement: Float[Tensor, " p"], ridge: float) -> Float[Tensor, " p"]:
    """``s(S) = (G_S + ridge I)^-1 (b_S - ridge u)`` with ``displacement`` u (zeros: Golatkar's step)."""
    rhs = sums.rhs - ridge * displacement
    return torch.cholesky_solve(rhs[:, None], cholesky(sums.gram(), ridge))[:, 0]


def dual_step(
    rows: Rows, displacement: Float[Tensor, " p"], ridge: float, kernel: Float[Tensor, "rows rows"] | None = None
) -> Float[Tensor, " p"]:
    """``s(S) = J_S' (K_S + ridge I)^-1 (r_S + J_S u) - u``; ``kernel`` is ``K_S`` where it is known already."""
    kernel = rows.kernel() if kernel is None else kernel
    target = targets(rows, displacement)
    coefficients = torch.cholesky_solve(target[:, None], cholesky(kernel, ridge))[:, 0]
    return rows.jacobian.rmatvec(coefficients.view_as(rows.residual)) - displacement


def targets(rows: Rows, displacement: Float[Tensor, " p"]) -> Float[Tensor, " rows"]:
    """``r_S + J_S u``, what the linearised model must add to its value at ``theta_0``."""
    return (rows.residual.double() + rows.jacobian.matvec(displacement)).flatten()


@dataclass
class PrimalSolution:
    """``B`` and ``s(S)`` for a set S that samples leave; the size does not depend on S.

    Attributes:
        sums: of S.
        displacement: ``u``.
        ridge: a total.
        inverse: ``B = (G_S + ridge I)^-1``.
        step: ``s(S)``.
    """

    form: ClassVar[Literal["primal"]] = "primal"
    sums: Sums
    displacement: Float[Tensor, " p"]
    ridge: float
    inverse: Float[Tensor, "p p"]
    step: Float[Tensor, " p"]

    @classmethod
    def of(cls, sums: Sums, displacement: Float[Tensor, " p"], ridge: float) -> "PrimalSolution":
        """Solve for the set that ``sums`` are over."""
        inverse = ridge_inverse(sums.gram(), ridge)
        return cls(sums, displacement, ridge, inverse, inverse @ (sums.rhs - ridge * displacement))

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the ridge, by name."""
        sums = {f"sums.{field.name}": getattr(self.sums, field.name) for field in fields(Sums)}
        return {**sums, "displacement": self.displacement, "inverse": self.inverse, "step": self.step}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], ridge: float) -> "PrimalSolution":
        """The reverse of ``tensors``."""
        sums = Sums(*(tensors[f"sums.{field.name}"] for field in fields(Sums)))
        return cls(sums, tensors["displacement"], ridge, tensors["inverse"], tensors["step"])

    def difference(self, forgotten: Rows, positions: Int[Tensor, " samples"]) -> Float[Tensor, " p"]:
        """``s(S - F) - s(S)`` for the samples F, changing nothing."""
        return self._leave_out(forgotten)[0]

    def leave(self, forgotten: Rows, positions: Int[Tensor, " samples"]) -> Float[Tensor, " p"]:
        """Take the samples F out of S, in place; returns ``s(S - F) - s(S)``."""
        change, lifted, factor = self._leave_out(forgotten)
        add_product_(self.inverse, lifted, torch.cholesky_solve(lifted.T, factor).T)
        self.step += change
        self.sums = self.sums - Sums.of(forgotten.jacobian, forgotten.residual)
        return change

    def _leave_out(self, forgotten: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """The change of the step, ``B J_F'``, and the Cholesky factor of ``I - J_F B J_F'``."""
        jacobian = forgotten.jacobian.dense().flatten(0, 1).double()
        lifted = self.inverse @ jacobian.T
        factor = torch.linalg.cholesky(torch.eye(len(jacobian)).to(jacobian) - jacobian @ lifted)
        error = (forgotten.residual.double() - forgotten.jacobian.matvec(self.step)).flatten()
        return -lifted @ torch.cholesky_solve(error[:, None], factor)[:, 0], lifted, factor

    def resolve(
        self, forgotten: Rows, positions: Int[Tensor, " samples"], displacement: Float[Tensor, " p"], ridge: float
    ) -> Float[Tensor, " p"]:
        """``s(S - F)`` for any displacement and ridge: conjugate gradients on the sums, preconditioned by ``B``."""
        _, lifted, factor = self._leave_out(forgotten)
        jacobian = forgotten.jacobian

        def apply(v: Tensor) -> Tensor:
            return self.sums.matvec(v) + ridge * v - jacobian.rmatvec(jacobian.matvec(v))

        def precondition(v: Tensor) -> Tensor:
            return self.inverse @ v + lifted @ torch.cholesky_solve((lifted.T @ v)[:, None], factor)[:, 0]

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

    def difference(self, forgotten: Rows, positions: Int[Tensor, " samples"]) -> Float[Tensor, " p"]:
        """``s(S - F) - s(S)`` for the samples F at ``positions`` of S, changing nothing."""
        return self._leave_out(positions)[0]

    def leave(self, forgotten: Rows, positions: Int[Tensor, " samples"]) -> Float[Tensor, " p"]:
        """Take the samples F out of S, in place; returns ``s(S - F) - s(S)``."""
        change, weights, columns, factor = self._leave_out(positions)
        rows = self._rows(positions)
        add_product_(self.inverse, columns, torch.cholesky_solve(columns.T, factor).T, sign=-1)
        self.coefficients -= weights
        self.coefficients[rows] = 0
        for square in (self.inverse, self.kernel):
            square[rows] = 0
            square[:, rows] = 0
        for stored in (
            self.rows.jacobian.rest,
            self.rows.jacobian.features,
            self.rows.jacobian.logits,
            self.rows.residual,
        ):
            stored[positions] = 0
        return change

    def _rows(self, positions: Tensor) -> Tensor:
        """The rows of the kernel that belong to the samples at ``positions``."""
        classes = self.rows.residual.shape[1]
        first = positions.to(self.inverse.device)[:, None] * classes
        return (first + torch.arange(classes, device=first.device)).flatten()

    def _leave_out(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The change of the step and of ``a``, ``A_SF``, and the Cholesky factor of ``A_FF``."""
        rows = self._rows(positions)
        columns = self.inverse[:, rows]
        factor = torch.linalg.cholesky(columns[rows])
        weights = columns @ torch.cholesky_solve(self.coefficients[rows, None], factor)[:, 0]
        return -self.rows.jacobian.rmatvec(weights.view_as(self.rows.residual)), weights, columns, factor

    def resolve(
        self, forgotten: Rows, positions: Int[Tensor, " samples"], displacement: Float[Tensor, " p"], ridge: float
    ) -> Float[Tensor, " p"]:
        """``s(S - F)`` for any displacement and ridge: conjugate gradients on the kernel, preconditioned by ``A``."""
        _, _, columns, factor = self._leave_out(positions)
        rows = self._rows(positions)

        def apply(v: Tensor) -> Tensor:
            return (self.kernel @ v + ridge * v).index_fill_(0, rows, 0)

        def precondition(v: Tensor) -> Tensor:
            return self.inverse @ v - columns @ torch.cholesky_solve((columns.T @ v)[:, None], factor)[:, 0]

        target = targets(self.rows, displacement).index_fill_(0, rows, 0)
        coefficients = conjugate_gradients(apply, target, precondition)
        return self.rows.jacobian.rmatvec(coefficients.view_as(self.rows.residual)) - displacement


Solution = PrimalSolution | DualSolution
