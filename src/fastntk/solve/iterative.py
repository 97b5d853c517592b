"""The step where neither a p x p nor an nC x nC matrix fits: conjugate gradients on products with the Jacobians.

One product ``G v = sum_i J_i'(J_i v)`` is a pass over the samples in forward mode and back, and forms no Jacobian.
Preparing spends ``STEPS`` passes on a Krylov space Q of G at ``b + G u``, with ``T = Q'G Q``. That space gives the
ridge, a first ``s(D)``, and the preconditioner of every later solve, the Nystrom approximation of G in it:

    (G + ridge I)^-1  ~  Q (T + ridge I)^-1 Q' + (I - Q Q') / ridge.

A request then takes passes over the retained samples, as many as its residual needs; this form alone reads them again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.common import distributed
from fastntk.jacobians.linearised import Linearised
from fastntk.solve.linalg import conjugate_gradients, lanczos
from fastntk.solve.ridge import Calibration, closest_outputs
from fastntk.solve.solution import Update

STEPS = 40
"""Passes for the Krylov space, and vectors of length p that it keeps."""

TOLERANCE = 1e-4
"""The relative residual that every solve reaches: a float32 network's products are not good for much less than 1e-6."""


@dataclass(frozen=True)
class GramOperator:
    """``v -> G v`` over some samples, whose ids are shared out among the processes."""

    linearised: Linearised
    ids: Sequence[int]

    @property
    def _mine(self) -> Sequence[int]:
        return self.ids[distributed.rank() :: distributed.size()]

    def matvec(self, vector: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """``G v``, in the dtype of the vector."""
        return self._total(self.linearised.gram(self._mine, vector)).to(vector)

    def rhs(self, step: Float[Tensor, " p"] | None = None) -> Float[Tensor, " p"]:
        """``sum J_i'(r_i - H_i J_i d)`` for a ``step`` d; by default ``b``."""
        pairs = self.linearised.residual(self._mine)
        if step is not None:
            moved = self.linearised.tangent_of
            pairs = ((x, r - self.linearised.curve(x, moved(x, step)).to(r)) for x, r in pairs)
        return self._total(self.linearised.pull(pairs))

    def trace(self, seed: int = 0) -> float:
        """An unbiased estimate of ``tr G``: the mean square of ``J'L a`` over random signs a, one draw a batch."""
        generator = torch.Generator().manual_seed(seed)
        total = torch.zeros((), dtype=torch.float64, device=self.linearised.device)
        for x, r in self.linearised.residual(self._mine):
            signs = torch.randint(2, r.shape, generator=generator).to(r) * 2 - 1
            total += self.linearised.pull([(x, self.linearised.lift(x, signs))]).square().sum()
        return float(self._total(total))

    def after(self, ids: Int[Tensor, " some"], sign: int) -> "GramOperator":
        """The operator with more samples (``sign`` 1), or without some of its own (-1)."""
        if sign > 0:
            return replace(self, ids=[*self.ids, *ids.tolist()])
        gone = set(ids.tolist())
        return replace(self, ids=[i for i in self.ids if i not in gone])

    def over(self, ids: Int[Tensor, " some"]) -> "GramOperator":
        """The operator over other samples of the same network."""
        return replace(self, ids=ids.tolist())

    @staticmethod
    def _total(tensor: Tensor) -> Tensor:
        distributed.sum_([tensor])
        return tensor


def _shifted(matrix: Float[Tensor, "m m"], shift: float) -> Float[Tensor, "m m"]:
    """``matrix + shift I``."""
    return matrix + shift * torch.eye(len(matrix)).to(matrix)


@dataclass
class MatrixFreeSolution:
    """``s(S)`` for a set S that samples leave, and what speeds up the solves to come.

    Attributes:
        operator: products with ``G_S``.
        displacement: ``u``.
        ridge: a total.
        basis: Q, of all samples that were prepared.
        projected: T.
        step: ``s(S)``.
        reached: the relative residual of the latest solve.
    """

    form: ClassVar[Literal["matrix-free"]] = "matrix-free"
    limit: ClassVar[float] = TOLERANCE
    operator: GramOperator
    displacement: Float[Tensor, " p"]
    ridge: float
    basis: Float[Tensor, "p m"]
    projected: Float[Tensor, "m m"]
    step: Float[Tensor, " p"]
    reached: float

    @classmethod
    def of(
        cls, operator: GramOperator, displacement: Float[Tensor, " p"], ridge: float | None, dtype: torch.dtype
    ) -> tuple["MatrixFreeSolution", Calibration | None]:
        """Solve for all samples of the operator, at a ridge that is given or (None) found.

        ``dtype`` is that of the basis; its vectors need no more digits than the network has.
        """
        rhs, image = operator.rhs(), operator.matvec(displacement)
        start = (rhs + image).to(dtype)
        basis, projected = lanczos(operator.matvec, start, STEPS)
        projected, calibration = projected.double(), None
        coefficients = (basis.T @ start).double()
        if ridge is None:
            scale = operator.trace() / (len(operator.ids) * operator.linearised.classes)
            cross = (basis.T @ image.to(dtype)).double()
            calibration = closest_outputs(projected, coefficients, cross, displacement @ image, 1, scale)
            ridge = calibration.ridge
        shifted = _shifted(projected, ridge)
        first = basis.double() @ torch.linalg.solve(shifted, coefficients) - displacement
        solution = cls(operator, displacement, ridge, basis, projected, first, float("inf"))
        solution.step, solution.reached = solution._solve(operator, rhs - ridge * displacement, ridge, first)
        return solution, calibration

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the ridge and the operator, by name."""
        own = {name: getattr(self, name) for name in ("displacement", "basis", "projected", "step")}
        return {**own, "reached": torch.tensor(self.reached, dtype=torch.float64)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], ridge: float, operator: GramOperator) -> "MatrixFreeSolution":
        """The reverse of ``tensors``."""
        basis, projected, step = (tensors[name] for name in ("basis", "projected", "step"))
        return cls(operator, tensors["displacement"], ridge, basis, projected, step, float(tensors["reached"]))

    def _solve(
        self, operator: GramOperator, rhs: Tensor, ridge: float, first: Tensor | None = None
    ) -> tuple[Float[Tensor, " p"], float]:
        """``(G + ridge I)^-1 rhs`` over the operator's samples, and the relative residual that it has."""
        inner = _shifted(torch.linalg.inv(_shifted(self.projected, ridge)), -1 / ridge)

        def apply(vector: Tensor) -> Tensor:
            return operator.matvec(vector) + ridge * vector

        def precondition(vector: Tensor) -> Tensor:
            inside = (self.basis.T @ vector.to(self.basis)).double()
            return vector / ridge + (self.basis @ (inner @ inside).to(self.basis)).to(vector)

        start = torch.zeros_like(rhs) if first is None else first
        left = rhs if first is None else rhs - apply(first)
        enough = TOLERANCE * float(rhs.norm())
        if float(left.norm()) > enough:
            start = start + conjugate_gradients(apply, left, precondition, enough / float(left.norm()))
            left = rhs - apply(start)
        return start, float(left.norm() / rhs.norm())

    def update(self, positions: Int[Tensor, " samples"], rows: object, sign: int) -> Update:
        """What adding the samples at ``positions`` to S (``sign`` 1), or taking them out (-1), would change:
        ``(G_{S+-F} + ridge I)^-1`` of ``+-J_F'(r_F - J_F s(S))``."""
        error = self.operator.over(positions).rhs(self.step)
        change, residual = self._solve(self.operator.after(positions, sign), sign * error, self.ridge)
        return Update(change, positions, sign, reached=residual)

    def apply_(self, update: Update) -> None:
        """Add the samples of an ``update`` to S, or take them out, in place."""
        self.operator = self.operator.after(update.positions, update.sign)
        self.step = self.step + update.change
        self.reached = cast(float, update.reached)

    def residual(self, update: Update | None = None) -> float:
        """The relative residual of the latest solve, or of an ``update``'s."""
        return self.reached if update is None else cast(float, update.reached)

    def anew(self) -> "MatrixFreeSolution":
        """Solved anew over the samples that are left."""
        rhs = self.operator.rhs() - self.ridge * self.displacement
        step, reached = self._solve(self.operator, rhs, self.ridge)
        return replace(self, step=step, reached=reached)

    def resolve(
        self, positions: Int[Tensor, " samples"], rows: object, displacement: Float[Tensor, " p"], ridge: float
    ) -> Float[Tensor, " p"]:
        """``s(S - F)`` for any displacement and ridge, solved anew."""
        operator = self.operator.after(positions, -1)
        return self._solve(operator, operator.rhs() - ridge * displacement, ridge)[0]
