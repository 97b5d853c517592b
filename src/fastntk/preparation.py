"""The one pass over the training data."""

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastntk.data import checked
from fastntk.errors import InputError
from fastntk.jacobian import Jacobian, PerSampleJacobian
from fastntk.loss import SquaredLoss
from fastntk.memory import Memory
from fastntk.plan import Form, Plan, choose_form, free_bytes
from fastntk.progress import busy
from fastntk.ridge import Calibration, calibrate
from fastntk.statistics import Rows, Sums, stream, total
from fastntk.step import DualSolution, PrimalSolution, Solution
from fastntk.tunable import snapshot, tuned

log = logging.getLogger(__name__)


def prepare(
    model: nn.Module,
    train: Dataset,
    initial: Mapping[str, Tensor],
    *,
    ridge: float | str = "auto",
    form: str = "auto",
    loss: SquaredLoss = SquaredLoss(),
    batch_size: int = 64,
    probe: int = 64,
    seed: int = 0,
) -> Memory:
    """One pass over the training data, after which ``memory.forget`` needs only the forgotten samples.

    Denormal numbers are flushed to zero in this process from then on (``torch.set_flush_denormal``): on some processors
    they make Jacobians ten times slower.

    Args:
        model: fitted, in eval mode, with the tuned parameters requiring gradients. It is not changed.
        train: the map-style dataset it was fitted to; a sample's id is its index.
        initial: the tuned parameters before fitting, ``fit(...).initial``.
        ridge: the total L2 pull toward ``initial``, or ``"auto"``: see ``fastntk.ridge.calibrate``.
        form: ``"primal"``, ``"dual"`` or ``"auto"``: see ``fastntk.plan.choose_form``.
        loss: the one it was fitted with.
        batch_size: images a batch of Jacobians.
        probe: how many retained samples serve to check every request: the first ones that are still there, in an
            order drawn once.
        seed: of that draw.

    Raises:
        InputError: ``initial`` does not belong to the model, a layer is in training mode, the data are not fit for use,
            or neither form fits into memory.
    """
    if ridge != "auto" and not (isinstance(ridge, float | int) and 0 < ridge < float("inf")):
        raise InputError(f"the ridge must be a positive number or 'auto', not {ridge!r}.")
    torch.set_flush_denormal(True)
    anchor = snapshot(tuned(model))
    _check_initial(initial, tuned(model))
    if len(train) < 2:  # type: ignore[arg-type]
        raise InputError("the training set needs at least 2 samples.")
    jacobian = PerSampleJacobian(model, anchor)
    device = next(iter(anchor.values())).device
    image = checked(torch.as_tensor(train[0][0]))[None].to(device)
    layout, count = jacobian.layout(image), len(train)  # type: ignore[arg-type]
    plan = _plan(jacobian(image), count, free_bytes(device), form)
    displacement = layout.flatten(anchor) - layout.flatten(initial)
    statistics = _collect(stream(jacobian, train, loss, batch_size, "one pass over the training data"), plan.form)
    solution, calibration = _solve(statistics, displacement, ridge)
    present = torch.ones(count, dtype=torch.bool)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return Memory(model, train, loss, jacobian, layout, solution, calibration, present, order, probe)


def _solve(statistics: Sums | Rows, displacement: Tensor, ridge: float | str) -> tuple[Solution, Calibration | None]:
    """The solution at the given ridge, or at the calibrated one."""
    kernel = statistics.kernel() if isinstance(statistics, Rows) else None
    with busy("choosing the ridge, solving"):
        calibration = calibrate(statistics, displacement, kernel) if ridge == "auto" else None
        total = calibration.ridge if calibration else float(ridge)
        if isinstance(statistics, Rows):
            return DualSolution.of(statistics, displacement, total, kernel), calibration
        return PrimalSolution.of(statistics, displacement, total), calibration


def _plan(one: Jacobian, samples: int, free: int, form: str) -> Plan:
    """The form to take, logged with its memory, given the Jacobian of one image."""
    _, classes, rest = one.rest.shape
    plan = choose_form(samples, classes, rest, one.features.shape[1], free, form, one.rest.element_size())
    log.info("%s form: up to %.1f GB of memory, of %.1f GB free", plan.form, plan.bytes / 1e9, free / 1e9)
    return plan


def _collect(batches: Iterable[tuple[Jacobian, Tensor]], form: Form) -> Sums | Rows:
    """The statistics of a set, streamed (primal) or stored (dual)."""
    if form == "dual":
        return Rows.of(batches)
    return total(Sums.of(j, r) for j, r in batches)


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
