"""What the linearised model says of a sample when it has not seen it, without solving anew for each."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.jacobians.jacobian import Operator
from fastntk.jacobians.rows import Rows
from fastntk.solve.linalg import factor_
from fastntk.solve.newton import DualProblem, across, curvature


@dataclass(frozen=True)
class Hessian:
    """Of the convex objective at its optimum, in float64: ``H = ridge I + sum_i J_i'L_i L_i'J_i`` by its rows.

    Attributes:
        problem: whose objective it is.
        root: L.
        lower: the Cholesky factor of ``ridge I + L'K L``.
        gradient: l'.
    """

    problem: DualProblem
    root: Float[Tensor, "samples outputs outputs"]
    lower: Float[Tensor, "rows rows"]
    gradient: Float[Tensor, "samples outputs"]

    @classmethod
    def of(cls, problem: DualProblem, a: Float[Tensor, " rows"]) -> "Hessian":
        """At an optimum's coefficients."""
        z = problem.logits(a)
        root = problem.root(z)
        lower = factor_(curvature(problem.kernel, root, problem.ridge))
        return cls(problem, root, lower, problem.loss.gradient_of(z, problem.kept))

    def inverse(self, jacobian: Operator, v: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """``H^-1 v = (v - J'L (ridge I + L'K L)^-1 L'J v) / ridge``, with the J of the rows."""
        inside = across(self.root, jacobian.matvec(v).to(self.root).flatten(), transposed=True)
        inside = torch.cholesky_solve(inside[:, None], self.lower)[:, 0]
        return (v - jacobian.rmatvec(across(self.root, inside).view(self.root.shape[:2])).to(v)) / self.problem.ridge

    def left_out(self, own: Rows, positions: Int[Tensor, " some"]) -> Float[Tensor, "some outputs"]:
        """How the logits of each of some samples change when it leaves, by one step of Newton's method: ``M (I - W
        M)^-1 l'`` with ``W = L L'`` and ``M = J_i H^-1 J_i'``.

        Args:
            own: their rows.
            positions: where they are among all.
        """
        root, problem, jacobian, count = self.root, self.problem, own.jacobian, self.root.shape[1]
        between = problem.kernel[own.places(positions)].view(len(own), count, len(root), count)
        block = between[torch.arange(len(own)), :, positions]
        across = torch.einsum("sknb,nba->skna", between, root).flatten(2)
        half = torch.linalg.solve_triangular(self.lower, across.flatten(0, 1).mT, upper=False).mT.view_as(across)
        middle = (block - half @ half.mT) / problem.ridge
        weight = root[positions] @ root[positions].mT
        left = torch.eye(count).to(middle) - weight @ middle
        change = middle @ torch.linalg.solve(left, self.gradient[positions][:, :, None])
        return (jacobian.combined().to(change) @ change)[:, :, 0] if jacobian.kept is not None else change[..., 0]
