"""The convex optimum where the rows fit nowhere, as when everything is tuned: the kernel is kept, and no Jacobian.

The problem is that of ``convex``. Its kernel is summed over groups of parameters (``layers``), at the price of a pass
over the samples for each. What the parameters are moved by is one weighted backward pass,

    d(S) = sum_S J_i'a_i - u,    d(R) - d(D) = sum_D J_i'(a_i after - a_i before),

so that a request reads all members' images once; the solve before that reads the kernel alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import ClassVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.common import distributed
from fastntk.common.progress import busy
from fastntk.jacobians.jacobian import Operator
from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.rows import Point, Rows
from fastntk.solve import prices
from fastntk.solve.collect import collect_rows, key, resumed
from fastntk.solve.convex import FACTORS, RIDGE_FACTORS, Convex, updated
from fastntk.solve.kernel import kernel, kernel_between
from fastntk.solve.layers import groups, layered_kernel
from fastntk.solve.newton import DualProblem, Factor, Optimum, solved
from fastntk.solve.passes import Passing
from fastntk.solve.prices import Price, Timing, Workload
from fastntk.solve.ridge import SAMPLED, Calibration, calibrate_kernel, sampled
from fastntk.solve.solution import Solved, Task, Update
from fastntk.solve.speeds import Speeds

_TRUNCATED = 0.8  # of a pass over everything, that one for a group takes: it stops where the group begins


@dataclass(frozen=True, kw_only=True)
class Layerwise(Convex):
    """``d(S)`` for a set S that samples leave and join.

    Attributes:
        rows: as in ``Convex``, without all but the head's part.
        found: ``d(S)``.
    """

    name: ClassVar[str] = "layerwise"
    holds: ClassVar[bool] = False
    found: Float[Tensor, " p"]

    @classmethod
    def price(cls, work: Workload) -> Price:
        """The kernel, float64, and in passing four more such matrices, float32; one group; a batch; a dozen vectors
        of length p."""
        rows = work.samples * work.kept_rows
        held = max((each.bytes for each in _priced_groups(work)), default=0)
        apiece = work.passed + 2 * held // work.samples  # a group's rows, and where they come from
        size = (8 + 4 * 4) * rows**2 + held + work.largest_batch * apiece + 12 * 8 * work.parameters
        operations = float(rows) ** 2 * cls._multiplied(work) + 4 / 3 * float(rows) ** 3
        drawback = "requests take a pass over all that is retained"
        return Price(cls.name, size, operations, work.unprobed, drawback, rank=1, batch=work.largest_batch)

    @classmethod
    def timing(cls, work: Workload, speeds: Speeds) -> Timing:
        """Of a pass for each group and two more, the kernel, the choice of the ridge and the solve."""
        rows, r = work.samples * work.kept_rows, work.kept_rows
        count = len(_priced_groups(work)) * _TRUNCATED * (1 + 2 * r) / 3
        found = prices.passes(work, count + 2, speeds.training, "passes")
        product = float(rows) ** 2 * cls._multiplied(work) / speeds.rate(rows, r)
        few = min(SAMPLED, rows)
        solve = RIDGE_FACTORS * speeds.factor(few) + FACTORS * speeds.factor(rows)
        return Timing({**found.seconds, "kernel": product, "ridge and solve": solve}, found.operations)

    @staticmethod
    def _multiplied(work: Workload) -> float:
        """Multiplications for an entry of the kernel."""
        return sum((each.multiplications(work.kept_rows) for each in work.layers), 0.0)

    @classmethod
    def prepare(cls, task: Task) -> Solved:
        """The head's inputs, the passes for the kernel, and the solve."""
        network, u, everyone = task.network, task.displacement, range(task.count)
        rows = collect_rows(network.narrowed(network.layout.head), task.count)
        passing, r = Passing(network, rows, list(everyone)), rows.residual.shape[1]
        parts, kept = _groups(network, task.count, r), cast(Tensor, rows.jacobian.kept)
        where = f"{key(network, task.count)} {network.keep} {[each.names for each in parts]}"
        with resumed(task.checkpoint, lambda: where) as partial:
            matrix = layered_kernel(network, parts, everyone, kept, r, checkpoint=partial)
            matrix += kernel(rows)
            ridge, calibration, known = _minimum(task, rows, matrix, passing.matvec(u))
            found = passing.rmatvec(known.coefficients.view_as(rows.residual)) - u
        solution = cls(rows, network.loss, u, ridge, torch.arange(task.count), known, found=found)
        return Solved(solution, rows.residual.clone(), calibration)

    @property
    def step(self) -> Float[Tensor, " p"]:
        """``d(S)``."""
        return self.found

    def reads(self, sign: int) -> bool:
        """Nobody's rows are formed."""
        return False

    def jacobian(self, network: Linearised) -> Operator:
        """By passes over S, and backward over who has just joined or left."""
        return Passing(network, self.rows, self.over.tolist())

    def update(
        self, network: Linearised, positions: Int[Tensor, " samples"], sign: int, rows: Rows | None = None
    ) -> Update:
        """As in ``Convex``; of samples that join, the kernel between S and them, and theirs, by passes over both."""
        asked = Update(torch.zeros_like(self.displacement), positions, sign)
        return updated(self, network, self._joining(network, asked) if sign > 0 else asked)

    def _joining(self, network: Linearised, asked: Update) -> Update:
        places, r = asked.positions.tolist(), self.rows.residual.shape[1]
        theirs = network.narrowed(network.layout.head).rows(places)
        kept = torch.cat([cast(Tensor, each.jacobian.kept) for each in (self.rows[self.over], theirs)])
        everyone = [*self.over.tolist(), *places]
        beside = layered_kernel(network, _groups(network, len(everyone), r), everyone, kept, r, len(places))
        border, old = kernel_between(self.rows, theirs), len(self.over) * r
        border[self.rows.places(self.over)] += beside[:old]
        image = Passing(network, theirs, places, range(len(places))).matvec(self.displacement)
        start = cast(Point, theirs.point).z - image
        known = {"border": border, "block": kernel(theirs) + beside[old:], "start": start}
        return replace(asked, rows=theirs, kept=known)

    def apply(self, update: Update) -> "Layerwise":
        """As in ``Convex``, with the step that was found."""
        return replace(cast(Layerwise, super().apply(update)), found=self.found + update.change)

    def anew(self, network: Linearised) -> "Layerwise":
        """From the kernel alone, and by a backward pass."""
        fresh = cast(Layerwise, super().anew(network))
        a = cast(Optimum, fresh.known).coefficients.view_as(self.rows.residual)
        return replace(fresh, found=self.jacobian(network).rmatvec(a) - self.displacement)

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the ridge, by name; the loss as its numbers."""
        return {**super().tensors(), "start": self.optimum.start, "found": self.found}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], ridge: float, start: Tensor | None = None) -> "Layerwise":
        """The reverse of ``tensors``."""
        solution = Convex.restore(tensors, ridge, tensors["start"])
        return cls(**{each.name: getattr(solution, each.name) for each in fields(Convex)}, found=tensors["found"])


def _groups(network: Linearised, samples: int, rows: int) -> list:
    """The groups of parameters that the kernel of so many samples is summed over."""
    return groups(network.jacobian.layers(network.one), samples, rows, network.dtype.itemsize)


def _priced_groups(work: Workload) -> list:
    """The same, of samples that are not read yet."""
    return groups(work.layers, work.samples, work.kept_rows, work.itemsize)


def _minimum(task: Task, rows: Rows, matrix: Tensor, image: Tensor) -> tuple[float, Calibration | None, Optimum]:
    """The ridge and how it was found, and the optimum: of the first process, for all. ``image`` is ``J u``."""
    parcel, point, loss = None, cast(Point, rows.point), task.network.loss
    start = point.z - image
    if distributed.rank() == 0:
        with busy("choosing the ridge, solving"):
            few, calibration, ridge = sampled(rows, SAMPLED), None, task.ridge
            if ridge is None:
                places = rows.places(few)
                square = matrix[places][:, places] if len(few) < len(rows) else matrix
                calibration = calibrate_kernel(point[few], loss, start[few], square)
                ridge = calibration.factor * float(matrix.diagonal().mean())
                calibration = replace(calibration, ridge=ridge)
            everyone = torch.ones(len(rows), dtype=torch.bool, device=matrix.device)
            found = solved(DualProblem(loss, point.kept, start, matrix, ridge, everyone), point.z, Convex.tolerance)
            a, lower = found.coefficients, found.factor.lower.contiguous()
            parcel = ridge, calibration, lower.dtype
    ridge, calibration, dtype = distributed.shared(parcel)
    if distributed.rank():
        a, lower = matrix.new_empty(len(matrix)), matrix.new_empty(matrix.shape, dtype=dtype)
    distributed.share_([a, lower])
    return ridge, calibration, Optimum(matrix, a, Factor(lower, torch.arange(task.count)), start)
