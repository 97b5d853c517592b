"""Figures over the requests of a grid, from stored results alone: by loss, kind of request, method and settings."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from statistics import mean, median, stdev
from typing import Any

from fastntk.evidence.bench.config import CHOSEN
from fastntk.evidence.bench.results import Cell
from fastntk.evidence.measures import PARTS, RATIOS
from fastntk.evidence.recovery import STEPS
from fastntk.evidence.report import ORIGINAL, is_retrained
from fastntk.memory.audit import LIMIT_DOUBT
from fastntk.memory.certificate import VERDICTS

POINTS = 3.0
"""An accuracy is off that differs by more from a retrained model's."""

KINDS = {"class": "class", "random 10%": "tenth", "random 1%": "hundredth"}
"""What requests are called; others by themselves."""

THEIRS = "retrained models"
"""The row of all retrained models together: the mean over them."""

FAR = 1000.0
"""How many times as far as retrained models from each other an answer counts whose outputs are not finite."""

_UNTOLD = {**dict.fromkeys(RATIOS.values(), FAR), "relearn_steps": STEPS + 1.0}


@dataclass(frozen=True)
class Number:
    """A number of a row on one request, whose median a summary has."""

    heading: str
    of: Callable[[Cell, str], float | None]
    decimals: int = 2


def row_of(method: str, settings: str) -> str:
    """The name of a method's row with its ``default`` or its ``chosen`` settings."""
    return method if settings == "default" else f"{method}{CHOSEN}"


def methods_of(cells: Iterable[Cell]) -> list[str]:
    """The names of all methods in any cell."""
    rows = (row for cell in cells for row in cell.rows if row != ORIGINAL and not is_retrained(row))
    return list({row.removesuffix(CHOSEN): None for row in rows})


def retrained_of(cell: Cell) -> list[str]:
    """The names of the retrained models' rows."""
    return list(filter(is_retrained, cell.rows))


def kind_of(cell: Cell) -> str:
    """What a cell's request is called."""
    return KINDS.get(cell.request, cell.request)


def groups(cells: Sequence[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """The cells of each loss and kind of request."""
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.setting.loss, kind_of(cell)), []).append(cell)
    return found


def value(cell: Cell, row: str, measure: str) -> float | None:
    """A measure of a row; of ``THEIRS`` the mean over all retrained models. A ratio that could not be told is ``FAR``,
    and relearning that took more than the steps that it was given takes one more."""
    if row == THEIRS:
        return middle((value(cell, name, measure) for name in retrained_of(cell)), mean)
    found = cell.rows.get(row)
    if found is None or measure not in found:  # or of a measure that is newer than the results
        return None
    return _UNTOLD.get(measure) if found[measure] is None else found[measure]


def _beside(measure: str) -> Callable[[Cell, str], float | None]:
    """How much more than the retrained models' mean."""

    def figure(cell: Cell, row: str) -> float | None:
        own, theirs = value(cell, row, measure), value(cell, THEIRS, measure)
        return None if own is None or theirs is None else own - theirs

    return figure


def off(cell: Cell, row: str) -> float | None:
    """The share of retrained models from which an accuracy on any set differs by more than ``POINTS``."""
    if row != THEIRS and row not in cell.rows:
        return None
    rows = retrained_of(cell) if row == THEIRS else [row]
    pairs = [(one, other) for one in rows for other in retrained_of(cell) if one != other]
    return sum(_far(cell, *pair) for pair in pairs) / len(pairs) if pairs else None


def _far(cell: Cell, *pair: str) -> bool:
    accuracies = ([cell.rows[name][f"{part}_accuracy"] or 0.0 for name in pair] for part in PARTS)
    return any(abs(one - other) > POINTS for one, other in accuracies)


def relearned_within(cell: Cell, row: str) -> float | None:
    """1 if relearning on retained data gives back as much as of one of the retrained models but one, or between, else
    0: the mean over which of them is left out. Of the retrained models the mean, each beside the others, so that all
    rows stand beside equally many."""
    if row == THEIRS:
        return middle((relearned_within(cell, name) for name in retrained_of(cell)), mean)
    own, names = value(cell, row, "relearned_without"), retrained_of(cell)
    left_out = [row] if row in names else names
    beside = ([value(cell, each, "relearned_without") for each in names if each != out] for out in left_out)
    return middle((_between(own, [each for each in some if each is not None]) for some in beside), mean)


def _between(own: float | None, ends: Sequence[float]) -> float | None:
    return float(min(ends) <= own <= max(ends)) if own is not None and ends else None


def _seconds(before: Callable[[Cell, str, str], float], cell: Cell, row: str) -> float | None:
    """Of an answer and of what goes before it, over retraining's."""
    own, retraining = value(cell, row, "seconds"), value(cell, THEIRS, "seconds")
    if own is None or not retraining or row in (ORIGINAL, THEIRS):
        return None
    method = row.removesuffix(CHOSEN)
    return (own + before(cell, row, method)) / retraining


def _nothing(cell: Cell, row: str, method: str) -> float:
    return 0.0


def _preparing(cell: Cell, row: str, method: str) -> float:
    return cell.facts["prepare_seconds"] if method in cell.facts["prepared"] else 0.0


def _choosing(cell: Cell, row: str, method: str) -> float:
    """Preparing, what the choice of its settings took, and the audit that a gain comes from."""
    chosen, audit = cell.facts["chosen"].get(method), cell.facts["audit"]
    choice = chosen["seconds"] if row.endswith(CHOSEN) and chosen else 0.0
    audited = audit["seconds"] if audit and method in cell.facts["audited"] else 0.0
    return _preparing(cell, row, method) + choice + audited


NUMBERS = {
    "ratio_logits": Number("ratio, logits", lambda cell, row: value(cell, row, RATIOS["logits"])),
    "ratio_probabilities": Number("ratio, probabilities", lambda cell, row: value(cell, row, RATIOS["probabilities"])),
    "gap": Number("gap", lambda cell, row: value(cell, row, "average_gap"), 1),
    "membership": Number("member, points more", _beside("membership"), 1),
    "relearn_forgotten": Number("relearn F, steps more", _beside("relearn_steps"), 1),
    "relearn_retained": Number("relearn R, points more", _beside("relearned_without"), 1),
    "moved": Number("moved", lambda cell, row: value(cell, row, "moved")),
    "request_fraction": Number("time", partial(_seconds, _nothing), 3),
    "prepared_fraction": Number("with preparing", partial(_seconds, _preparing)),
    "chosen_fraction": Number("with choosing", partial(_seconds, _choosing)),
}
"""What a summary has the medians of. Times are of retraining; the first is from a prepared memory."""

SHARES: dict[str, Callable[[Cell, str], float | None]] = {"off": off, "relearn_retained_within": relearned_within}
"""What it has the means of."""


def summarise(cells: Sequence[Cell], ours: str) -> dict[str, Any]:
    """Of every loss, kind of request, method and settings the figures over its requests, and how ``ours`` did.

    ``rows``: with ``NUMBERS`` (medians) and ``SHARES`` (means); ``ratio`` is that in the loss's own unit, ``low`` and
    ``high`` bound the 95 % interval of its median, ``intervals`` those of all medians (None below six requests);
    ``nearer`` is that of the median over requests of the ratio over that of ``ours``, with its chosen settings where
    there are any: above 1 throughout, ours is nearer to retraining. ``gap_retrained`` and ``off_retrained`` are the
    retrained models' own, ``ratio_deviation`` the standard deviation of their own ratios (the median over requests).

    ``flags``: of all answers of ``ours`` that an audit speaks of (``audited``), how many were off by more than 3 points
    from the retrained models' mean (``bad``), and how many of these and of the others the verdict had flagged.
    ``doubt``: how many of the retrained models' accuracies on the forgotten samples lay within the doubt of such an
    answer's. ``kinds``: both for each kind of request.
    """
    rows = [
        _row(group, loss, kind, method, settings, ours)
        for (loss, kind), group in groups(cells).items()
        for method in (ORIGINAL, THEIRS, *methods_of(group))
        for settings in ("default", "chosen")
        if (method, settings) == (THEIRS, "default") or any(row_of(method, settings) in cell.rows for cell in group)
    ]
    judged = audited(cells, ours)
    kinds = {
        kind: {"flags": flags(some), "doubt": covered(some)}
        for kind in dict.fromkeys(map(kind_of, cells))
        if (some := [each for each in judged if kind_of(each[0]) == kind])
    }
    whole = {"flags": flags(judged), "doubt": covered(judged), "kinds": kinds}
    return {"cells": len(cells), "ours": ours, "rows": rows, **whole}


def label_of(row: Mapping[str, Any]) -> str:
    """What a row of a summary is called."""
    return row["method"] if row["method"] in (ORIGINAL, THEIRS) else f"{row['method']}, {row['settings']}"


def own_row(cell: Cell, ours: str) -> str:
    """The row of ``ours``: with chosen settings where there are any."""
    chosen = row_of(ours, "chosen")
    return chosen if chosen in cell.rows else ours


def is_ours(method: str, ours: str) -> bool:
    """Whether it is ``ours``, or that and more: finished in another way."""
    return method == ours or method.startswith(f"{ours}_")


def audited(cells: Iterable[Cell], ours: str) -> list[tuple[Cell, str]]:
    """The answers of ``ours``, however finished, that an audit speaks of: with its gain or none, not with another."""
    pairs = ((cell, row) for cell in cells for row in cell.rows if is_ours(row.removesuffix(CHOSEN), ours))
    return [(cell, row) for cell, row in pairs if value(cell, row, "doubt") is not None]


def _row(group: Sequence[Cell], loss: str, kind: str, method: str, settings: str, ours: str) -> dict[str, Any]:
    row = row_of(method, settings)
    cells = [cell for cell in group if row == THEIRS or row in cell.rows]
    unit = cells[0].facts["unit"]
    intervals = {name: interval(number.of(cell, row) for cell in cells) for name, number in NUMBERS.items()}
    low, high = intervals[f"ratio_{unit}"] or (None, None)
    return {
        "loss": loss,
        "kind": kind,
        "method": method,
        "settings": settings,
        "requests": len(cells),
        "unit": unit,
        **{name: middle(number.of(cell, row) for cell in cells) for name, number in NUMBERS.items()},
        **{name: middle((share(cell, row) for cell in cells), mean) for name, share in SHARES.items()},
        "gap_retrained": middle(value(cell, THEIRS, "average_gap") for cell in cells),
        "off_retrained": middle((off(cell, THEIRS) for cell in cells), mean),
        "ratio": middle(value(cell, row, RATIOS[unit]) for cell in cells),
        "ratio_deviation": middle(_deviation(cell, RATIOS[unit]) for cell in cells),
        "low": low,
        "high": high,
        "intervals": intervals,
        "nearer": interval(_over_ours(cell, row, ours) for cell in cells),
    }


def _over_ours(cell: Cell, row: str, ours: str) -> float | None:
    """The ratio of a row over that of ours."""
    theirs, own = (value(cell, name, RATIOS[cell.facts["unit"]]) for name in (row, own_row(cell, ours)))
    return theirs / own if theirs is not None and own else None


def _deviation(cell: Cell, measure: str) -> float | None:
    """The standard deviation of a measure over the retrained models."""
    known = [each for name in retrained_of(cell) if (each := value(cell, name, measure)) is not None]
    return stdev(known) if len(known) > 1 else None


def flags(judged: Sequence[tuple[Cell, str]]) -> dict[str, int]:
    """How many answers are off, and of these and of the others, how many were flagged and how many doubted."""
    counts: dict[str, int] = {}
    for name, wanted in (("bad", True), ("good", False)):
        part = [(cell, row) for cell, row in judged if _off_their_mean(cell, row) is wanted]
        counts |= {
            name: len(part),
            f"{name}_and_flagged": sum(verdict_of(*each) not in ("trusted", None) for each in part),
            f"{name}_and_doubted": sum((value(*each, "doubt") or 0.0) > LIMIT_DOUBT for each in part),
        }
    return counts


def covered(judged: Sequence[tuple[Cell, str]]) -> dict[str, int]:
    """Of how many retrained models the accuracy on the forgotten samples lay within the doubt of the answer's."""
    hits = [
        abs((value(cell, row, "forget_accuracy") or 0.0) - (cell.rows[name]["forget_accuracy"] or 0.0)) <= doubt
        for cell, row in judged
        if (doubt := value(cell, row, "doubt")) is not None
        for name in retrained_of(cell)
    ]
    return {"models": len(hits), "within": sum(hits)}


def verdict_of(cell: Cell, row: str) -> str | None:
    """The certificate's; None of a method that gives none."""
    verdict = cell.facts["notes"].get(row, "").partition(":")[0]
    return verdict if verdict in VERDICTS else None


def _off_their_mean(cell: Cell, row: str) -> bool:
    """Whether an accuracy differs from the retrained models' mean by more than ``POINTS``."""
    gaps = (_beside(f"{part}_accuracy")(cell, row) or 0.0 for part in PARTS)
    return any(abs(gap) > POINTS for gap in gaps)


def interval(values: Iterable[float | None]) -> list[float] | None:
    """The 95 % interval of the median: the innermost two of the values, in their order, that have it between them with
    that probability, whatever the distribution (binomial). None below six values: all of them together have less."""
    from scipy.stats import quantile_test  # a second to import

    known = [value for value in values if value is not None]
    if not known:
        return None
    ends = [float(end) for end in quantile_test(known, p=0.5).confidence_interval(0.95)]
    return ends if isfinite(sum(ends)) else None


def middle(values: Iterable[float | None], of: Callable[[list[float]], float] = median) -> float | None:
    """The median of those that are known, or another number ``of`` them."""
    known = [value for value in values if value is not None]
    return float(of(known)) if known else None
