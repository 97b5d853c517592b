"""The one pass over the training data."""

import logging
import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastntk.common import distributed
from fastntk.common.errors import InputError
from fastntk.common.machine import settle
from fastntk.common.progress import busy
from fastntk.jacobians import combinations as probes
from fastntk.jacobians.combinations import ClassProbes
from fastntk.jacobians.jacobian import PerSampleJacobian
from fastntk.jacobians.linearised import Linearised
from fastntk.memory.members import Members
from fastntk.memory.memory import Memory
from fastntk.memory.plan import Form, chosen, free_bytes
from fastntk.memory.state import Solution
from fastntk.solve.collect import Checkpoint, collect_rows, collect_sums, key
from fastntk.solve.head import short_of_head
from fastntk.solve.iterative import GramOperator, MatrixFreeSolution
from fastntk.solve.primal import DualSolution, PrimalSolution
from fastntk.solve.ridge import Calibration, calibrate
from fastntk.solve.sums import Rows, Sums
from fastntk.tuning.loss import Loss, SquaredLoss
from fastntk.tuning.selectors import snapshot, tuned

log = logging.getLogger(__name__)


def prepare(
    model: nn.Module,
    train: Dataset,
    initial: Mapping[str, Tensor],
    *,
    ridge: float | str = "auto",
    form: str = "auto",
    loss: Loss = SquaredLoss(),
    batch_size: int = 64,
    workers: int = 0,
    dtype: torch.dtype = torch.float64,
    precision: str = "full",
    class_probes: int | None = None,
    probe: int = 24,
    seed: int = 0,
    checkpoint: Path | None = None,
) -> Memory:
    """One pass over the training data, after which ``memory.forget`` needs only the forgotten samples.

    Denormal numbers are flushed to zero in this process from then on, and freed memory is kept for the next batch (see
    ``fastntk.common.machine.settle``). In a job of several processes (``fastntk.common.distributed``) each takes its share of the
    samples, and all end with the same memory.

    Args:
        model: fitted, in eval mode, with the tuned parameters requiring gradients. It is not changed.
        train: the map-style dataset it was fitted to; a sample's id is its index.
        initial: the tuned parameters before fitting, ``fit(...).initial``.
        ridge: the total L2 pull toward ``initial``, or ``"auto"``: see ``fastntk.solve.ridge.calibrate``.
        form: ``"primal"``, ``"dual"``, ``"matrix-free"`` or ``"auto"``: see ``fastntk.memory.plan.choose_form``.
        loss: the one it was fitted with.
        batch_size: images a batch of Jacobians, at most; fewer where a batch's Jacobians would take over 1 GiB.
        workers: processes that read images ahead.
        dtype: of the primal form's sums and products. ``torch.float32`` halves their memory; sums that samples are
            taken away from lose digits with it, so that a solve may come out less exact.
        precision: of the network's arithmetic, ``"full"``, ``"tf32"`` or ``"bf16"``: see ``fastntk.jacobians.numerics``.
        class_probes: replace the C logits of each sample by this many random combinations: see ``fastntk.jacobians.combinations``.
            The error of the Gram matrix is measured on the first samples and logged.
        probe: how many retained samples serve to check every request: the first ones that are still there, in an
            order drawn once.
        seed: of that draw, and of the class probes.
        checkpoint: a folder for the primal form's partial sums. A preparation that was cut off and is called again
            goes on from there. They are removed when the pass is complete.

    Raises:
        InputError: ``initial`` does not belong to the model, a layer is in training mode, the data are not fit for use,
            or no form fits into memory.
    """
    if ridge != "auto" and not (isinstance(ridge, float | int) and 0 < ridge < float("inf")):
        raise InputError(f"the ridge must be a positive number or 'auto', not {ridge!r}.")
    settle()
    anchor = snapshot(tuned(model))
    _check_initial(initial, tuned(model))
    draws = None if class_probes is None else ClassProbes(class_probes, seed)
    jacobian = PerSampleJacobian(model, anchor)
    linearised = Linearised(jacobian, Members(train), loss, batch_size, workers, precision, draws)
    options = {"ridge": ridge, "form": form, "dtype": str(dtype).removeprefix("torch."), "probe": probe, "seed": seed}
    return _prepared(linearised, initial, options, checkpoint)


def refresh(memory: Memory, checkpoint: Path | None = None) -> float:
    """Linearise the network anew where its parameters are now, by one pass over the members; returns the seconds.

    The anchor, which was fitted to samples that have been forgotten since, is replaced by the parameters after all
    requests; so the predictions are good again, and nothing in the memory has been computed at weights that saw them.
    The options are those of ``prepare``, an automatic ridge is found anew. If the memory is kept in a folder it is
    rewritten there, as by ``purge``.

    Args:
        memory: made by ``prepare`` or ``load``, with a data source that has all of its members.
        checkpoint: as for ``prepare``.

    Raises:
        InputError: a member is missing in the data source or has changed, or the disk is full; nothing changes then.
    """
    settle()
    return memory.replace_(lambda: _refreshed(memory, checkpoint))


def check_complete(memory: Memory) -> None:
    """Raises ``InputError`` if a member's sample is missing in the data source or has changed; one forward pass."""
    present = memory.present.nonzero()[:, 0]
    missing = memory.members.missing(present)
    if missing:
        raise InputError(f"the data source lacks {missing:,} of the memory's {len(present):,} samples.")
    memory.check(present)


def _refreshed(memory: Memory, checkpoint: Path | None) -> Memory:
    check_complete(memory)
    old, members = memory.linearised, Members(memory.members.source, memory.ids)
    jacobian = PerSampleJacobian(memory.model, memory.parameters, old.layout)
    linearised = replace(old, jacobian=jacobian, train=members)
    return _prepared(linearised, memory.initial, memory.record["options"], checkpoint)


def _prepared(
    linearised: Linearised, initial: Mapping[str, Tensor], options: Mapping[str, Any], checkpoint: Path | None
) -> Memory:
    """The memory of all members of ``linearised``."""
    count, dtype = len(linearised.train), getattr(torch, options["dtype"])  # type: ignore[arg-type]
    if count < 2:
        raise InputError("the training set needs at least 2 samples.")
    linearised, taken = _planned(linearised, options["form"], dtype)
    layout = linearised.layout
    displacement = layout.flatten(linearised.jacobian.parameters) - layout.flatten(initial)
    given = None if options["ridge"] == "auto" else float(options["ridge"])
    partial = Checkpoint(checkpoint, key(linearised, count, dtype)) if checkpoint and taken == "primal" else None
    solution, residuals, calibration = _solve(linearised, taken, displacement, given, dtype, partial)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(options["seed"]))
    versions = {name: version(name) for name in ("fastntk", "torch")} | {"python": platform.python_version()}
    record = {"versions": versions, "options": options}
    short = short_of_head(linearised, solution)
    return Memory(linearised, solution, residuals, calibration, order, options["probe"], record, None, short)


def _planned(linearised: Linearised, form: str, dtype: torch.dtype) -> tuple[Linearised, Form]:
    """The form to take, and the batches that fit; logged with the memory that they need."""
    plan, free = chosen(linearised, form, dtype), free_bytes(linearised.device)
    log.info("%s form: up to %.1f GB of memory, of %.1f GB free", plan.form, plan.bytes / 1e9, free / 1e9)
    if linearised.probes:
        log.info("class probes: %s", _probe_error(linearised))
    return replace(linearised, batch_size=plan.workload.batch_size), plan.form


def _probe_error(linearised: Linearised) -> str:
    """How far the probed Gram matrix is off, on a few samples, in words."""
    ids = range(min(16, len(linearised.train)))  # type: ignore[arg-type]
    exact, probed = replace(linearised, probes=None).rows(ids).jacobian, linearised.rows(ids).jacobian
    return (
        f"the Gram matrix of the first {len(ids)} samples is off by {probes.error(exact, probed):.0%} (Frobenius norm, "
        "against all classes), which falls with the square root of the number of samples; an answer to a request for "
        "few samples is off by much more"
    )


def _solve(
    linearised: Linearised,
    form: Form,
    displacement: Tensor,
    ridge: float | None,
    dtype: torch.dtype,
    checkpoint: Checkpoint | None,
) -> tuple[Solution, Tensor, Calibration | None]:
    """The solution over all samples, at the given ridge or the calibrated one (None), and their residuals."""
    count = len(linearised.train)  # type: ignore[arg-type]
    if form == "matrix-free":
        operator = GramOperator(linearised, range(count))
        residuals = linearised.residuals(range(count))
        solution, calibration = MatrixFreeSolution.of(operator, displacement, ridge, linearised.dtype)
        return solution, residuals, calibration
    statistics: Sums | Rows
    if form == "dual":
        statistics = collect_rows(linearised, count)
        residuals = statistics.residual.clone()
    else:
        statistics, residuals = collect_sums(linearised, count, dtype, checkpoint)
    solved = _direct(statistics, displacement, ridge) if distributed.rank() == 0 else None
    if checkpoint:
        checkpoint.clear()
    solved = solved if solved and not distributed.active() else _shared(solved, linearised.device)
    return solved[0], residuals, solved[1]


def _direct(statistics: Sums | Rows, displacement: Tensor, ridge: float | None) -> tuple[Solution, Calibration | None]:
    """The solution of a linear problem whose statistics are complete."""
    kernel = statistics.kernel() if isinstance(statistics, Rows) else None
    with busy("choosing the ridge, solving"):
        calibration = calibrate(statistics, displacement, kernel) if ridge is None else None
        total = calibration.ridge if calibration else float(ridge or 0)
        if isinstance(statistics, Rows):
            return DualSolution.of(statistics, displacement, total, kernel), calibration
        return PrimalSolution.of(statistics, displacement, total), calibration


def _shared(
    solved: tuple[Solution, Calibration | None] | None, device: torch.device
) -> tuple[Solution, Calibration | None]:
    """What the first process solved, for every process."""
    parcel, tensors = None, {}
    if solved:
        solution, calibration = solved
        tensors = {name: tensor.contiguous() for name, tensor in solution.tensors().items()}
        parcel = type(solution), solution.ridge, calibration, {n: (t.shape, t.dtype) for n, t in tensors.items()}
    make, ridge, calibration, kinds = distributed.shared(parcel)
    if not solved:
        tensors = {name: torch.empty(shape, dtype=kind, device=device) for name, (shape, kind) in kinds.items()}
    distributed.share_(tensors.values())
    return make.from_tensors(tensors, ridge), calibration


def _check_initial(initial: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    if set(initial) != set(parameters):
        odd = sorted(set(initial) ^ set(parameters))[0]
        raise InputError(f"`initial` does not hold the model's tuned parameters: they differ in {odd!r}.")
    for name, parameter in parameters.items():
        if initial[name].shape != parameter.shape:
            raise InputError(
                f"`initial` has shape {list(initial[name].shape)} for {name!r}, not {list(parameter.shape)}."
            )
    if all(initial[name].data_ptr() == parameters[name].data_ptr() for name in parameters):
        raise InputError(
            "`initial` is the model's own parameters, not a copy from before fitting. Pass fit(...).initial, or take "
            "fastntk.snapshot(params) before your own loop."
        )
