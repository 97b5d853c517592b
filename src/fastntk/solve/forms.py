"""The forms that a memory can take, and which of them is chosen. A new form is one file and one line here."""

from collections.abc import Iterable

from fastntk.common.errors import InputError
from fastntk.solve.convex import Convex
from fastntk.solve.dual import Dual
from fastntk.solve.iterative import Iterative
from fastntk.solve.layerwise import Layerwise
from fastntk.solve.on_disk import OnDisk
from fastntk.solve.prices import Price, Workload
from fastntk.solve.primal import Primal
from fastntk.solve.solution import Solution

FORMS: dict[str, type[Solution]] = {form.name: form for form in (Primal, Dual, Convex, OnDisk, Layerwise, Iterative)}
"""By name."""


def prices(work: Workload, form: str = "auto") -> list[Price]:
    """What the form of that name, or with ``"auto"`` each of them, takes.

    Raises:
        InputError: there is none of that name.
    """
    if form not in ("auto", *FORMS):
        raise InputError(f"form must be 'auto', {', '.join(map(repr, FORMS))}, not {form!r}.")
    return [kind.price(work) for name, kind in FORMS.items() if form in ("auto", name)]


def cheapest(offered: Iterable[Price], free: int, room: int) -> Price | None:
    """The price of the lowest rank, and of these with the fewest operations and the least reading, among those that fit
    into ``free`` bytes of memory and ``room`` bytes of disk; None if nothing does. It depends on the prices alone."""
    fitting = [price for price in offered if price.bytes <= free and price.disk <= room and not price.refusal]
    return min(fitting, key=lambda price: (price.rank, price.operations + price.reading), default=None)


def chosen(work: Workload, free: int, form: str = "auto", room: int = 0) -> Price:
    """The form to take: the ``cheapest``, or the one asked for if it fits. ``free`` are bytes of memory, ``room`` of
    disk.

    Raises:
        InputError: nothing fits; the message says what is needed, what there is, and what to choose instead.
    """
    offered = prices(work, form)
    found = cheapest(offered, free, room)
    if found:
        return found
    fit_for_use = [price for price in offered if not price.refusal]
    refusals = " ".join(price.refusal for price in offered if price.refusal)
    if not fit_for_use:
        raise InputError(refusals)
    needs = ", ".join(f"the {price.form} form {price}" for price in fit_for_use)
    remedy = f"{offered[0].remedy}; " if len(offered) == 1 and offered[0].remedy else ""
    last = refusals or "Or take the matrix-free form, which grows with neither."
    raise InputError(
        f"the step does not fit into memory: for {work.parameters:,} tuned parameters, {work.samples:,} samples and "
        f"{work.outputs} outputs it needs {needs}; {free / 1e9:.1f} GB are free, and {room / 1e9:.1f} "
        f"GB of disk. Remedies: {remedy}tune fewer "
        "parameters (for example 'bn' or the head alone: primal grows with their square), or train on fewer samples "
        f"(dual grows with theirs). {last[0].upper()}{last[1:]}"
    )
