"""The convex optimum where the kernel of all rows does not fit into memory: rows on disk, read part by part.

The problem is that of ``convex``; nothing of it grows with the square of the number of rows. Rows of a float32 network
are kept in bfloat16 (8 bits of mantissa): what is solved is exact for the rows so rounded. A request reads the rows a
few dozen times, and no image but of who leaves or joins. See ``reading`` for how it is solved.

The ridge is found on some of the ``SAMPLED`` rows that precondition: the multiple of their kernel's mean diagonal that
``calibrate_convex`` takes, for the mean diagonal of all.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.common import distributed
from fastntk.common.errors import InputError
from fastntk.common.progress import busy
from fastntk.jacobians.layout import Layout
from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.rows import PART, Rows, rows_of
from fastntk.solve import prices
from fastntk.solve.collect import empty_rows, stored_rows
from fastntk.solve.kernel import kernel
from fastntk.solve.linalg import zero_
from fastntk.solve.newton import SOFT
from fastntk.solve.prices import Price, Timing, Workload
from fastntk.solve.reading import TOLERANCE, Objective, Place, Sample, minimise
from fastntk.solve.ridge import SAMPLED, Calibration, calibrate_convex, sampled
from fastntk.solve.solution import Ownership, Solved, Task, Update
from fastntk.solve.speeds import Speeds
from fastntk.tuning.loss import Loss
from fastntk.tuning.losses import loss_numbers, loss_of

log = logging.getLogger(__name__)

_READ = 50.0  # operations of a large product that take as long as reading a number and multiplying with it
_READS = 200  # a guess at how often preparing reads the rows: 122 to 180 were counted


@dataclass(frozen=True)
class OnDisk:
    """``d(S)`` for a set S that samples leave and join.

    Attributes:
        rows: of S, by position, on disk; those that have left have zeros. The next solution takes them over.
        loss: l.
        displacement: ``u``.
        ridge: a total.
        step: ``d(S)``.
        reached: its inexactness.
        sample: what preconditions; the next solution takes its kernel over.
        over: the positions of S.
        ownership: of what the next solution takes over.
    """

    name: ClassVar[str] = "convex-disk"
    holds: ClassVar[bool] = True
    leaves_out: ClassVar[bool] = False
    likeliest: ClassVar[bool] = True
    mapped: ClassVar[tuple[str, ...]] = ("rows.rest", "rows.features")
    """Which of the ``tensors`` stay in the folder's file when it is opened."""
    rows: Rows
    loss: Loss
    displacement: Float[Tensor, " p"]
    ridge: float
    step: Float[Tensor, " p"]
    reached: float
    sample: Sample
    over: Int[Tensor, " members"]
    ownership: Ownership = field(default_factory=Ownership, compare=False, repr=False)

    @classmethod
    def price(cls, work: Workload) -> Price:
        """In memory, the rows of the sample with four matrices of theirs, a part of the rows twice, a dozen vectors of
        length p and the logits; the rows on disk."""
        sampled = min(SAMPLED, work.samples * work.kept_rows)
        row = work.rest + work.features / work.kept_rows
        batch, numbers = work.batch(work.kept_rows), _READS * work.samples * work.kept_rows * row
        memory = (sampled + 2 * PART * work.kept_rows) * row * work.itemsize + 4 * 8 * sampled**2
        memory += 12 * 8 * work.parameters + 8 * work.samples * (work.kept_rows**2 + 4 * work.kept_rows)
        disk = work.samples * (
            work.kept_rows * work.rest * (2 if work.itemsize == 4 else work.itemsize) + work.features * work.itemsize
        )
        return Price(
            cls.name,
            int(memory) + work.bytes_of(batch, work.kept_rows),
            4.0 * numbers,
            work.unprobed,
            drawback="requests read the disk",
            rank=1,
            batch=batch,
            disk=disk,
            reading=_READ * numbers,
        )

    @classmethod
    def timing(cls, work: Workload, speeds: Speeds) -> Timing:
        """Of the forward passes, the Jacobians, and the reads that the solve takes."""
        jacobians = prices.passes(work, 1, speeds.rows(work.kept_rows), "Jacobians")
        each = speeds.read(work.kept_rows, _dtype(speeds.network.dtype))
        seconds = {**prices.forward(work, speeds).seconds, **jacobians.seconds, "solve": _READS * each * work.samples}
        return Timing(seconds, jacobians.operations)

    @classmethod
    def prepare(cls, task: Task) -> Solved:
        """One pass that writes the rows, then the ridge and the solve, which read them."""
        network = task.network
        rows = stored_rows(network, task.count, _dtype(network.dtype), task.checkpoint)
        log.info("rows on disk: rounding has changed the first by %.2g of their size", _rounded(network, rows))
        parcel = None
        if distributed.rank() == 0:
            with busy("choosing the ridge, solving"):
                parcel = _solved(rows, task)
        ridge, found, step, reached, positions, square = distributed.shared(parcel)
        step, square = step.to(network.device), square.to(network.device)
        u, over = task.displacement, torch.arange(task.count)
        solution = cls(rows, network.loss, u, ridge, step, reached, Sample(positions, square), over)
        return Solved(solution, rows.residual.clone(), found)

    def ready(self) -> "OnDisk":
        """It is."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the ridge, by name; the loss as its numbers."""
        self.ownership.check()
        named = {f"rows.{name}": tensor for name, tensor in self.rows.tensors().items()}
        own = {name: getattr(self, name) for name in ("displacement", "step", "over")}
        sample = {"sampled": self.sample.positions, "kernel": self.sample.kernel}
        reached = torch.tensor(self.reached, dtype=torch.float64)
        return {**named, **own, **sample, **loss_numbers(self.loss), "reached": reached}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], ridge: float) -> "OnDisk":
        """The reverse of ``tensors``."""
        sample = Sample(tensors["sampled"].cpu(), tensors["kernel"])
        u, step, over = tensors["displacement"], tensors["step"], tensors["over"].cpu()
        rows, reached = Rows.from_tensors(tensors, "rows."), float(tensors["reached"])
        return cls(rows, loss_of(tensors), u, ridge, step, reached, sample, over)

    @property
    def limit(self) -> float:
        """What every solve reaches."""
        return TOLERANCE

    def reads(self, sign: int) -> bool:
        """The rows of who leaves are here."""
        return sign > 0

    def update(
        self, network: Linearised, positions: Int[Tensor, " samples"], sign: int, rows: Rows | None = None
    ) -> Update:
        """By Newton's method from S's own step."""
        self.ownership.check()
        others = (cast(Rows, rows),) if sign > 0 else ()
        staying = self.over if sign > 0 else Update(self.step, positions, sign).changes(self.over)
        place = self._minimised(staying, self.displacement, self.ridge, others)
        change = place.d - self.step
        kept = {"change": change, "reached": torch.tensor(place.inexactness, dtype=torch.float64)}
        return Update(change, positions, sign, rows, reached=place.inexactness, kept=kept)

    def replayed(
        self,
        network: Linearised,
        positions: Int[Tensor, " samples"],
        sign: int,
        rows: Rows | None,
        tensors: Mapping[str, Tensor],
    ) -> Update:
        """With the change that was found."""
        return Update(tensors["change"], positions, sign, rows, reached=float(tensors["reached"]))

    def apply(self, update: Update) -> "OnDisk":
        """Without the rows of who left, or with those of who joined, which are then written anew with all others."""
        self.ownership.give_up()
        step, reached, over = self.step + update.change, cast(float, update.reached), update.changes(self.over)
        solution = replace(self, step=step, reached=reached, over=over, ownership=Ownership())
        if update.sign > 0:
            return replace(solution, rows=_grown(self.rows, cast(Rows, update.rows), update.positions))
        self.rows.clear_(update.positions)
        outputs, gone = self.rows.residual.shape[1], torch.isin(self.sample.positions, update.positions)
        zero_(self.sample.kernel, rows_of(gone.nonzero()[:, 0], outputs).to(self.sample.kernel.device))
        return solution

    def inexactness(self, update: Update | None = None) -> float:
        """``|grad F| / |ridge (d + u)|``, of the latest solve or of an ``update``'s."""
        self.ownership.check()
        return self.reached if update is None else cast(float, update.reached)

    def anew(self, network: Linearised) -> "OnDisk":
        """From where it is, by reads."""
        self.ownership.check()
        place = self._minimised(self.over, self.displacement, self.ridge)
        return replace(self, step=place.d, reached=place.inexactness)

    def resolve(
        self, network: Linearised, positions: Int[Tensor, " samples"], displacement: Float[Tensor, " p"], ridge: float
    ) -> Float[Tensor, " p"]:
        """By reads of the rows."""
        self.ownership.check()
        return self._minimised(self.over[~torch.isin(self.over, positions)], displacement, ridge).d

    def alone(self, network: Linearised, positions: Int[Tensor, " samples"]) -> Float[Tensor, "samples outputs"]:
        """It would take a solve a sample."""
        raise InputError(f"leaving samples out one by one would take a solve for each in the {self.name} form.")

    def head_shortfall(self, layout: Layout) -> None:
        """The rows have not all logits."""

    def _minimised(
        self, staying: Int[Tensor, " members"], u: Float[Tensor, " p"], ridge: float, others: tuple[Rows, ...] = ()
    ) -> Place:
        """Over who stays, and others who join."""
        present = torch.zeros(len(self.rows), dtype=torch.bool).index_fill(0, staying, True)
        present = torch.cat([present, *(torch.ones(len(each), dtype=torch.bool) for each in others)])
        dtype = _computed(self.rows.jacobian.rest.dtype)
        return minimise(Objective((self.rows, *others), self.loss, u, ridge, present, dtype), self.step, self.sample)


def _solved(rows: Rows, task: Task) -> tuple[float, Calibration | None, Tensor, float, Tensor, Tensor]:
    """The ridge and how it was found, the step, its inexactness, and the sample, all on the CPU."""
    network, count, u = task.network, task.count, task.displacement
    positions = sampled(rows, SAMPLED)
    few = replace(rows[positions], jacobian=rows.jacobian[positions].to(network.dtype, network.device))
    square, found, ridge = kernel(few), None, task.ridge
    if ridge is None:
        found = calibrate_convex(rows, network.loss, u, few)
        ridge = found.ridge
    everyone, sample = torch.ones(count, dtype=torch.bool), Sample(positions, square)
    objective = Objective((rows,), network.loss, u, float(ridge), everyone, network.dtype)
    place = minimise(objective, torch.zeros_like(u), sample, SOFT)
    return float(ridge), found, place.d.cpu(), place.inexactness, positions, square.cpu()


def _dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the rows on disk, for a network's."""
    return torch.bfloat16 if dtype == torch.float32 else dtype


def _computed(dtype: torch.dtype) -> torch.dtype:
    """Of products of rows that are kept in a dtype."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def _rounded(network: Linearised, rows: Rows) -> float:
    """What rounding has changed of the first rows, relative to their size."""
    exact = network.rows([0]).jacobian.rest
    return float((rows.jacobian.rest[:1].to(exact) - exact).norm() / exact.norm().clamp_min(1e-300))


def _grown(rows: Rows, others: Rows, positions: Int[Tensor, " some"]) -> Rows:
    """With other samples at ``positions``, in files of its own; between them nothing."""
    whole = empty_rows(others, len(rows) + rows.room_for(positions), rows.jacobian.rest.dtype, None)
    whole.put_(slice(len(rows)), rows)
    whole.put_(positions, others)
    return whole
