"""Which form of the step to take, and how much memory it needs, before any work is done."""

from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from fastntk.errors import InputError

Form = Literal["primal", "dual"]


@dataclass(frozen=True)
class Plan:
    """The chosen form, with the bytes that it takes at its peak and its floating-point operations."""

    form: Form
    bytes: int
    operations: float


def free_bytes(device: torch.device) -> int:
    """Memory that can be allocated on ``device`` now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def price(form: Form, samples: int, classes: int, rest: int, features: int, itemsize: int = 4) -> Plan:
    """What a form costs for n ``samples`` and C ``classes``.

    The tuned parameters number ``p = rest + C features`` (``features``: the head's inputs, 0 if it is frozen). Primal:
    four p x p matrices of float64 (sums, Gram matrix, factor, inverse); ``nC rest^2`` operations for the sums (half of
    them by symmetry, two each) and ``p^3`` for the inverse. Dual: three nC x nC matrices of float64 (kernel, factor,
    inverse) and twice the n Jacobians of ``itemsize`` bytes a number; ``(nC)^2 rest`` and ``(nC)^3`` operations.
    """
    rows, parameters = samples * classes, rest + classes * features
    if form == "primal":
        return Plan(form, 4 * 8 * parameters**2, rows * float(rest) ** 2 + float(parameters) ** 3)
    stored = itemsize * (rows * rest + samples * features)
    return Plan(form, 3 * 8 * rows**2 + 2 * stored, float(rows) ** 2 * rest + float(rows) ** 3)


def choose_form(
    samples: int,
    classes: int,
    rest: int,
    features: int,
    free: int,
    form: str = "auto",
    itemsize: int = 4,
) -> Plan:
    """The form with the fewer operations among those that fit into ``free`` bytes, or the one asked for if it fits.

    Raises:
        InputError: nothing fits; the message says what is needed, what there is, and what to choose instead.
    """
    forms: dict[str, tuple[Form, ...]] = {"auto": ("primal", "dual"), "primal": ("primal",), "dual": ("dual",)}
    if form not in forms:
        raise InputError(f"form must be 'auto', 'primal' or 'dual', not {form!r}.")
    plans = [price(each, samples, classes, rest, features, itemsize) for each in forms[form]]
    fitting = [plan for plan in plans if plan.bytes <= free]
    if fitting:
        return min(fitting, key=lambda plan: plan.operations)
    parameters = rest + classes * features
    needs = " and ".join(f"the {plan.form} form {plan.bytes / 1e9:.1f} GB" for plan in plans)
    raise InputError(
        f"the sums do not fit into memory: for {parameters:,} tuned parameters, {samples:,} samples and {classes} "
        f"classes {needs} would be needed, {free / 1e9:.1f} GB are free. Tune fewer parameters (for example "
        "'bn' or the head alone: primal grows with their square), or train on fewer samples (dual grows with theirs)."
    )
