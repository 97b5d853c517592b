"""The step in its dual form, nC x nC, whose size depends little on the number of parameters.

    s(S) = J_S' a - u,     a = (J_S J_S' + ridge I)^-1 (r_S + J_S u).

It is the convex form's problem (``convex``) with squared loss and the rows of all classes: one linear system, whose
solution after a request is found from the one before by conjugate gradients, preconditioned by the kernel's Cholesky
factor. For a loss with another Hessian than the identity, rows are ``L_i'J_i`` and residuals ``L_i^+ r_i``, at
``theta*``: one step of Gauss-Newton.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.jacobians.layout import Layout
from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.rows import Point, Rows
from fastntk.solve.convex import Convex, prepared
from fastntk.solve.head import head_shortfall
from fastntk.solve.prices import ONE_STEP, Price, Timing, Workload, passes
from fastntk.solve.ridge import STORED, USUAL, calibrate_stored
from fastntk.solve.solution import Solved, Task, Update
from fastntk.solve.speeds import Speeds
from fastntk.tuning.loss import Kept
from fastntk.tuning.losses import SquaredLoss


@dataclass(frozen=True)
class Dual(Convex):
    """``a`` and the rows of a set S that samples leave and join."""

    name: ClassVar[str] = "dual"
    likeliest: ClassVar[bool] = False
    limit: ClassVar[float] = 1e-9
    tolerance: ClassVar[float] = 1e-11

    @classmethod
    def price(cls, work: Workload) -> Price:
        """The nC x nC kernel, float64, its factor and in passing three more such, float32; the n Jacobians; a
        batch. ``(nC)^2 rest`` and ``(nC)^3 / 3`` operations."""
        work = work.written
        stored = work.itemsize * (work.rows * work.rest + work.samples * work.features)
        operations = float(work.rows) ** 2 * work.rest + float(work.rows) ** 3 / 3
        looked_at = work.itemsize * STORED * work.rest if work.rows > STORED else 0
        size = max((8 + 4 * 4) * work.rows**2, looked_at) + stored + work.batch_bytes
        drawback, rank = (ONE_STEP, 2) if work.curved else ("", 0)
        return Price(cls.name, size, operations, work.one_step, drawback, rank=rank)

    @classmethod
    def timing(cls, work: Workload, speeds: Speeds) -> Timing:
        """Of the Jacobians and the choice of the ridge, and of what the first request waits for."""
        work = work.written
        jacobians = passes(work, 1, speeds.rows(work.outputs), "Jacobians")
        few = min(work.samples, STORED // work.outputs + 1)
        ridge = USUAL * few * speeds.read(work.outputs, speeds.network.dtype)
        kernel = work.rest * float(work.rows) ** 2 / speeds.rate(work.rows, work.outputs)
        first = {"kernel": kernel, "solve": speeds.factor(work.rows)}
        return Timing({**jacobians.seconds, "ridge": ridge}, jacobians.operations, first)

    @classmethod
    def prepare(cls, task: Task) -> Solved:
        """One pass that keeps the Jacobians, and the ridge."""
        return prepared(cls, task, SquaredLoss(), lambda rows, _, u: calibrate_stored(rows, u))

    @staticmethod
    def point_of(rows: Rows) -> Point:
        """``|z|^2 / 2`` at ``z = -r``: what the rows add to is the residuals."""
        zero = torch.zeros_like(rows.residual, dtype=torch.float64)
        none = zero[:, 0]
        return Point(-rows.residual.double(), Kept(zero, none, none, none))

    def replayed(
        self,
        network: Linearised,
        positions: Int[Tensor, " samples"],
        sign: int,
        rows: Rows | None,
        tensors: Mapping[str, Tensor],
    ) -> Update:
        """With the coefficients that were found, or, where a journal of before has none, found now."""
        if "reached" not in tensors:
            return self.update(network, positions, sign, rows)
        return super().replayed(network, positions, sign, rows, tensors)

    def head_shortfall(self, layout: Layout) -> Float[Tensor, "classes features"]:
        """From the rows."""
        self.ownership.check()
        features = self.rows.jacobian.features.double()
        moment = self.rows.residual.double().T @ features
        return head_shortfall(features.T @ features, moment, layout.head_of(self.displacement), self.ridge)
