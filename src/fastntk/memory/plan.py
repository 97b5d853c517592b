"""What preparing a memory will take, before any of it is done: every form's memory, arithmetic and time."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn
from torch.utils.data import Dataset

from fastntk.common.files import room
from fastntk.common.machine import elapsed, free_bytes, settle
from fastntk.jacobians.numerics import Numerics
from fastntk.memory.prepare import linearised, priced
from fastntk.solve.forms import FORMS
from fastntk.solve.prices import Price, Timing, Workload
from fastntk.solve.speeds import Speeds
from fastntk.tuning.loss import Loss
from fastntk.tuning.losses import CrossEntropy
from fastntk.tuning.recipe import Recipe

_LOOKED_AT = 16  # images, for how many classes are kept


@dataclass(frozen=True)
class Offer:
    """What one form would take.

    Attributes:
        form: of the step.
        bytes: at the peak, beside what the process holds already.
        disk: bytes of rows on disk.
        seconds: on this machine.
        first: seconds that the first request waits for beside its own.
        but: why it cannot be taken, or what speaks against it; empty for nothing.
    """

    form: str
    bytes: int
    disk: int
    seconds: float
    first: float
    but: str = ""


@dataclass(frozen=True)
class Plan:
    """What the form that is taken takes.

    Attributes:
        form: of the step.
        bytes: at the peak, beside what the process holds already.
        disk: bytes of rows on disk.
        operations: floating-point operations of the sums, the solve and the network.
        seconds: by phase, on this machine, from a calibration.
        first: seconds that the first request waits for beside its own, by phase.
        workload: what was planned for.
        retraining: seconds that a retraining of so many ``epochs`` would take.
        epochs: of it.
        offers: what every form would take, this one among them.
    """

    form: str
    bytes: int
    disk: int
    operations: float
    seconds: dict[str, float]
    first: dict[str, float]
    workload: Workload
    retraining: float
    epochs: int
    offers: tuple[Offer, ...]

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "total_seconds": self.total_seconds}

    def text(self) -> str:
        """For people."""
        w, later = self.workload, [f"first request {_phases(self.first)}, once"] if self.first else []
        return "\n".join(
            [
                f"{self.form} form: {w.parameters:,} tuned parameters, {w.samples:,} samples, {w.outputs} outputs each",
                f"peak memory   {self.bytes / 1e9:.2f} GB beside what the process holds already"
                + (f"\ndisk          {self.disk / 1e9:.2f} GB of rows, which requests read" if self.disk else ""),
                f"arithmetic    {self.operations:.2e} floating-point operations",
                f"time          {_phases(self.seconds)}; estimated from a short calibration",
                *later,
                f"retraining    {self.retraining:.1f} s for {self.epochs} epochs; preparing in these, then with a "
                "first request:",
                *(f"  {self._told(each)}" for each in self.offers),
            ]
        )

    def _told(self, offer: Offer) -> str:
        """A form in a line."""
        size = f"{offer.bytes / 1e9:6.2f} GB" + (f" and {offer.disk / 1e9:.2f} GB" if offer.disk else "")
        but = "taken" if offer.form == self.form else offer.but
        shares = f"{offer.seconds / self.retraining:8.2f}{(offer.seconds + offer.first) / self.retraining:8.2f}"
        return f"{offer.form:<12}{shares}  {size}  {but}".rstrip()

    @property
    def total_seconds(self) -> float:
        """The time of all phases."""
        return sum(self.seconds.values())


def _phases(seconds: dict[str, float]) -> str:
    """Seconds in all, and of each phase."""
    return f"{sum(seconds.values()):.1f} s: " + ", ".join(f"{name} {each:.1f}" for name, each in seconds.items())


def plan(
    model: nn.Module,
    train: Dataset,
    *,
    form: str = "auto",
    classes: int | str = "auto",
    loss: Loss = CrossEntropy(),
    epochs: int = Recipe.epochs,
    checkpoint: Path | str | None = None,
    numerics: Numerics = Numerics(),
    **changes: object,
) -> Plan:
    """What ``prepare`` with the same arguments will take, with times from a calibration of some seconds.

    The model need not be fitted: times and sizes do not depend on the values of its parameters, but for how many
    classes are kept, which is looked at on few images here.

    Args:
        model: as for ``prepare``, like ``train``, ``form``, ``classes``, ``loss``, ``numerics`` and its ``changes``.
        train: the training set.
        form: of ``fastntk.solve.forms``, or ``"auto"``.
        classes: that the convex forms keep.
        loss: of the fit.
        epochs: of the retraining that preparing is compared with.
        checkpoint: the folder that ``prepare`` will be given, on whose disk rows are then kept.
        numerics: how to compute.

    Raises:
        InputError: like ``prepare``.
    """
    Recipe(epochs=epochs)  # checks it
    settle()
    started = time.perf_counter()
    place = Path(checkpoint) if checkpoint else None
    network = linearised(model, train, loss, replace(numerics, **changes))  # type: ignore[arg-type]
    network, work, price = priced(network, form, classes, place, first=_LOOKED_AT)
    trial = {"trial": elapsed(started, network.device)}  # as prepare makes it too
    speeds = Speeds(network, price.batch or work.batch_size)
    timings = {name: kind.timing(work, speeds) for name, kind in FORMS.items()}
    training = epochs * work.samples * speeds.training.seconds
    free = free_bytes(network.device), room(place)
    offers = tuple(_offer(FORMS[name].price(work), each, price.form, *free) for name, each in timings.items())
    taken = timings[price.form]
    operations, seconds = price.operations + taken.operations, {**trial, **taken.seconds}
    return Plan(price.form, price.bytes, price.disk, operations, seconds, taken.first, work, training, epochs, offers)


def _offer(price: Price, timing: Timing, taken: str, free: int, disk: int) -> Offer:
    """What a form would take, where so many bytes of memory and of disk are free."""
    but = "" if price.form == taken else _against(price, free, disk)
    seconds, first = (sum(each.values(), 0.0) for each in (timing.seconds, timing.first))
    return Offer(price.form, price.bytes, price.disk, seconds, first, but)


def _against(price: Price, free: int, disk: int) -> str:
    """What speaks against a form, or nothing."""
    if price.refusal:
        return price.refusal
    if price.bytes > free:
        return f"does not fit into {free / 1e9:.1f} GB"
    if price.disk > disk:
        return f"does not fit onto {disk / 1e9:.1f} GB of disk"
    return price.drawback
