"""What preparing a memory will take, before any of it is done: form, memory, arithmetic and time."""

from dataclasses import asdict, dataclass, replace

from torch import nn
from torch.utils.data import Dataset

from fastntk.common.machine import settle
from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.numerics import Numerics
from fastntk.memory.prepare import linearised, priced
from fastntk.solve.forms import FORMS
from fastntk.solve.prices import Price, Workload
from fastntk.tuning.loss import CrossEntropy, Loss


@dataclass(frozen=True)
class Plan:
    """What the form that is taken takes.

    Attributes:
        form: of the step.
        bytes: at the peak, beside what the process holds already.
        disk: bytes of rows on disk.
        operations: floating-point operations of the sums, the solve and the network.
        seconds: by phase, on this machine, from a calibration.
        workload: what was planned for.
    """

    form: str
    bytes: int
    disk: int
    operations: float
    seconds: dict[str, float]
    workload: Workload

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "total_seconds": self.total_seconds}

    def text(self) -> str:
        """For people."""
        w, phases = self.workload, ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        return "\n".join(
            [
                f"{self.form} form: {w.parameters:,} tuned parameters, {w.samples:,} samples, {w.outputs} outputs each",
                f"peak memory   {self.bytes / 1e9:.2f} GB beside what the process holds already"
                + (f"\ndisk          {self.disk / 1e9:.2f} GB of rows, which requests read" * bool(self.disk)),
                f"arithmetic    {self.operations:.2e} floating-point operations",
                f"time          {self.total_seconds:.1f} s, estimated from a short calibration: {phases}",
            ]
        )

    @property
    def total_seconds(self) -> float:
        """The time of all phases."""
        return sum(self.seconds.values())


def plan(
    model: nn.Module,
    train: Dataset,
    *,
    form: str = "auto",
    classes: int | str = "auto",
    loss: Loss = CrossEntropy(),
    numerics: Numerics = Numerics(),
    **changes: object,
) -> Plan:
    """What ``prepare`` with the same arguments will take, with times from a calibration of some seconds.

    The model need not be fitted: times and sizes do not depend on the values of its parameters.

    Raises:
        InputError: like ``prepare``.
    """
    settle()
    network = linearised(model, train, loss, replace(numerics, **changes))  # type: ignore[arg-type]
    return timed(*priced(network, form, classes))


def timed(network: Linearised, work: Workload, price: Price) -> Plan:
    """The plan of a form, with the time of every phase on this machine."""
    timing = FORMS[price.form].timing(work, FORMS[price.form].adapted(network, work.kept))
    return Plan(price.form, price.bytes, price.disk, price.operations + timing.operations, timing.seconds, work)
