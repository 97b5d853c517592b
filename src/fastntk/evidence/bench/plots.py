"""A drawing of a table, from a summary alone."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastntk.evidence.bench.summary import row_of
from fastntk.evidence.drawings import COLOURS
from fastntk.evidence.report import ORIGINAL, RETRAINED


def overview(rows: Sequence[Mapping[str, Any]], ours: str) -> Figure:
    """Of one loss and kind of request: accuracy against time, and the ratio of every row with its interval."""
    figure = Figure(figsize=(10, 0.2 * len(rows) + 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    _against_time(left, rows, ours)
    _ratios(right, rows, ours)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
    return figure


def _against_time(axes: Axes, rows: Sequence[Mapping[str, Any]], ours: str) -> None:
    """A point a row: time, of retraining, and average gap, medians; down and left is better."""
    for row in rows:
        time = 1.0 if row["method"] == RETRAINED else row["request_fraction"]
        if time is not None and row["gap"] is not None:
            filled = "full" if row["settings"] == "chosen" else "none"
            axes.plot(time, row["gap"], "o", color=_colour(row, ours), fillstyle=filled, markersize=6)
            axes.annotate(_name(row), (time, row["gap"]), xytext=(5, 3), textcoords="offset points", fontsize=6)
    axes.set_xscale("log")
    axes.set_xlabel("time of a request, of retraining", fontsize=8)
    axes.set_ylabel("average gap to retrained models, points", fontsize=8)
    axes.set_ylim(bottom=0)


def _ratios(axes: Axes, rows: Sequence[Mapping[str, Any]], ours: str) -> None:
    """A row a method: the median ratio and its 95 % interval; nearest on top."""
    known = [(row[f"ratio_{row['unit']}"], row) for row in rows if row[f"ratio_{row['unit']}"] is not None]
    order = [row for ratio, row in sorted(known, key=lambda each: -each[0]) if math.isfinite(ratio)]
    for place, row in enumerate(order):
        colour = _colour(row, ours)
        if row["low"] is not None:
            axes.plot([row["low"], row["high"]], [place] * 2, color=colour, linewidth=1.6)
        axes.plot(row[f"ratio_{row['unit']}"], place, "o", color=colour, markersize=5)
    axes.axvline(1, color="#cccccc", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(order)), list(map(_name, order)))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="minor", labelsize=6)
    axes.set_xlabel("distance to retrained models, over theirs from each other", fontsize=8)


def _name(row: Mapping[str, Any]) -> str:
    return row_of(row["method"], row["settings"])


def _colour(row: Mapping[str, Any], ours: str) -> str:
    if row["method"] == ours:
        return COLOURS["fastntk"]
    return COLOURS[row["method"]] if row["method"] in (ORIGINAL, RETRAINED) else "#5b7db1"
