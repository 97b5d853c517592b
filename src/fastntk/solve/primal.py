"""The step in its primal form, p x p, whose size does not depend on the number of samples.

``s(S) = (G_S + ridge I)^-1 (b_S - ridge u)``. With ``B = (G_D + ridge I)^-1`` the forgotten samples alone give

    s(R) - s(D) = -B J_F' (I - J_F B J_F')^-1 (r_F - J_F s(D)).

``(I - J_F B J_F')^-1 (r_F - J_F s(D))`` is the error that the linearised model makes on F when it has not seen F.
Adding samples is the same with the other sign.
"""

from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.common.progress import busy
from fastntk.jacobians.layout import Layout
from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.rows import Rows
from fastntk.solve.collect import Checkpoint, collect_sums, key, solved_once
from fastntk.solve.head import head_shortfall
from fastntk.solve.linalg import (
    add_product_,
    conjugate_gradients,
    factorised,
    invert_,
    mirror_,
    relative,
    ridge_inverse,
    shifted,
)
from fastntk.solve.prices import Price, Timing, Workload, direct
from fastntk.solve.ridge import calibrate
from fastntk.solve.solution import Ownership, Solved, Task, Update
from fastntk.solve.speeds import Speeds
from fastntk.solve.sums import ROWS, Sums


@dataclass(frozen=True)
class Primal:
    """``B = (G_S + ridge I)^-1`` and ``s(S)`` for a set S that samples leave and join.

    G consists of blocks: R (rest), X_c (rest by the head's inputs, one a class) and ``I_C (x) H`` (head). B is kept as
    the inverses of ``H + ridge I`` and of the Schur complement ``R + ridge I - sum_c X_c (H + ridge I)^-1 X_c'``, which
    is B's own block for the rest. So the head's C^2 blocks are never written out, and products with B go through X_c.

    Attributes:
        sums: of S; the next solution takes them over.
        displacement: ``u``.
        ridge: a total.
        inverse: of the Schur complement; the next solution takes it over.
        head_inverse: ``(H + ridge I)^-1``.
        step: ``s(S)``.
        over: the positions of S.
        ownership: of what the next solution takes over.
    """

    name: ClassVar[str] = "primal"
    sums: Sums
    displacement: Float[Tensor, " p"]
    ridge: float
    inverse: Float[Tensor, "rest rest"]
    head_inverse: Float[Tensor, "features features"]
    step: Float[Tensor, " p"]
    over: Int[Tensor, " samples"]
    ownership: Ownership = field(default_factory=Ownership, compare=False, repr=False)

    @classmethod
    def of(cls, sums: Sums, displacement: Float[Tensor, " p"], ridge: float, over: Int[Tensor, " samples"]) -> "Primal":
        """Solve for the set that ``sums`` are over."""
        head_inverse = ridge_inverse(sums.head, ridge)
        inverse = shifted(sums.rest, ridge)
        for block in sums.cross if head_inverse.numel() else ():
            add_product_(inverse, block @ head_inverse, block, -1)
        start = torch.zeros_like(displacement)
        solution = cls(sums, displacement, ridge, invert_(inverse), head_inverse, start, over)
        for _ in range(2):  # the second time takes off the rounding of the first
            left = _rhs(solution) - solution._apply(solution.step)
            solution = replace(solution, step=solution.step + solution.solve(left))
        return solution

    @classmethod
    def price(cls, work: Workload) -> Price:
        """R, the inverse of its Schur complement and half of such a matrix in passing; the head's blocks twice; a block
        of rows; a batch. ``nC rest^2`` operations for the sums (half of all by symmetry, two each), ``C features
        rest^2`` for the Schur complement and ``rest^3`` for its inverse."""
        work = work.written
        square = float(work.rest) ** 2
        cross = work.outputs * work.rest * work.features + work.rest * work.features
        block = (ROWS + work.batch_size * work.outputs) * work.rest
        collecting = work.rest**2 * work.sums_itemsize + block * (2 * work.itemsize + work.sums_itemsize)
        solving = int(2.5 * work.rest**2) * work.sums_itemsize
        return Price(
            cls.name,
            max(collecting + work.batch_bytes, solving) + cross * work.sums_itemsize,
            work.rows * square + work.outputs * work.features * square + float(work.rest) ** 3,
            refusal=work.one_step,
            rank=2 * work.curved,
            remedy="float32 sums take half the memory of float64 ones" if work.sums_itemsize == 8 else "",
        )

    @classmethod
    def timing(cls, work: Workload, speeds: Speeds) -> Timing:
        """Of the Jacobians, the sums, the choice of the ridge, and the solve with the head's blocks."""
        work = work.written
        return direct(work, speeds, work.rest, work.rows, "sums", work.outputs * work.features)

    @classmethod
    def prepare(cls, task: Task) -> Solved:
        """One pass, in shards, that goes on from what an earlier one left in the checkpoint; then the solve."""
        network, everyone = task.network, torch.arange(task.count)
        place = task.checkpoint
        partial = Checkpoint(place, key(network, task.count)) if place else None
        with closing(partial) if partial else nullcontext():
            sums, residuals = collect_sums(network, task.count, partial)

            def solved() -> Solved:
                with busy("choosing the ridge, solving"):
                    found = calibrate(sums, task.displacement) if task.ridge is None else None
                    ridge = found.ridge if found else cast(float, task.ridge)
                    return Solved(cls.of(sums, task.displacement, ridge, everyone), residuals, found)

            done = solved_once(solved, cls.restore, residuals)
            if partial:
                partial.clear()
        return done

    @classmethod
    def adapted(cls, network: Linearised, keep: int) -> Linearised:
        """With all rows."""
        return network

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the ridge, by name."""
        self.ownership.check()
        sums = {f"sums.{field.name}": getattr(self.sums, field.name) for field in fields(Sums)}
        own = ("displacement", "inverse", "head_inverse", "step", "over")
        return {**sums, **{name: getattr(self, name) for name in own}}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], ridge: float) -> "Primal":
        """The reverse of ``tensors``."""
        sums = Sums(*(tensors[f"sums.{field.name}"] for field in fields(Sums)))
        inverse, head_inverse, step = (tensors[name] for name in ("inverse", "head_inverse", "step"))
        return cls(sums, tensors["displacement"], ridge, inverse, head_inverse, step, tensors["over"].cpu())

    def _apply(self, vector: Tensor) -> Tensor:
        """``(G + ridge I) v``."""
        return self.sums.matvec(vector) + self.ridge * vector

    def solve(self, vector: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """``B v``, in the dtype of the vector."""
        self.ownership.check()
        classes, rest, features = self.sums.cross.shape
        v = vector.to(self.inverse.dtype)
        head = v[rest:].view(classes, features) @ self.head_inverse
        upper = self.inverse @ (v[:rest] - self.sums.across(head))
        head = head - self.sums.down(upper) @ self.head_inverse
        return torch.cat([upper, head.flatten()]).to(vector.dtype)

    @property
    def limit(self) -> float:
        """By the dtype of the inverse."""
        return 1e-9 if self.inverse.dtype == torch.float64 else 1e-4

    def reads(self, sign: int) -> bool:
        """The rows are needed either way."""
        return True

    def update(
        self, network: Linearised, positions: Int[Tensor, " samples"], sign: int, rows: Rows | None = None
    ) -> Update:
        """By Woodbury's identity, from the rows.

        ``low_rank``: the rest's rows of ``B J_F'``, ``(H + ridge I)^-1 h_i`` of every sample, and the Cholesky factor
        of ``I + sign J_F B J_F'``.
        """
        self.ownership.check()
        these = cast(Rows, rows)
        h, solved, reduced, upper = self._projected(these)
        core = reduced.T @ upper + torch.kron(h @ solved, torch.eye(len(self.sums.cross)).to(h))
        factor = factorised(shifted(sign * core, 1.0))
        weights = torch.cholesky_solve(these.error(self.step)[:, None].to(factor), factor)[:, 0]
        return Update(sign * _lifted(self, upper, solved, weights), positions, sign, these, (upper, solved, factor))

    def _projected(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The head's inputs h, ``(H + ridge I)^-1 h'``, and the rest's rows of J' less what the head takes up of them,
        before and after the inverse; one column a sample and class."""
        j, h = (part.to(self.inverse.dtype) for part in (rows.jacobian.rest, rows.jacobian.features))
        solved = self.head_inverse @ h.T
        reduced = (j.permute(2, 0, 1) - (self.sums.cross @ solved).permute(1, 2, 0)).flatten(1)
        return h, solved, reduced, self.inverse @ reduced

    def alone(self, network: Linearised, positions: Int[Tensor, " samples"]) -> Float[Tensor, "samples outputs"]:
        """``-M_i (I - M_i)^-1 (r_i - J_i s(S))`` with ``M_i = J_i B J_i'``, for each sample i."""
        self.ownership.check()
        these = network.rows(positions.tolist())
        h, solved, reduced, upper = self._projected(these)
        samples, classes = these.residual.shape
        blocks = [each.view(-1, samples, classes).permute(1, 2, 0) for each in (reduced, upper)]
        eye = torch.eye(classes).to(h)
        leverage = blocks[0] @ blocks[1].mT + (h * solved.T).sum(1)[:, None, None] * eye
        error = these.error(self.step).view(samples, classes, 1).to(h)
        return -(leverage @ torch.linalg.solve(eye - leverage, error))[..., 0]

    def replayed(
        self,
        network: Linearised,
        positions: Int[Tensor, " samples"],
        sign: int,
        rows: Rows | None,
        tensors: Mapping[str, Tensor],
    ) -> Update:
        """From the rows, as before."""
        return self.update(network, positions, sign, rows)

    def apply(self, update: Update) -> "Primal":
        """The inverse by Woodbury's identity, the head's own from its sums."""
        self.ownership.give_up()
        (upper, _, factor), rows = update.low_rank, cast(Rows, update.rows)
        add_product_(self.inverse, upper, torch.cholesky_solve(upper.T, factor).T, -update.sign)
        mirror_(self.inverse)
        self.sums.observe_(rows.jacobian, rows.residual, update.sign).complete_()
        head_inverse, step = ridge_inverse(self.sums.head, self.ridge), self.step + update.change
        over = update.changes(self.over)
        return replace(self, head_inverse=head_inverse, step=step, over=over, ownership=Ownership())

    def inexactness(self, update: Update | None = None) -> float:
        """Of the normal equations as they stand in the contract."""
        self.ownership.check()
        if update is None:
            return relative(_rhs(self) - self._apply(self.step), _rhs(self))
        rows, step = cast(Rows, update.rows), self.step + update.change
        jacobian = rows.jacobian.to(torch.float64)
        error = rows.error(step).view_as(rows.residual)
        left = _rhs(self) - self._apply(step) + update.sign * jacobian.rmatvec(error)
        return relative(left, _rhs(self) + update.sign * jacobian.rmatvec(rows.residual.double()))

    def anew(self, network: Linearised) -> "Primal":
        """From the sums."""
        self.ownership.check()
        fresh = Primal.of(self.sums, self.displacement, self.ridge, self.over)
        return replace(fresh, ownership=self.ownership)  # of the same sums

    def head_shortfall(self, layout: Layout) -> Float[Tensor, "classes features"]:
        """From blocks of the sums."""
        self.ownership.check()
        gram, moment = self.sums.head.double(), layout.head_of(self.sums.rhs)
        return head_shortfall(gram, moment, layout.head_of(self.displacement), self.ridge)

    def resolve(
        self, network: Linearised, positions: Int[Tensor, " samples"], displacement: Float[Tensor, " p"], ridge: float
    ) -> Float[Tensor, " p"]:
        """By conjugate gradients on the sums, preconditioned by ``B``."""
        update = self.update(network, positions, -1, network.rows(positions.tolist()))
        upper, solved, factor = update.low_rank
        forgotten = cast(Rows, update.rows)
        jacobian = forgotten.jacobian.to(torch.float64)

        def apply(v: Tensor) -> Tensor:
            return self.sums.matvec(v) + ridge * v - jacobian.rmatvec(jacobian.matvec(v))

        def precondition(v: Tensor) -> Tensor:
            image = self.solve(v)
            weights = torch.cholesky_solve(jacobian.matvec(image).flatten()[:, None].to(factor), factor)[:, 0]
            return image + _lifted(self, upper, solved, weights)

        rhs = self.sums.rhs - jacobian.rmatvec(forgotten.residual.to(self.step)) - ridge * displacement
        return conjugate_gradients(apply, rhs, precondition)


def _rhs(solution: Primal) -> Float[Tensor, " p"]:
    """``b - ridge u``."""
    return solution.sums.rhs - solution.ridge * solution.displacement


def _lifted(solution: Primal, upper: Tensor, solved: Tensor, weights: Float[Tensor, " rows"]) -> Float[Tensor, " p"]:
    """``B J_F' w``, in float64, from parts of an update's ``low_rank``."""
    change, sums = upper @ weights, solution.sums
    own = weights.view(solved.shape[1], len(sums.cross)).T @ solved.T
    head = own - sums.down(change) @ solution.head_inverse
    return torch.cat([change, head.flatten()]).to(solution.step)
