"""The convex optimum of the linearised network under the loss that it was fitted with, over its likeliest classes.

For a loss l that is convex in the logits, and a set S of samples,

    d(S) = argmin_d  sum_S l(f_i + J_i d, t_i) + ridge/2 |d + u|^2,      theta_new = theta* + d(R) - d(D).

For squared loss it is the step of the other forms. At the optimum ``d + u = J'a`` with ``a_i = -l'(z_i) / ridge`` and
``z = f - J u + K a``, so the problem has one unknown a row. Rows are of a sample's label and its m - 1 likeliest other
classes at ``theta*``; its other logits stay as they are. Cross-entropy does not change when all logits do alike, so
m - 1 contrasts of the m logits are enough (``fastntk.tuning.loss.Kept``). It is solved by Newton's method (``newton``).

Preparing finds the rows and the ridge. The kernel and the optimum are worked out when something first needs them: the
first request, an audit, or ``ready``. What preconditioned the optimum does so for the requests that follow.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.common import distributed
from fastntk.common.errors import InputError
from fastntk.common.progress import busy
from fastntk.jacobians.jacobian import Operator
from fastntk.jacobians.layout import Layout
from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.rows import Doubled, Point, Rows
from fastntk.solve.collect import collect_rows
from fastntk.solve.kernel import kernel, kernel_between
from fastntk.solve.left_out import Hessian
from fastntk.solve.linalg import border_, zero_
from fastntk.solve.newton import DualProblem, Factor, NewtonMethod, Optimum, solved
from fastntk.solve.prices import Price, Timing, Workload, forward, passes
from fastntk.solve.ridge import SAMPLED, Calibration, calibrate_convex
from fastntk.solve.solution import Ownership, Solved, Task, Update
from fastntk.solve.speeds import Speeds
from fastntk.tuning.loss import Loss
from fastntk.tuning.losses import loss_numbers, loss_of

FACTORS, RIDGE_FACTORS = 5, 10
"""That are made to solve, and to choose the ridge: 3 to 6, and 8 to 14, were counted."""

_Form = TypeVar("_Form", bound="Convex")


@dataclass(frozen=True)
class Convex:
    """``d(S)`` for a set S that samples leave and join; those that have left have zeros in every array.

    Attributes:
        rows: of S, by position, with their logits and the loss of these; the next solution takes them over.
        loss: l.
        displacement: ``u``.
        ridge: a total.
        over: the positions of S.
        known: the optimum, if it is known already.
        exactly: whether J is multiplied in float64, whatever the rows' dtype, and the kernel, which is rounded as they
            are, only leads to the optimum.
        ownership: of what the next solution takes over.
    """

    name: ClassVar[str] = "convex"
    holds: ClassVar[bool] = True
    leaves_out: ClassVar[bool] = True
    likeliest: ClassVar[bool] = True
    mapped: ClassVar[tuple[str, ...]] = ()
    limit: ClassVar[float] = 1e-6
    tolerance: ClassVar[float] = 1e-9
    """The relative gradient that every solve reaches."""
    rows: Rows
    loss: Loss
    displacement: Float[Tensor, " p"]
    ridge: float
    over: Int[Tensor, " members"]
    known: Optimum | None = None
    exactly: bool = False
    ownership: Ownership = field(default_factory=Ownership, compare=False, repr=False)

    @classmethod
    def price(cls, work: Workload) -> Price:
        """The kernel, float64, and in passing four more such matrices, float32; the n Jacobians; a batch. Some
        four factors."""
        rows = work.samples * work.kept_rows
        stored = work.itemsize * (rows * work.rest + work.samples * work.features)
        operations = float(rows) ** 2 * work.rest + 4 / 3 * float(rows) ** 3
        batch = work.batch(work.kept_rows)
        looked_at = work.itemsize * SAMPLED * work.rest if rows > SAMPLED else 0
        size = max((8 + 4 * 4) * rows**2, looked_at) + stored + work.bytes_of(batch, work.kept_rows)
        return Price(cls.name, size, operations, work.unprobed, batch=batch)

    @classmethod
    def timing(cls, work: Workload, speeds: Speeds) -> Timing:
        """Of the forward passes, the Jacobians, the choice of the ridge, and what the first request waits for."""
        rows = work.samples * work.kept_rows
        few, rate = min(SAMPLED, rows), speeds.rate(rows, work.kept_rows)
        ridge = few**2 * work.rest / rate + RIDGE_FACTORS * speeds.factor(few)
        jacobians = passes(work, 1, speeds.rows(work.kept_rows), "Jacobians")
        seconds = {**forward(work, speeds).seconds, **jacobians.seconds, "ridge": ridge}
        first = {"kernel": work.rest * float(rows) ** 2 / rate, "solve": FACTORS * speeds.factor(rows)}
        return Timing(seconds, jacobians.operations, first)

    @classmethod
    def prepare(cls, task: Task) -> Solved:
        """One pass that keeps the Jacobians, and the ridge."""
        return prepared(cls, task, task.network.loss, calibrate_convex)

    @cached_property
    def optimum(self) -> Optimum:
        """What is known of it, or found now."""
        self.ownership.check()
        if self.known is not None:
            return self.known
        with busy("solving, once"):
            return _found(self, _problem(self, kernel(self.rows), self.over, _start(self)))

    def ready(self) -> "Convex":
        """With the optimum, and a factor over S."""
        self.ownership.check()
        optimum = self.optimum
        current = torch.equal(optimum.factor.over, self.over.sort().values)
        if current and self.known is not None:
            return self
        if not current:
            problem = _problem_at(self, optimum)
            root = problem.root(problem.logits(optimum.coefficients))
            optimum = replace(optimum, factor=Factor.of(problem, root))
        return replace(self, known=optimum)

    @staticmethod
    def point_of(rows: Rows) -> Point:
        """Where rows' logits are, and the loss as a function of them."""
        return cast(Point, rows.point)

    def jacobian(self, network: Linearised) -> Operator:
        """J of the rows."""
        return _operator(self)

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the ridge, by name; the loss as its numbers; of the optimum what is known."""
        self.ownership.check()
        named = {f"rows.{name}": tensor for name, tensor in self.rows.tensors().items()}
        own = {"displacement": self.displacement, "over": self.over, **loss_numbers(self.loss)}
        own |= {"exactly": torch.tensor(True)} if self.exactly else {}
        if not _is_solved(self):
            return {**named, **own}
        known = cast(Optimum, self.ready().known)
        found = {"kernel": known.kernel, "coefficients": known.coefficients}
        return {**named, **own, **found, "factor": known.factor.lower}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], ridge: float, start: Tensor | None = None) -> "Convex":
        """The reverse of ``tensors``; where the optimum starts, from the rows if it is not known."""
        over, u = tensors["over"].cpu(), tensors["displacement"]
        rows, loss = Rows.from_tensors(tensors, "rows."), loss_of(tensors)
        solution = cls(rows, loss, u, ridge, over, exactly="exactly" in tensors)
        if not any(name in tensors for name in ("kernel", "coefficients", "factor")):
            return solution
        factor = Factor(tensors["factor"], over.sort().values)
        start = _start(solution) if start is None else start
        return replace(solution, known=Optimum(tensors["kernel"], tensors["coefficients"], factor, start))

    @cached_property
    def step(self) -> Float[Tensor, " p"]:
        """``d(S)``, from the rows."""
        self.ownership.check()
        return _operator(self).rmatvec(self.optimum.coefficients.view_as(self.rows.residual)) - self.displacement

    def reads(self, sign: int) -> bool:
        """The rows of who leaves are here."""
        return sign > 0

    def update(
        self, network: Linearised, positions: Int[Tensor, " samples"], sign: int, rows: Rows | None = None
    ) -> Update:
        """By Newton's method from S's own coefficients. ``low_rank``: the coefficients after it, and the factor
        that preconditioned last."""
        nothing = torch.zeros_like(self.step)  # which is known from now on: its matrices may go
        return updated(self, network, Update(nothing, positions, sign, rows))

    def replayed(
        self,
        network: Linearised,
        positions: Int[Tensor, " samples"],
        sign: int,
        rows: Rows | None,
        tensors: Mapping[str, Tensor],
    ) -> Update:
        """With the coefficients that were found."""
        reached, a = float(tensors["reached"]), tensors["coefficients"]
        return Update(tensors["change"], positions, sign, rows, (a,), reached, tensors)

    def apply(self, update: Update) -> "Convex":
        """With the coefficients that were worked out, where S's own are known; the factor may be that of before."""
        rows, over = self.rows, update.changes(self.over)
        if not _is_solved(self):
            if update.sign < 0:
                self.ownership.give_up()
                rows.clear_(update.positions)
            else:
                rows = rows.with_others(update.positions, cast(Rows, update.rows))
            return replace(self, rows=rows, over=over, ownership=Ownership())
        solution = self if update.sign < 0 else _grown(self, update)
        optimum, (a, *fresh), start = solution.optimum, update.low_rank, solution.optimum.start
        self.ownership.give_up()
        if update.sign < 0:
            zero_(optimum.kernel, self.rows.places(update.positions))
            rows.clear_(update.positions)
            start = start.index_fill(0, update.positions.to(start.device), 0)
        factor = Factor(*fresh) if fresh else optimum.factor
        known = replace(optimum, coefficients=a, factor=factor, start=start)
        return replace(solution, known=known, over=over, ownership=Ownership())

    def inexactness(self, update: Update | None = None) -> float:
        """``|grad| / |ridge (d + u)|`` of the objective in d, now or after an ``update``."""
        self.ownership.check()
        if update is not None:
            return float(update.reached or 0.0)
        problem, a = _problem_at(self, self.optimum), self.optimum.coefficients
        return problem.inexactness(a, problem.logits(a, _operator(self) if self.exactly else None))

    def anew(self, network: Linearised) -> "Convex":
        """From the kernel alone."""
        self.ownership.check()
        return replace(self, known=_found(self, _problem_at(self, self.optimum)))

    def resolve(
        self, network: Linearised, positions: Int[Tensor, " samples"], displacement: Float[Tensor, " p"], ridge: float
    ) -> Float[Tensor, " p"]:
        """By Newton's method, with factors of its own.

        Raises:
            InputError: it did not converge.
        """
        self.ownership.check()
        staying, optimum = Update(self.step, positions, -1).changes(self.over), self.optimum
        jacobian = self.jacobian(network)
        start = self.point_of(self.rows).z - jacobian.matvec(displacement)
        problem = replace(_problem(self, optimum.kernel, staying, start), ridge=ridge)
        a, reached = NewtonMethod().minimise(problem, optimum.coefficients, self.tolerance)
        if reached > self.limit:
            raise InputError("the solve did not converge: the ridge is too small for it. Use a larger one.")
        a = a.index_fill(0, self.rows.places(positions), 0)
        return jacobian.rmatvec(a.view_as(self.rows.residual)) - displacement

    def alone(self, network: Linearised, positions: Int[Tensor, " samples"]) -> Float[Tensor, "samples outputs"]:
        """One step of Newton's method for each (``left_out``); the logits that are not kept stay as they are."""
        self.ownership.check()
        return self.hessian.left_out(self.rows[positions], positions)

    @cached_property
    def hessian(self) -> Hessian:
        """Of the objective, at the optimum."""
        return Hessian.of(_problem_at(self, self.optimum), self.optimum.coefficients)

    def head_shortfall(self, layout: Layout) -> Float[Tensor, "classes features"] | None:
        """The rows have not all logits."""
        return None


def prepared(
    form: type[Convex], task: Task, loss: Loss, calibrated: Callable[[Rows, Loss, Tensor], Calibration]
) -> Solved:
    """The rows of a task, and the ridge, which the first process finds; the ``loss`` is of what the rows are of."""
    rows, parcel = collect_rows(task.network, task.count), None
    if task.ridge is None and distributed.rank() == 0:
        with busy("choosing the ridge"):
            parcel = calibrated(rows, loss, task.displacement)
    found = distributed.shared(parcel)
    ridge = cast(float, task.ridge) if found is None else found.ridge
    solution = form(rows, loss, task.displacement, ridge, torch.arange(task.count))
    return Solved(solution, rows.residual.clone(), found)


def _is_solved(solution: Convex) -> bool:
    """Whether the optimum is known."""
    return solution.known is not None or "optimum" in vars(solution)


def _operator(solution: Convex) -> Operator:
    """J of its rows, in the dtype that it is multiplied in."""
    return Doubled(solution.rows) if solution.exactly else solution.rows.jacobian


def _found(solution: Convex, problem: DualProblem) -> Optimum:
    """The optimum, from the kernel alone."""
    found = solved(problem, solution.point_of(solution.rows).z, solution.tolerance)
    if not solution.exactly:
        return found
    refined = NewtonMethod(found.factor).refine(problem, found.coefficients, _operator(solution), solution.tolerance)
    return replace(found, coefficients=refined[0])


def updated(solution: Convex, network: Linearised, asked: Update) -> Update:
    """What samples change that leave, or that join with what is known of them."""
    solution.ownership.check()
    before = _grown(solution, asked) if asked.sign > 0 else solution
    optimum, newton = before.optimum, NewtonMethod(before.optimum.factor)
    problem = _problem(before, optimum.kernel, asked.changes(solution.over), optimum.start)
    a, reached = newton.minimise(problem, optimum.coefficients, solution.tolerance)
    if before.exactly:
        a, reached = newton.refine(problem, a, _operator(before), solution.tolerance)
    if asked.sign < 0:
        a = a.index_fill(0, solution.rows.places(asked.positions), 0)
    change = before.jacobian(network).rmatvec((a - optimum.coefficients).view_as(before.rows.residual))
    kept = {"coefficients": a, "change": change, "reached": torch.tensor(reached, dtype=torch.float64)}
    fresh = cast(Factor, optimum.factor if solution.loss.curved else newton.factor)  # not of a place on the way
    found = (a, fresh.lower, fresh.over)
    return replace(asked, change=change, low_rank=found, reached=reached, kept={**asked.kept, **kept})


def _problem(solution: Convex, matrix: Tensor, staying: Int[Tensor, " some"], start: Tensor) -> DualProblem:
    """Over the samples who stay, with the kernel of all rows and where they start."""
    present = torch.zeros(len(solution.rows), dtype=torch.bool).index_fill(0, staying, True).to(matrix.device)
    kept = solution.point_of(solution.rows).kept
    return DualProblem(solution.loss, kept, start, matrix, solution.ridge, present)


def _problem_at(solution: Convex, optimum: Optimum) -> DualProblem:
    """Over all of S, with what is known."""
    return _problem(solution, optimum.kernel, solution.over, optimum.start)


def _start(solution: Convex) -> Float[Tensor, "samples outputs"]:
    """``f - J u`` of its rows."""
    return solution.point_of(solution.rows).z - _operator(solution).matvec(solution.displacement)


def _grown(solution: _Form, update: Update) -> _Form:
    """With samples that join, whose coefficients are 0, in arrays of its own; they are not among S yet. Of the kernel
    between all others and them, of theirs and of where they start, what is not known is worked out."""
    optimum, known, rows = solution.optimum, update.kept, cast(Rows, update.rows)
    room, positions = solution.rows.room_for(update.positions), update.positions
    kept, more = solution.rows.with_others(positions, rows), room * rows.residual.shape[1]
    matrix, start = F.pad(optimum.kernel, (0, more, 0, more)), F.pad(optimum.start, (0, 0, 0, room))
    border = known["border"] if "border" in known else kernel_between(solution.rows, rows)
    border_(matrix, kept.places(positions), border, known["block"] if "block" in known else kernel(rows))
    theirs = replace(solution, rows=rows)
    start[positions] = known["start"] if "start" in known else _start(theirs)
    found = Optimum(matrix, F.pad(optimum.coefficients, (0, more)), optimum.factor, start)
    return replace(solution, rows=kept, known=found, ownership=Ownership())
