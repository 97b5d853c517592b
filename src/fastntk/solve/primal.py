"""The step in its primal form, p x p, whose size does not depend on the number of samples.

``s(S) = (G_S + ridge I)^-1 (b_S - ridge u)``. With ``B = (G_D + ridge I)^-1`` the forgotten samples alone give

    s(R) - s(D) = -B J_F' (I - J_F B J_F')^-1 (r_F - J_F s(D)).

``(I - J_F B J_F')^-1 (r_F - J_F s(D))`` is the error that the linearised model makes on F when it has not seen F.
Adding samples is the same with the other sign. B is at hand to the digits of a float32 factor alone: with it the
formula preconditions, and every solve is finished by conjugate gradients on the sums.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import ClassVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.common import distributed
from fastntk.common.progress import busy
from fastntk.jacobians.layout import Layout
from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.rows import Rows
from fastntk.solve.collect import collect_sums, key, resumed, solved_once
from fastntk.solve.head import head_shortfall
from fastntk.solve.linalg import (
    add_product_,
    below,
    conjugated,
    factor_,
    lower_of,
    mirror_,
    regularised_factor,
    relative,
    ridge_inverse,
    square_of,
)
from fastntk.solve.prices import ONE_STEP, Price, Timing, Workload, passes
from fastntk.solve.ridge import USUAL, calibrate
from fastntk.solve.schur import Blockwise, Product, complement, factored
from fastntk.solve.solution import Ownership, Solved, Task, Update
from fastntk.solve.speeds import Speeds
from fastntk.solve.sums import ROWS, Sums

_MANY = 8  # the share of the samples that may leave or join before the factor is made anew

_STEPS = 60  # of conjugate gradients, at most

_ENOUGH = {torch.float64: 1e-12, torch.float32: 1e-6}
"""Of a right-hand side, that every solve leaves at most, by the dtype of the sums."""


@dataclass(frozen=True)
class Primal:
    """``G_S``, ``s(S)`` and nearly ``B = (G_S + ridge I)^-1`` for a set S that samples leave and join.

    G consists of blocks: R (rest), X_c (rest by the head's inputs, one a class) and ``I_C (x) H`` (head). B is kept as
    the inverse of ``H + ridge I`` and the Cholesky factor of the Schur complement
    ``R + ridge I - sum_c X_c (H + ridge I)^-1 X_c'``, whose inverse is B's own block for the rest. So the head's C^2
    blocks are never written out, and products with B go through X_c.

    Attributes:
        sums: of S; the next solution takes them over.
        displacement: ``u``.
        ridge: a total.
        schur: the lower triangle of the Schur complement, in the dtype of the sums; the next solution takes it over.
        factor: of it, lower; float32, or float64 where rounding would make it indefinite.
        made: the positions of the set that the factor was made over, which is nearly S.
        head_inverse: ``(H + ridge I)^-1``.
        step: ``s(S)``.
        over: the positions of S.
        ownership: of what the next solution takes over.
    """

    name: ClassVar[str] = "primal"
    holds: ClassVar[bool] = False
    leaves_out: ClassVar[bool] = True
    likeliest: ClassVar[bool] = False
    mapped: ClassVar[tuple[str, ...]] = ("sums.rest", "schur", "factor")
    """Which of the ``tensors`` are lower triangles, read where they lie in the folder's file."""
    sums: Sums
    displacement: Float[Tensor, " p"]
    ridge: float
    schur: Float[Tensor, "rest rest"]
    factor: Float[Tensor, "rest rest"]
    made: Int[Tensor, " some"]
    head_inverse: Float[Tensor, "features features"]
    step: Float[Tensor, " p"]
    over: Int[Tensor, " samples"]
    ownership: Ownership = field(default_factory=Ownership, compare=False, repr=False)

    @classmethod
    def of(cls, sums: Sums, displacement: Float[Tensor, " p"], ridge: float, over: Int[Tensor, " samples"]) -> "Primal":
        """Solve for the set that ``sums`` are over.

        Raises:
            InputError: they are not positive definite with the ridge.
        """
        head_inverse, start = ridge_inverse(sums.head, ridge), torch.zeros_like(displacement)
        schur = complement(sums, head_inverse, ridge)
        factor = factored(schur)
        solution = cls(sums, displacement, ridge, schur, factor, over, head_inverse, start, over)
        return replace(solution, step=_refined(solution, sums.matvec, _rhs(solution), solution.near.solve))

    @classmethod
    def price(cls, work: Workload) -> Price:
        """R, its Schur complement, that one's factor and, in passing, another such matrix; the head's blocks twice; a
        block of rows; a batch. ``nC rest^2`` operations for the sums (half of all by symmetry, two each), ``C features
        rest^2`` for the Schur complement and ``rest^3 / 3`` for its factor."""
        work = work.written
        square = float(work.rest) ** 2
        cross = work.outputs * work.rest * work.features + work.rest * work.features
        block = (ROWS + work.batch_size * work.outputs) * work.rest
        collecting = work.rest**2 * work.sums_itemsize + block * (2 * work.itemsize + work.sums_itemsize)
        solving = work.rest**2 * (2 * work.sums_itemsize + 2 * 4)
        drawback, rank = (ONE_STEP, 2) if work.curved else ("", 0)
        return Price(
            cls.name,
            max(collecting + work.batch_bytes, solving) + cross * work.sums_itemsize,
            work.rows * square + work.outputs * work.features * square + float(work.rest) ** 3 / 3,
            refusal=work.one_step,
            drawback=drawback,
            rank=rank,
            remedy="float32 sums take half the memory of float64 ones" if work.sums_itemsize == 8 else "",
        )

    @classmethod
    def timing(cls, work: Workload, speeds: Speeds) -> Timing:
        """Of the Jacobians, the sums, the choice of the ridge, and the solve with the head's blocks."""
        work = work.written
        dtype = speeds.network.numerics.dtype
        jacobians = passes(work, 1, speeds.rows(work.outputs), "Jacobians")
        square, rate = float(work.rest) ** 2, speeds.rate(work.rest, work.outputs, dtype, dtype)
        algebra = {
            "sums": work.rows * square / rate / distributed.size(),
            "ridge": USUAL * speeds.matvec(work.rest, dtype),
            "solve": speeds.factor(work.rest) + work.outputs * work.features * square / rate,
        }
        return Timing({**jacobians.seconds, **algebra}, jacobians.operations)

    @classmethod
    def prepare(cls, task: Task) -> Solved:
        """One pass, in shards, that goes on from what an earlier one left in the checkpoint; then the solve."""
        network, everyone = task.network, torch.arange(task.count)
        with resumed(task.checkpoint, lambda: key(network, task.count)) as partial:
            sums, residuals = collect_sums(network, task.count, partial)

            def solved() -> Solved:
                with busy("choosing the ridge, solving"):
                    found = calibrate(sums, task.displacement) if task.ridge is None else None
                    ridge = found.ridge if found else cast(float, task.ridge)
                    return Solved(cls.of(sums, task.displacement, ridge, everyone), residuals, found)

            return solved_once(solved, cls.restore, residuals)

    def ready(self) -> "Primal":
        """With a factor over S."""
        if torch.equal(*(each.sort().values for each in (self.made, self.over))):
            return self
        return self._made_anew

    @cached_property
    def _made_anew(self) -> "Primal":
        return replace(self, factor=regularised_factor(self.schur, torch.float32), made=self.over)

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the ridge, by name; of symmetric matrices the lower triangles, with the factor over S."""
        self.ownership.check()
        sums = {f"sums.{field.name}": getattr(self.sums, field.name) for field in fields(Sums)}
        own = ("displacement", "head_inverse", "step", "over")
        squares = zip(self.mapped, (self.sums.rest, self.schur, self.ready().factor), strict=True)
        packed = {name: lower_of(square) for name, square in squares}
        return {**sums, **{name: getattr(self, name) for name in own}, **packed}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], ridge: float) -> "Primal":
        """The reverse of ``tensors``."""
        device = tensors["displacement"].device
        rest, schur, factor = (square_of(tensors[name]).to(device) for name in cls.mapped)
        mirror_(rest)
        others = (tensors[f"sums.{field.name}"] for field in fields(Sums) if field.name != "rest")
        sums, head_inverse, step = Sums(rest, *others), tensors["head_inverse"], tensors["step"]
        over = tensors["over"].cpu()
        return cls(sums, tensors["displacement"], ridge, schur, factor, over, head_inverse, step, over)

    @property
    def near(self) -> Blockwise:
        """Nearly B."""
        self.ownership.check()
        return Blockwise(self.sums, self.head_inverse, self.factor)

    @property
    def limit(self) -> float:
        """By the dtype of the sums."""
        return 1e-9 if self.sums.rest.dtype == torch.float64 else 1e-4

    def reads(self, sign: int) -> bool:
        """The rows are needed either way."""
        return True

    def update(
        self, network: Linearised, positions: Int[Tensor, " samples"], sign: int, rows: Rows | None = None
    ) -> Update:
        """By conjugate gradients on the sums with and without the rows, preconditioned by Woodbury's identity; its
        ``low_rank`` is the head's inverse after it. Raises like ``factor_`` where there is none."""
        self.ownership.check()
        these = cast(Rows, rows)
        jacobian, near = these.jacobian.to(torch.float64), _before(self, sign).near
        apply, precondition = near.updated(these, sign)
        error = jacobian.rmatvec(these.error(self.step).view_as(these.residual))
        change = _refined(self, apply, sign * error, precondition)
        inputs = these.jacobian.features.to(self.sums.head).T
        head = add_product_(self.sums.head.clone(), inputs, inputs, sign)
        return Update(change, positions, sign, these, low_rank=(ridge_inverse(head, self.ridge),))

    def alone(self, network: Linearised, positions: Int[Tensor, " samples"]) -> Float[Tensor, "samples outputs"]:
        """``-M_i (I - M_i)^-1 (r_i - J_i s(S))`` with ``M_i = J_i B J_i'``, for each sample i."""
        self.ownership.check()
        these = network.rows(positions.tolist())
        h, solved, reduced, upper = replace(self.near, factor=self.exact_factor).projected(these)
        samples, classes = these.residual.shape
        blocks = [each.view(-1, samples, classes).permute(1, 2, 0) for each in (reduced, upper)]
        eye = torch.eye(classes).to(h)
        leverage = blocks[0] @ blocks[1].mT + (h * solved.T).sum(1)[:, None, None] * eye
        error = these.error(self.step).view(samples, classes, 1).to(h)
        return -(leverage @ torch.linalg.solve(eye - leverage, error))[..., 0]

    @cached_property
    def exact_factor(self) -> Float[Tensor, "rest rest"]:
        """Of the Schur complement, in float64."""
        return factor_(self.schur.to(torch.float64, copy=True))

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
        """The sums with or without the rows; the factor stays, unless many have left or joined since it was made."""
        rows, over, before = cast(Rows, update.rows), update.changes(self.over), _before(self, update.sign)
        self.near.observe_(self.schur, rows, update.sign)
        self.ownership.give_up()
        self.sums.observe_(rows.jacobian, rows.residual, update.sign).complete_()
        [head_inverse] = update.low_rank
        step = self.step + update.change
        after = replace(before, head_inverse=head_inverse, step=step, over=over, ownership=Ownership())
        changed = int((~torch.isin(over, before.made)).sum() + (~torch.isin(before.made, over)).sum())
        return after.ready() if changed > len(over) // _MANY else after

    def inexactness(self, update: Update | None = None) -> float:
        """Of the normal equations as they stand in the contract."""
        self.ownership.check()
        if update is None:
            return relative(_rhs(self) - _applied(self, self.step), _rhs(self))
        rows, step = cast(Rows, update.rows), self.step + update.change
        jacobian = rows.jacobian.to(torch.float64)
        error = rows.error(step).view_as(rows.residual)
        left = _rhs(self) - _applied(self, step) + update.sign * jacobian.rmatvec(error)
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
        """By conjugate gradients on the sums without the rows, with a factor at that ridge."""
        self.ownership.check()
        rows, head_inverse = network.rows(positions.tolist()), ridge_inverse(self.sums.head, ridge)
        jacobian = rows.jacobian.to(torch.float64)
        rhs = self.sums.rhs - jacobian.rmatvec(rows.residual.to(self.step)) - ridge * displacement
        near = Blockwise(self.sums, head_inverse, factored(complement(self.sums, head_inverse, ridge)))
        apply, precondition = near.updated(rows, -1)
        return _refined(self, apply, rhs, precondition, ridge)


def _before(solution: Primal, sign: int) -> Primal:
    """Itself, or, for samples to leave, with a factor that has seen all of S: from one that has not seen who joined,
    more would be taken away than is there."""
    return solution if sign > 0 or bool(torch.isin(solution.over, solution.made).all()) else solution.ready()


def _rhs(solution: Primal) -> Float[Tensor, " p"]:
    """``b - ridge u``."""
    return solution.sums.rhs - solution.ridge * solution.displacement


def _applied(solution: Primal, vector: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
    """``(G + ridge I) v``."""
    return solution.sums.matvec(vector) + solution.ridge * vector


def _refined(
    solution: Primal, gram: Product, rhs: Float[Tensor, " p"], precondition: Product, ridge: float | None = None
) -> Float[Tensor, " p"]:
    """``(gram + ridge I)^-1 rhs`` by conjugate gradients, to the digits that the sums have."""
    total = solution.ridge if ridge is None else ridge
    enough = below(_ENOUGH[solution.sums.rest.dtype] * float(rhs.norm()))
    return conjugated(lambda v: gram(v) + total * v, rhs, precondition, enough, _STEPS)[0]
