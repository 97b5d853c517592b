"""The convex optimum of the linearised network under the loss that it was fitted with, over its likeliest classes.

For a loss l that is convex in the logits, and a set S of samples,

    d(S) = argmin_d  sum_S l(f_i + J_i d, t_i) + ridge/2 |d + u|^2,      theta_new = theta* + d(R) - d(D).

For squared loss it is the step of the other forms. At the optimum ``d + u = J'a`` with ``a_i = -l'(z_i) / ridge`` and
``z = f - J u + K a``, so the problem has one unknown a row. Rows are of a sample's label and its m - 1 likeliest other
classes at ``theta*``; its other logits stay as they are. Cross-entropy does not change when all logits do alike, so
m - 1 contrasts of the m logits are enough (``fastntk.tuning.loss.Kept``). It is solved by Newton's method (``newton``).
The inverse of ``ridge I + L'K L`` at the optimum, with ``L L'`` the loss's Hessian, is kept: it preconditions
requests, and samples leave and join it as in the dual form.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastntk.common.progress import busy
from fastntk.jacobians.layout import Layout
from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.rows import Point, Rows
from fastntk.solve.collect import collect_rows, solved_once
from fastntk.solve.kernel import kernel, kernel_between
from fastntk.solve.linalg import add_product_, border_, factorised, invert_, mirror_, zero_
from fastntk.solve.newton import Newton, Problem, bordered, curvature
from fastntk.solve.prices import Price, Timing, Workload, direct, forward
from fastntk.solve.ridge import calibrate_convex
from fastntk.solve.solution import Ownership, Solved, Task, Update
from fastntk.solve.speeds import Speeds
from fastntk.tuning.loss import Loss, loss_numbers, loss_of


@dataclass(frozen=True)
class Convex:
    """``d(S)`` for a set S that samples leave and join; those that have left have zeros in every array.

    Attributes:
        rows: of S, by position, with their logits and the loss of these; the next solution takes them over.
        loss: l.
        displacement: ``u``.
        ridge: a total.
        kernel: ``K_S``; the next solution takes it over.
        inverse: ``(ridge I + L_0'K_S L_0)^-1``, likewise.
        base: ``L_0``, the Hessian's root where the inverse was made.
        coefficients: a.
        over: the positions of S.
        ownership: of what the next solution takes over.
    """

    name: ClassVar[str] = "convex"
    limit: ClassVar[float] = 1e-6
    rows: Rows
    loss: Loss
    displacement: Float[Tensor, " p"]
    ridge: float
    kernel: Float[Tensor, "rows rows"]
    inverse: Float[Tensor, "rows rows"]
    base: Float[Tensor, "samples outputs outputs"]
    coefficients: Float[Tensor, " rows"]
    over: Int[Tensor, " members"]
    ownership: Ownership = field(default_factory=Ownership, compare=False, repr=False)

    @classmethod
    def of(cls, rows: Rows, loss: Loss, u: Tensor, ridge: float, matrix: Tensor, a: Tensor | None = None) -> "Convex":
        """Solve for all samples of the rows, whose kernel is given, from a start (None: from their own logits)."""
        everyone = torch.ones(len(rows), dtype=torch.bool, device=matrix.device)
        problem, newton = Problem.of(rows, loss, u, ridge, matrix, everyone), Newton()
        a, _ = newton.minimise(problem, newton.start(problem, cast(Point, rows.point).z) if a is None else a)
        base = problem.root(problem.logits(a))
        inverse = invert_(curvature(problem.kernel, base, problem.ridge))
        return cls(rows, loss, u, ridge, matrix, inverse, base, a, torch.arange(len(rows)))

    @classmethod
    def price(cls, work: Workload) -> Price:
        """The kernel, the inverse and, in passing, four more such matrices, float64; the n Jacobians twice; a batch.
        Some six inverses."""
        rows = work.samples * work.kept_rows
        stored = work.itemsize * (rows * work.rest + work.samples * work.features)
        operations = float(rows) ** 2 * work.rest + 6 * float(rows) ** 3
        batch = work.batch(work.kept_rows)
        size = 6 * 8 * rows**2 + 2 * stored + work.bytes_of(batch, work.kept_rows)
        return Price(cls.name, size, operations, work.unprobed, batch=batch)

    @classmethod
    def timing(cls, work: Workload, speeds: Speeds) -> Timing:
        """Of the forward passes, the Jacobians, the kernel and the solves."""
        rows = work.samples * work.kept_rows
        found = direct(work.of_kept, speeds, rows, work.rest, "kernel")
        seconds = {**forward(work, speeds).seconds, **found.seconds, "solve": 6 * found.seconds.get("solve", 0.0)}
        return Timing(seconds, found.operations)

    @classmethod
    def prepare(cls, task: Task) -> Solved:
        """One pass that keeps the Jacobians of the likeliest classes, the kernel, and the solves."""
        rows = collect_rows(task.network, task.count)

        def solved() -> Solved:
            matrix = kernel(rows)
            with busy("choosing the ridge, solving"):
                found = None
                if task.ridge is None:
                    found = calibrate_convex(rows, task.network.loss, task.displacement, matrix)
                ridge = found.ridge if found else float(task.ridge or 0)
                solution = cls.of(rows, task.network.loss, task.displacement, ridge, matrix)
                return Solved(solution, rows.residual.clone(), found)

        return solved_once(solved, cls.restore, rows.residual.clone())

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the ridge, by name; the loss as its numbers."""
        self.ownership.check()
        own = ("displacement", "kernel", "inverse", "base", "coefficients", "over")
        named = {f"rows.{name}": tensor for name, tensor in self.rows.tensors().items()}
        return {**named, **{name: getattr(self, name) for name in own}, **loss_numbers(self.loss)}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], ridge: float) -> "Convex":
        """The reverse of ``tensors``."""
        rows, loss = Rows.from_tensors(tensors, "rows."), loss_of(tensors)
        matrix, inverse, base, a = (tensors[name] for name in ("kernel", "inverse", "base", "coefficients"))
        u, over = tensors["displacement"], tensors["over"].cpu()
        return cls(rows, loss, u, ridge, matrix, inverse, base, a, over)

    @cached_property
    def step(self) -> Float[Tensor, " p"]:
        """``d(S)``, from the rows."""
        self.ownership.check()
        return self.rows.step(self.coefficients, self.displacement)

    @classmethod
    def adapted(cls, network: Linearised, keep: int) -> Linearised:
        """With rows of the likeliest classes."""
        return replace(network, keep=keep)

    def reads(self, sign: int) -> bool:
        """The rows of who leaves are here."""
        return sign > 0

    def update(
        self, network: Linearised, positions: Int[Tensor, " samples"], sign: int, rows: Rows | None = None
    ) -> Update:
        """By Newton's method from S's own coefficients. ``low_rank``: the coefficients after it, and for who leaves the
        columns and the factor of the inverse that go with them."""
        self.ownership.check()
        if sign > 0:
            grown = _grown(self, cast(Rows, rows), positions)
            a, reached = grown._minimised(_present(grown.over.tolist(), len(grown.rows)), [])
            change = grown.rows.step(a, self.displacement) - self.step
            return Update(change, positions, sign, rows, (a,), reached, _kept(a, change, reached))
        staying = _present(Update(self.step, positions, sign).changes(self.over).tolist(), len(self.rows))
        gone = self.rows.places(positions)
        a, reached = self._minimised(staying, gone)
        change = self.rows.jacobian.rmatvec((a - self.coefficients).view_as(self.rows.residual))
        return Update(change, positions, sign, None, (a,), reached, _kept(a, change, reached))

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
        return Update(tensors["change"], positions, sign, rows, (a,), reached)

    def _minimised(self, present: Tensor, gone: Tensor | list[int]) -> tuple[Tensor, float]:
        problem = Problem.of(
            self.rows, self.loss, self.displacement, self.ridge, self.kernel, present.to(self.kernel.device)
        )
        places = torch.as_tensor(gone, dtype=torch.long, device=self.kernel.device)
        known = None if len(places) > len(self.kernel) // 3 else bordered(self.inverse, places)
        a, reached = Newton(known).minimise(problem, self.coefficients)
        return a.index_fill(0, places, 0), reached

    def apply(self, update: Update) -> "Convex":
        """With the coefficients that were worked out, and the inverse without who left, or bordered by who joined."""
        self.ownership.give_up()
        if update.sign > 0:
            grown = _grown(self, cast(Rows, update.rows), update.positions)
            return replace(grown, coefficients=update.low_rank[0], ownership=Ownership())
        gone = self.rows.places(update.positions)
        columns = self.inverse[:, gone]
        factor = factorised(columns[gone])
        add_product_(self.inverse, columns, torch.cholesky_solve(columns.T, factor).T, sign=-1)
        mirror_(self.inverse)
        for square in (self.inverse, self.kernel):
            zero_(square, gone)
        self.rows.clear_(update.positions)
        base = self.base.index_fill(0, update.positions.to(self.base.device), 0)
        over = update.changes(self.over)
        return replace(self, base=base, coefficients=update.low_rank[0], over=over, ownership=Ownership())

    def inexactness(self, update: Update | None = None) -> float:
        """``|grad| / |ridge (d + u)|`` of the objective in d, now or after an ``update``."""
        self.ownership.check()
        if update is not None:
            return float(update.reached or 0.0)
        problem = self._problem()
        return problem.inexactness(self.coefficients, problem.logits(self.coefficients))

    def _problem(self) -> Problem:
        present = _present(self.over.tolist(), len(self.rows)).to(self.kernel.device)
        return Problem.of(self.rows, self.loss, self.displacement, self.ridge, self.kernel, present)

    def anew(self, network: Linearised) -> "Convex":
        """From the kernel: the optimum, and the inverse where it is now."""
        self.ownership.check()
        problem = self._problem()
        a, _ = Newton().minimise(problem, self.coefficients)
        base = problem.root(problem.logits(a))
        return replace(self, inverse=invert_(curvature(problem.kernel, base, problem.ridge)), base=base, coefficients=a)

    def resolve(
        self, network: Linearised, positions: Int[Tensor, " samples"], displacement: Float[Tensor, " p"], ridge: float
    ) -> Float[Tensor, " p"]:
        """By Newton's method, with inverses of its own."""
        self.ownership.check()
        staying = Update(self.step, positions, -1).changes(self.over)
        present = _present(staying.tolist(), len(self.rows)).to(self.kernel.device)
        problem = Problem.of(self.rows, self.loss, displacement, ridge, self.kernel, present)
        a = Newton().minimise(problem, self.coefficients)[0].index_fill(0, self.rows.places(positions), 0)
        return self.rows.step(a, displacement)

    def alone(self, network: Linearised, positions: Int[Tensor, " samples"]) -> Float[Tensor, "samples outputs"]:
        """One step of Newton's method for each, of all logits: ``M (I - W M)^-1 l'`` with ``W = L L'`` and
        ``M = J_i H^-1 J_i'``, H the objective's Hessian over S; the logits that are not kept stay as they are."""
        self.ownership.check()
        point, jacobian = cast(Point, self.rows.point)[positions], self.rows.jacobian[positions]
        root, count = self.base[positions], self.rows.residual.shape[1]
        between = self.kernel[self.rows.places(positions)].view(len(root), count, len(self.base), count)
        own = between[torch.arange(len(root)), :, positions]
        across = torch.einsum("sknb,nba->skna", between, self.base).flatten(2)
        middle = (own - across @ self.inverse @ across.mT) / self.ridge
        gradient = self.loss.gradient_of(self._problem().logits(self.coefficients)[positions], point.kept)
        left = torch.eye(count).to(middle) - root @ root.mT @ middle
        change = middle @ torch.linalg.solve(left, gradient[:, :, None])
        return (jacobian.combined().to(change) @ change)[:, :, 0]

    def head_shortfall(self, layout: Layout) -> None:
        """The rows have not all logits."""


def _kept(a: Tensor, change: Tensor, reached: float) -> dict[str, Tensor]:
    return {"coefficients": a, "change": change, "reached": torch.tensor(reached, dtype=torch.float64)}


def _present(over: list[int], count: int) -> Bool[Tensor, " samples"]:
    here = torch.zeros(count, dtype=torch.bool)
    here[over] = True
    return here


def _grown(solution: "Convex", rows: Rows, positions: Int[Tensor, " samples"]) -> Convex:
    """With more samples, whose coefficients are 0, in arrays of its own."""
    room, kept = solution.rows.room_for(positions), solution.rows.with_others(positions, rows)
    more, places = room * rows.residual.shape[1], kept.places(positions)
    between, own, base = kernel_between(solution.rows, rows), kernel(rows), _root_of(solution.loss, rows)
    matrix, inverse = (F.pad(square, (0, more, 0, more)) for square in (solution.kernel, solution.inverse))
    old = len(between)
    corner = curvature(own, base, solution.ridge)
    across_both = _weighted(solution.base, between, base)
    lifted = solution.inverse @ across_both
    factor = factorised(corner - across_both.T @ lifted)
    solved = torch.cholesky_solve(lifted.T, factor)
    add_product_(inverse[:old, :old], lifted, solved.T)
    mirror_(inverse[:old, :old])
    border_(inverse, places, -solved.T, torch.cholesky_inverse(factor))
    border_(matrix, places, between, own)
    whole = F.pad(solution.base, (0, 0, 0, 0, 0, room)).index_copy(0, positions.to(base.device), base)
    coefficients, over = F.pad(solution.coefficients, (0, more)), torch.cat([solution.over, positions])
    return replace(
        solution, rows=kept, kernel=matrix, inverse=inverse, base=whole, coefficients=coefficients, over=over
    )


def _root_of(loss: Loss, rows: Rows) -> Float[Tensor, "samples outputs outputs"]:
    """L at the network's own logits."""
    point = cast(Point, rows.point)
    return loss.root_of(point.z, point.kept)


def _weighted(left: Tensor, between: Float[Tensor, "rows others"], right: Tensor) -> Float[Tensor, "rows others"]:
    """``L'K L`` between two sets."""
    n, m, k, _ = *left.shape[:2], *right.shape[:2]
    return torch.einsum("nba,nbkc,kcd->nakd", left, between.view(n, m, k, m), right).reshape(n * m, k * m)
