"""What preparing a memory will take, before any of it is done: form, memory, arithmetic and time."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Literal

import psutil
import torch
from torch import nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from fastntk.common import distributed
from fastntk.common.errors import InputError
from fastntk.common.machine import elapsed, settle, wait
from fastntk.jacobians.combinations import ClassProbes
from fastntk.jacobians.jacobian import PerSampleJacobian
from fastntk.jacobians.linearised import Linearised
from fastntk.solve import iterative as matrix_free
from fastntk.solve import ridge
from fastntk.solve.linalg import add_product_, invert_, mirror_
from fastntk.solve.sums import ROWS
from fastntk.tuning.loss import Loss, SquaredLoss
from fastntk.tuning.selectors import snapshot, tuned

Form = Literal["primal", "dual", "matrix-free"]
FORMS: tuple[Form, ...] = ("primal", "dual", "matrix-free")

_BATCH_BYTES = 2**30  # of one batch's Jacobians
_CALIBRATION = 10  # seconds, after which a piece of work is not timed again
_TRIAL = 3072  # the side of the matrices that the calibration multiplies and inverts
_SOLVE_PASSES = 15  # a guess at what the matrix-free form's first solve takes after its Krylov space


@dataclass(frozen=True)
class Workload:
    """What is to be prepared, in numbers.

    Attributes:
        samples: n.
        outputs: of a sample: C, or the number of class probes.
        rest: tuned parameters but for the head's.
        features: the head's inputs, 0 if it is frozen or the classes are probed: ``p = rest + outputs features``.
        batch_size: images a batch of Jacobians.
        itemsize: bytes a number in the Jacobians.
        sums_itemsize: bytes a number in the sums.
        activations: bytes that the network keeps for its backward passes, per image.
    """

    samples: int
    outputs: int
    rest: int
    features: int
    batch_size: int = 64
    itemsize: int = 4
    sums_itemsize: int = 8
    activations: int = 0

    @property
    def parameters(self) -> int:
        """p."""
        return self.rest + self.outputs * self.features


@dataclass(frozen=True)
class Plan:
    """What one form takes.

    Attributes:
        form: of the step.
        bytes: at the peak, beside what the process holds already.
        operations: floating-point operations of the sums and the solve, and of the network where it was counted.
        seconds: by phase, on this machine, where a calibration was made.
        workload: what was planned for.
    """

    form: Form
    bytes: int
    operations: float
    workload: Workload
    seconds: dict[str, float] | None = None

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "total_seconds": self.total_seconds}

    def text(self) -> str:
        """For people."""
        w = self.workload
        lines = [
            f"{self.form} form: {w.parameters:,} tuned parameters, {w.samples:,} samples, {w.outputs} outputs each",
            f"peak memory   {self.bytes / 1e9:.2f} GB beside what the process holds already",
            f"arithmetic    {self.operations:.2e} floating-point operations",
        ]
        if self.seconds:
            phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
            lines.append(f"time          {self.total_seconds:.1f} s, estimated from a short calibration: {phases}")
        return "\n".join(lines)

    @property
    def total_seconds(self) -> float | None:
        """The time of all phases."""
        return sum(self.seconds.values()) if self.seconds else None


def free_bytes(device: torch.device) -> int:
    """Memory that can be allocated on ``device`` now, with what torch has taken of a GPU and does not use."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return int(psutil.virtual_memory().available)


def price(form: Form, w: Workload) -> Plan:
    """Memory and arithmetic of a form, for ``p = rest + C features`` and n samples.

    - Primal: R, the inverse of its Schur complement and half of such a matrix in passing; the head's blocks twice; a
      block of rows. ``nC rest^2`` operations for the sums (half of all by symmetry, two each), ``C features rest^2``
      for the Schur complement and ``rest^3`` for its inverse.
    - Dual: the nC x nC kernel, its inverse and half of that in passing, all float64; the n Jacobians twice.
      ``(nC)^2 rest`` and ``(nC)^3`` operations.
    - Matrix-free: ``fastntk.solve.iterative.STEPS`` vectors of length p and a dozen more. Its arithmetic is the network's:
      passes over the samples, which are not counted here.

    Each with one batch of Jacobians (but matrix-free) and of activations.
    """
    rows, p = w.samples * w.outputs, w.parameters
    batch = w.batch_size * w.outputs * (w.rest + w.features) * w.itemsize
    network = w.batch_size * w.activations
    if form == "primal":
        cross = w.outputs * w.rest * w.features + w.rest * w.features
        block = (ROWS + w.batch_size * w.outputs) * w.rest
        collecting = w.rest**2 * w.sums_itemsize + block * (2 * w.itemsize + w.sums_itemsize) + batch + network
        solving = int(2.5 * w.rest**2) * w.sums_itemsize
        operations = rows * float(w.rest) ** 2 + w.outputs * w.features * float(w.rest) ** 2 + float(w.rest) ** 3
        return Plan(form, max(collecting, solving) + cross * w.sums_itemsize, operations, w)
    if form == "dual":
        stored = w.itemsize * (rows * w.rest + w.samples * w.features)
        operations = float(rows) ** 2 * w.rest + float(rows) ** 3
        return Plan(form, int(2.5 * 8 * rows**2) + 2 * stored + batch + network, operations, w)
    return Plan(form, p * (matrix_free.STEPS * w.itemsize + 12 * 8) + 2 * network, 0.0, w)


def choose_form(w: Workload, free: int, form: str = "auto") -> Plan:
    """The form with the fewer operations among primal and dual if one of them fits into ``free`` bytes; matrix-free if
    none does; or the one asked for if it fits.

    Raises:
        InputError: nothing fits; the message says what is needed, what there is, and what to choose instead.
    """
    if form not in ("auto", *FORMS):
        raise InputError(f"form must be 'auto', 'primal', 'dual' or 'matrix-free', not {form!r}.")
    plans = [price(each, w) for each in FORMS if form in ("auto", each)]
    fitting = [plan for plan in plans if plan.bytes <= free]
    direct = [plan for plan in fitting if plan.form != "matrix-free"]
    if fitting:
        return min(direct or fitting, key=lambda plan: plan.operations)
    needs = ", ".join(f"the {plan.form} form {plan.bytes / 1e9:.1f} GB" for plan in plans)
    half = "float32 sums take half the memory of float64 ones; " if w.sums_itemsize == 8 and form == "primal" else ""
    raise InputError(
        f"the step does not fit into memory: for {w.parameters:,} tuned parameters, {w.samples:,} samples and "
        f"{w.outputs} outputs it needs {needs}; {free / 1e9:.1f} GB are free. Remedies: {half}tune fewer parameters "
        "(for example 'bn' or the head alone: primal grows with their square), train on fewer samples (dual grows with "
        "theirs), or take the matrix-free form, which grows with neither."
    )


def workload(linearised: Linearised, dtype: torch.dtype) -> Workload:
    """Count what is to be done, by a trial run on one image."""
    layout, probes = linearised.layout, linearised.probes
    if probes:
        probes.check(linearised.classes)
    outputs = probes.count if probes else linearised.classes
    head = 0 if probes or linearised.curved else sum(layout.shapes[name].numel() for name in layout.head)
    rest = layout.size - head
    itemsize = linearised.dtype.itemsize
    batch_size = max(1, min(linearised.batch_size, _BATCH_BYTES // (outputs * max(rest, 1) * itemsize)))
    return Workload(
        samples=len(linearised.train),  # type: ignore[arg-type]
        outputs=outputs,
        rest=rest,
        features=head // outputs,
        batch_size=batch_size,
        itemsize=itemsize,
        sums_itemsize=dtype.itemsize,
        activations=linearised.activation_bytes(),
    )


def chosen(linearised: Linearised, form: str, dtype: torch.dtype) -> Plan:
    """The plan without times: the form to take with the memory that is free now, and the batches that fit.

    Raises:
        InputError: nothing fits, or classes are to be probed in a form that has no use for it.
    """
    plan = choose_form(workload(linearised, dtype), free_bytes(linearised.device), form)
    if linearised.probes and plan.form == "matrix-free":
        raise InputError("the matrix-free form has no use for class probes: it makes no backward pass a class.")
    return plan


def plan(
    model: nn.Module,
    train: Dataset,
    *,
    form: str = "auto",
    loss: Loss = SquaredLoss(),
    batch_size: int = 64,
    workers: int = 0,
    dtype: torch.dtype = torch.float64,
    precision: str = "full",
    class_probes: int | None = None,
) -> Plan:
    """What ``prepare`` with the same arguments will take, with times from a calibration of some seconds.

    The model need not be fitted: times and sizes do not depend on the values of its parameters.

    Raises:
        InputError: like ``prepare``.
    """
    settle()
    probes = None if class_probes is None else ClassProbes(class_probes)
    jacobian = PerSampleJacobian(model, snapshot(tuned(model)))
    linearised = Linearised(jacobian, train, loss, batch_size, workers, precision, probes)
    untimed = chosen(linearised, form, dtype)
    return calibrated(untimed, replace(linearised, batch_size=untimed.workload.batch_size), dtype)


def calibrated(untimed: Plan, linearised: Linearised, dtype: torch.dtype) -> Plan:
    """The plan with the time of every phase on this machine, from the network on one batch and small matrices."""
    w = untimed.workload
    ids = range(min(w.batch_size, w.samples))
    if untimed.form == "matrix-free":
        vector = torch.ones(w.parameters, dtype=torch.float64, device=linearised.device)
        each, operations = _timed(lambda: linearised.gram(ids, vector), linearised.device)
        passes = matrix_free.STEPS + _SOLVE_PASSES
        share = passes * w.samples / len(ids)
        seconds = {f"about {passes} passes": share * each / distributed.size()}
        return replace(untimed, operations=share * operations, seconds=seconds)
    each, operations = _timed(lambda: list(linearised.stream(ids)), linearised.device)
    share = w.samples / len(ids)
    seconds = {"Jacobians": share * each / distributed.size(), **_algebra(untimed, linearised.device, dtype)}
    return replace(untimed, operations=untimed.operations + share * operations, seconds=seconds)


def _timed(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds and floating-point operations of some work: after one run, the median of three, or of as many as start
    within ten seconds."""
    with FlopCounterMode(display=False) as counter:
        work()
    seconds: list[float] = []
    while len(seconds) < 3 and sum(seconds) < _CALIBRATION:
        wait(device)
        started = time.perf_counter()
        work()
        seconds.append(elapsed(started, device))
    return statistics.median(seconds), float(counter.get_total_flops())


def _algebra(untimed: Plan, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of the sums or the kernel, the choice of the ridge and the solve, from small matrices of their kind."""
    w = untimed.workload
    primal = untimed.form == "primal"
    side = w.rest if primal else w.samples * w.outputs
    trial = min(side, _TRIAL)
    count = max(1, ROWS // w.outputs)
    if not trial:
        return {}
    kind, accumulated = (dtype, dtype) if primal else (torch.float32, torch.float64)
    rows = torch.randn(count * w.outputs, trial, device=device, dtype=kind)
    matrix = torch.zeros(trial, trial, device=device, dtype=accumulated)
    multiply, _ = _timed(lambda: add_product_(matrix, rows.T, rows.T), device)
    mirror_(matrix).diagonal().add_(1 + float(matrix.diagonal().mean()))
    vector = torch.ones(trial, dtype=accumulated, device=device)
    matvec, _ = _timed(lambda: matrix @ vector, device)
    invert, _ = _timed(lambda: invert_(matrix.clone()), device)
    rate = len(rows) * trial**2 / multiply
    cubic, square = (side / trial) ** 3, (side / trial) ** 2
    inner = w.samples * w.outputs if primal else w.rest
    return {
        "sums" if primal else "kernel": inner * float(side) ** 2 / rate / distributed.size(),
        "ridge": ridge.STEPS * square * matvec,
        "solve": cubic * invert + (w.outputs * w.features * float(side) ** 2 / rate if primal else 0),
    }
