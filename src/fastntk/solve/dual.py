"""The step in its dual form, nC x nC, whose size depends little on the number of parameters.

``s(S) = J_S' (J_S J_S' + ridge I)^-1 (r_S + J_S u) - u``. With ``A = (K_D + ridge I)^-1`` and ``a = A (r_D + J_D u)``,

    s(R) - s(D) = -J_D' A_DF A_FF^-1 a_F.

Adding samples borders A.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.common.progress import busy
from fastntk.jacobians.layout import Layout
from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.rows import Rows
from fastntk.solve.collect import collect_rows, solved_once
from fastntk.solve.head import head_shortfall
from fastntk.solve.kernel import Kernel, kernel, kernel_between
from fastntk.solve.linalg import (
    add_product_,
    border_,
    conjugate_gradients,
    factorised,
    mirror_,
    relative,
    ridge_inverse,
    shifted,
    zero_,
)
from fastntk.solve.prices import Price, Timing, Workload, direct
from fastntk.solve.ridge import calibrate
from fastntk.solve.solution import Ownership, Solved, Task, Update
from fastntk.solve.speeds import Speeds


@dataclass(frozen=True)
class Dual:
    """``A``, ``a`` and the rows of a set S that samples leave and join; ``s(S) = J_S' a - u``.

    Samples that have left have zeros in rows and kernel, and take no part.

    Attributes:
        rows: of S, by position; the next solution takes them over.
        displacement: ``u``.
        ridge: a total.
        kernel: ``K_S = J_S J_S'``; the next solution takes it over.
        inverse: ``A = (K_S + ridge I)^-1``; likewise.
        targets: ``r_S + J_S u``.
        coefficients: ``a``, A times these.
        over: the positions of S.
        ownership: of what the next solution takes over.
    """

    name: ClassVar[str] = "dual"
    limit: ClassVar[float] = 1e-9
    rows: Rows
    displacement: Float[Tensor, " p"]
    ridge: float
    kernel: Float[Tensor, "rows rows"]
    inverse: Float[Tensor, "rows rows"]
    targets: Float[Tensor, " rows"]
    coefficients: Float[Tensor, " rows"]
    over: Int[Tensor, " samples"]
    ownership: Ownership = field(default_factory=Ownership, compare=False, repr=False)

    @classmethod
    def of(cls, gram: Kernel, displacement: Float[Tensor, " p"], ridge: float, over: Int[Tensor, " samples"]) -> "Dual":
        """Solve for the set whose rows and kernel are given."""
        inverse, targets = ridge_inverse(gram.matrix, ridge), gram.rows.targets(displacement)
        return cls(gram.rows, displacement, ridge, gram.matrix, inverse, targets, inverse @ targets, over)

    @classmethod
    def price(cls, work: Workload) -> Price:
        """The nC x nC kernel, its inverse and half of that in passing, all float64; the n Jacobians twice; a batch.
        ``(nC)^2 rest`` and ``(nC)^3`` operations."""
        work = work.written
        stored = work.itemsize * (work.rows * work.rest + work.samples * work.features)
        operations = float(work.rows) ** 2 * work.rest + float(work.rows) ** 3
        size = int(2.5 * 8 * work.rows**2) + 2 * stored + work.batch_bytes
        return Price(cls.name, size, operations, work.one_step, rank=2 * work.curved)

    @classmethod
    def timing(cls, work: Workload, speeds: Speeds) -> Timing:
        """Of the Jacobians, the kernel, the choice of the ridge and the solve."""
        return direct(work.written, speeds, work.rows, work.written.rest, "kernel")

    @classmethod
    def prepare(cls, task: Task) -> Solved:
        """One pass that keeps every Jacobian, the kernel, and the solve."""
        rows = collect_rows(task.network, task.count)

        def solved() -> Solved:
            gram = Kernel.of(rows)
            with busy("choosing the ridge, solving"):
                found = calibrate(gram, task.displacement) if task.ridge is None else None
                ridge = found.ridge if found else cast(float, task.ridge)
                solution = cls.of(gram, task.displacement, ridge, torch.arange(task.count))
                return Solved(solution, rows.residual.clone(), found)

        return solved_once(solved, cls.restore, rows.residual.clone())

    @classmethod
    def adapted(cls, network: Linearised, keep: int) -> Linearised:
        """With all rows."""
        return network

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the ridge, by name."""
        self.ownership.check()
        rows = {f"rows.{name}": tensor for name, tensor in self.rows.tensors().items()}
        names = ("displacement", "kernel", "inverse", "targets", "coefficients", "over")
        return {**rows, **{name: getattr(self, name) for name in names}}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], ridge: float) -> "Dual":
        """The reverse of ``tensors``."""
        named = {name: tensors[f"rows.{name}"] for name in ("rest", "features", "residual")}
        rows, displacement = Rows.from_tensors(named), tensors["displacement"]
        matrix, inverse, targets, a = (tensors[name] for name in ("kernel", "inverse", "targets", "coefficients"))
        return cls(rows, displacement, ridge, matrix, inverse, targets, a, tensors["over"].cpu())

    @cached_property
    def step(self) -> Float[Tensor, " p"]:
        """``s(S)``, from the rows."""
        self.ownership.check()
        return self.rows.step(self.coefficients, self.displacement)

    def reads(self, sign: int) -> bool:
        """The rows of who leaves are here."""
        return sign > 0

    def update(
        self, network: Linearised, positions: Int[Tensor, " samples"], sign: int, rows: Rows | None = None
    ) -> Update:
        """From rows of the inverse, or by bordering it."""
        self.ownership.check()
        return self._leaving(positions) if sign < 0 else self._joining(positions, cast(Rows, rows))

    def _leaving(self, positions: Tensor) -> Update:
        """``low_rank``: the change of ``a``, ``A_SF`` and the Cholesky factor of ``A_FF``."""
        gone = self.rows.places(positions)
        columns = self.inverse[:, gone]
        factor = factorised(columns[gone])
        change_of_a = -columns @ torch.cholesky_solve(self.coefficients[gone, None], factor)[:, 0]
        change = self.rows.jacobian.rmatvec(change_of_a.view_as(self.rows.residual))
        return Update(change, positions, -1, None, (change_of_a, columns, factor))

    def _joining(self, positions: Tensor, rows: Rows) -> Update:
        """``low_rank``: ``a_F``, ``A K_SF``, the Cholesky factor of ``K_FF + ridge I - K_FS A K_SF``, and ``K_SF``."""
        across = kernel_between(self.rows, rows)
        lifted = self.inverse @ across
        factor = factorised(shifted(kernel(rows) - across.T @ lifted, self.ridge))
        error = rows.targets(self.displacement) - across.T @ self.coefficients
        joining = torch.cholesky_solve(error[:, None], factor)[:, 0]
        staying = -(lifted @ joining)
        change = rows.jacobian.rmatvec(joining.view_as(rows.residual))
        change = change + self.rows.jacobian.rmatvec(staying.view_as(self.rows.residual))
        return Update(change, positions, 1, rows, (joining, lifted, factor, across))

    def alone(self, network: Linearised, positions: Int[Tensor, " samples"]) -> Float[Tensor, "samples outputs"]:
        """``ridge a_i - A_ii^-1 a_i``, for each sample i."""
        self.ownership.check()
        places = self.rows.places(positions).view(len(positions), -1)
        blocks, own = self.inverse[places[:, :, None], places[:, None, :]], self.coefficients[places]
        return self.ridge * own - torch.linalg.solve(blocks, own[..., None])[..., 0]

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

    def apply(self, update: Update) -> "Dual":
        """The inverse without the rows that leave, or bordered by those that join."""
        self.ownership.give_up()
        after = self._left(update) if update.sign < 0 else _joined(self, update)
        mirror_(after.inverse)
        return replace(after, over=update.changes(self.over), ownership=Ownership())

    def _left(self, update: Update) -> "Dual":
        change_of_a, columns, factor = update.low_rank
        gone = self.rows.places(update.positions)
        add_product_(self.inverse, columns, torch.cholesky_solve(columns.T, factor).T, sign=-1)
        for square in (self.inverse, self.kernel):
            zero_(square, gone)
        self.rows.clear_(update.positions)
        coefficients, targets = (
            each.index_fill(0, gone, 0) for each in (self.coefficients + change_of_a, self.targets)
        )
        return replace(self, coefficients=coefficients, targets=targets)

    def inexactness(self, update: Update | None = None) -> float:
        """``|(K_S + ridge I) a - (r_S + J_S u)| / |r_S + J_S u|``."""
        self.ownership.check()
        target, a = self.targets, self.coefficients
        if update is None:
            return relative(self.kernel @ a + self.ridge * a - target, target)
        if update.sign < 0:
            gone = self.rows.places(update.positions)
            a, target = (a + update.low_rank[0]).index_fill(0, gone, 0), target.index_fill(0, gone, 0)
            left = (self.kernel @ a).index_fill(0, gone, 0) + self.ridge * a - target
            return relative(left, target)
        (joining, lifted, _, across), joined = update.low_rank, cast(Rows, update.rows)
        a, more = a - lifted @ joining, joined.targets(self.displacement)
        left = self.kernel @ a + across @ joining + self.ridge * a - target
        right = across.T @ a + kernel(joined) @ joining + self.ridge * joining - more
        return relative(torch.cat([left, right]), torch.cat([target, more]))

    def anew(self, network: Linearised) -> "Dual":
        """From the kernel."""
        self.ownership.check()
        inverse = ridge_inverse(self.kernel, self.ridge)
        return replace(self, inverse=inverse, coefficients=inverse @ self.targets)

    def head_shortfall(self, layout: Layout) -> Float[Tensor, "classes features"]:
        """From the rows."""
        self.ownership.check()
        features = self.rows.jacobian.features.double()
        moment = self.rows.residual.double().T @ features
        return head_shortfall(features.T @ features, moment, layout.head_of(self.displacement), self.ridge)

    def resolve(
        self, network: Linearised, positions: Int[Tensor, " samples"], displacement: Float[Tensor, " p"], ridge: float
    ) -> Float[Tensor, " p"]:
        """By conjugate gradients on the kernel, preconditioned by ``A``."""
        self.ownership.check()
        _, columns, factor = self._leaving(positions).low_rank
        gone = self.rows.places(positions)

        def apply(v: Tensor) -> Tensor:
            return (self.kernel @ v + ridge * v).index_fill_(0, gone, 0)

        def precondition(v: Tensor) -> Tensor:
            return self.inverse @ v - columns @ torch.cholesky_solve((columns.T @ v)[:, None], factor)[:, 0]

        target = self.rows.targets(displacement).index_fill_(0, gone, 0)
        coefficients = conjugate_gradients(apply, target, precondition)
        return self.rows.step(coefficients, displacement)


def _joined(solution: Dual, update: Update) -> Dual:
    """Bordered by the rows of who joins."""
    (joining, lifted, factor, across), joined = update.low_rank, cast(Rows, update.rows)
    grown = _grown(solution, solution.rows.room_for(update.positions))
    places, old, solved = solution.rows.places(update.positions), len(lifted), torch.cholesky_solve(lifted.T, factor)
    add_product_(grown.inverse[:old, :old], lifted, solved.T)
    corner = torch.cholesky_inverse(factor)
    border_(grown.inverse, places, -solved.T, corner)
    border_(grown.kernel, places, across, kernel(joined))
    grown.coefficients[:old] -= lifted @ joining
    grown.coefficients[places] = joining
    grown.targets[places] = joined.targets(solution.displacement)
    grown.rows.jacobian.rest[update.positions] = joined.jacobian.rest
    grown.rows.jacobian.features[update.positions] = joined.jacobian.features
    grown.rows.residual[update.positions] = joined.residual
    return grown


def _grown(solution: Dual, samples: int) -> Dual:
    """With so many more samples at the end, of zeros; coefficients of its own."""
    if not samples:
        return replace(solution, coefficients=solution.coefficients.clone(), targets=solution.targets.clone())
    more = samples * solution.rows.residual.shape[1]
    kernel, inverse = (F.pad(square, (0, more, 0, more)) for square in (solution.kernel, solution.inverse))
    room = solution.rows[torch.zeros(samples, dtype=torch.long)]
    room.clear_(slice(None))
    coefficients, targets = (F.pad(each, (0, more)) for each in (solution.coefficients, solution.targets))
    wider = replace(solution, kernel=kernel, inverse=inverse, coefficients=coefficients, targets=targets)
    return replace(wider, rows=solution.rows + room)
