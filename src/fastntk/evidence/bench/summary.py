"""Figures over all requests of a grid, from stored results alone."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import numpy as np

from fastntk.evidence.bench.results import Cell
from fastntk.evidence.compare import COMPARED_WITH
from fastntk.evidence.measures import MEASURES, PARTS
from fastntk.evidence.report import FLOOR, REFERENCE
from fastntk.memory.audit import LIMIT_DOUBT
from fastntk.memory.certificate import VERDICTS


@dataclass(frozen=True)
class Figure:
    """A number of a method on one request: a measure, or one beside the retrained models'."""

    heading: str
    of: Callable[[Cell, str], float | None]


def _measure(name: str) -> Figure:
    return Figure(name.replace("_", " "), lambda cell, method: cell.rows.get(method, {}).get(name))


def _time_fraction(cell: Cell, method: str) -> float | None:
    """Seconds over those of retraining."""
    return _over(cell.rows.get(method, {}).get("seconds"), cell.rows[REFERENCE]["seconds"])


def _relearn_ratio(cell: Cell, method: str) -> float | None:
    """Relearn steps over the retrained models' mean."""
    steps = [cell.rows[name]["relearn_steps"] for name in (REFERENCE, FLOOR)]
    whole = None if None in steps else mean(steps)  # type: ignore[type-var]
    return _over(cell.rows.get(method, {}).get("relearn_steps"), whole)


FIGURES = {
    **{name: _measure(name) for name, measure in MEASURES.items() if measure.summarised},
    "time_fraction": Figure("time fraction", _time_fraction),
    "relearn_ratio": Figure("relearn ratio", _relearn_ratio),
}
"""What a summary has the median of."""

SHARES = {"membership_within": "membership within", "relearn_within": "relearning within", "off": "off by > 3"}
"""What it has of shares of requests, with their headings."""


def summarise(cells: Sequence[Cell], ours: str) -> dict[str, Any]:
    """Medians over cells of every method, and how often the method ``ours`` was off, and flagged.

    ``distance_ratio``, ``average_gap`` as in a report; ``time_fraction`` is a method's seconds over retraining's,
    ``relearn_ratio`` its relearn steps over the retrained models' mean; ``time_fraction_with_preparing`` is that of
    ``ours`` for who has no memory yet, over the cells in which preparing was timed. ``distance_ratio_interval`` is the
    95 % interval of the median over requests of ``ours``, by the bootstrap. ``membership_within`` is the share of cells
    in which the attack takes as many forgotten samples for members as in the retrained models; ``relearn_within`` that
    in which relearning takes as many steps as in them, a quarter fewer or more. ``off`` is the share of cells in which
    an accuracy differs from the reference's by more than 3 points; the second retrained model's is its floor.

    A cell is off if an accuracy of ``ours`` differs from the retrained models' mean by more than 3 points, and off
    beyond chance if it also is outside of what they span, and outside the 95 % interval (Wilson) of a share of so many
    samples. It is flagged if its verdict was not "trusted", and doubted if the audit's doubt of it was over 3 points.
    """
    names = *methods_of(cells), FLOOR
    medians = {f: {name: _median(figure_of(cell, name, f) for cell in cells) for name in names} for f in FIGURES}
    within = {name: _share(_within(cell, name) for cell in cells if name in cell.rows) for name in names}
    relearned = {name: _share(_relearned(cell, name) for cell in cells if name in cell.rows) for name in names}
    far = {name: _share(_far(cell, name) for cell in cells if name in cell.rows) for name in names}
    judged = [cell for cell in cells if ours in cell.rows]
    return {
        "cells": len(cells),
        **medians,
        "time_fraction_with_preparing": _median(_with_preparing(cell, ours) for cell in judged),
        "distance_ratio_interval": interval([figure_of(cell, ours, "distance_ratio") for cell in judged], np.median),
        "membership_within": within,
        "relearn_within": relearned,
        "off": far,
        "flags": {off.__name__.removeprefix("_"): _flags(judged, ours, off) for off in (_off, _off_beyond_chance)},
    }


def _flags(cells: Sequence[Cell], ours: str, off: Callable[[Cell, str], bool]) -> dict[str, int]:
    """How many cells are off, and of these and of the others, how many were flagged and how many doubted."""
    counts: dict[str, int] = {}
    for name, wanted in (("bad", True), ("good", False)):
        part = [cell for cell in cells if off(cell, ours) is wanted]
        counts |= {
            name: len(part),
            f"{name}_and_flagged": sum(_flagged(cell, ours) for cell in part),
            f"{name}_and_doubted": sum(_doubted(cell, ours) for cell in part),
        }
    return counts


def methods_of(cells: Iterable[Cell]) -> list[str]:
    """The names of all methods in any cell."""
    return list({name: None for cell in cells for name in cell.rows if name not in COMPARED_WITH})


def figure_of(cell: Cell, method: str, figure: str) -> float | None:
    """One of ``FIGURES`` of a method."""
    return FIGURES[figure].of(cell, method)


def verdict_of(cell: Cell, method: str) -> str | None:
    """The certificate's; None of a method that gives none."""
    verdict = cell.facts["notes"].get(method, "").partition(":")[0]
    return verdict if verdict in VERDICTS else None


def _with_preparing(cell: Cell, method: str) -> float | None:
    preparing, seconds = cell.facts.get("prepare_seconds"), cell.rows[method]["seconds"]
    whole = None if preparing is None or seconds is None else preparing + seconds
    return _over(whole, cell.rows[REFERENCE]["seconds"])


def _over(value: float | None, whole: float | None) -> float | None:
    return value / whole if value is not None and whole else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _share(hits: Iterable[bool]) -> float | None:
    found = list(hits)
    return sum(found) / len(found) if found else None


def interval(values: Sequence[float | None], statistic: Callable[..., Any]) -> list[float] | None:
    """The 95 % interval of a statistic of the values, by the bootstrap; None for fewer than two values."""
    from scipy.stats import bootstrap  # a second to import

    known = [value for value in values if value is not None]
    if len(known) < 2:
        return None
    found = bootstrap((known,), statistic, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return [float(found.low), float(found.high)]


def _retrained(cell: Cell, column: str) -> tuple[float, float]:
    one, other = (cell.rows[name][column] or 0.0 for name in (REFERENCE, FLOOR))
    return one, other


def _far(cell: Cell, method: str) -> bool:
    """Whether an accuracy differs from that of one retrained model, the reference, by more than 3 points."""
    pairs = ([cell.rows[name][f"{part}_accuracy"] or 0.0 for name in (method, REFERENCE)] for part in PARTS)
    return any(abs(own - wanted) > LIMIT_DOUBT for own, wanted in pairs)


def _off(cell: Cell, method: str) -> bool:
    return bool(_off_parts(cell, method))


def _off_beyond_chance(cell: Cell, method: str) -> bool:
    counts = {"retain": cell.facts["images"] - cell.facts["forgotten"], "test": cell.facts["test_images"]}
    counts["forget"] = cell.facts["forgotten"]
    return any(not _plausible(cell, method, f"{part}_accuracy", counts[part]) for part in _off_parts(cell, method))


def _off_parts(cell: Cell, method: str) -> list[str]:
    """The sets on which the accuracy differs from the retrained models' mean by more than 3 points."""
    gaps = {
        part: abs((cell.rows[method][f"{part}_accuracy"] or 0.0) - mean(_retrained(cell, f"{part}_accuracy")))
        for part in PARTS
    }
    return [part for part, gap in gaps.items() if gap > LIMIT_DOUBT]


def _flagged(cell: Cell, ours: str) -> bool:
    return verdict_of(cell, ours) not in ("trusted", None)


def _doubted(cell: Cell, ours: str) -> bool:
    return (cell.rows[ours].get("doubt") or 0.0) > LIMIT_DOUBT


def _within(cell: Cell, method: str) -> bool:
    return _plausible(cell, method, "membership", cell.facts["forgotten"])


def _plausible(cell: Cell, method: str, column: str, count: int) -> bool:
    """Whether a percentage is one that the two retrained models span, or that chance makes of their mean (95 %)."""
    from scipy.stats import binomtest

    pair = _retrained(cell, column)
    interval = binomtest(round(mean(pair) * count / 100), count).proportion_ci(method="wilson")
    low, high = min(*pair, 100 * interval.low), max(*pair, 100 * interval.high)
    return bool(low <= (cell.rows[method][column] or 0.0) <= high)


def _relearned(cell: Cell, method: str) -> bool:
    """Whether the steps are among those of the two retrained models, a quarter fewer or more."""
    ours, *pair = (cell.rows[name]["relearn_steps"] for name in (method, REFERENCE, FLOOR))
    known = [steps for steps in pair if steps is not None]
    if ours is None or not known:
        return ours in pair
    most = float("inf") if None in pair else 1.25 * max(known)
    return 0.75 * min(known) <= ours <= most
