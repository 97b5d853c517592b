"""Drawings of a table, from a summary alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastntk.evidence.bench.summary import THEIRS, is_ours, label_of
from fastntk.evidence.drawings import COLOURS
from fastntk.evidence.report import ORIGINAL, RETRAINED

_LEAST = 0.05  # points of gap, below which all are drawn alike


def against_time(rows: Sequence[Mapping[str, Any]], ours: str) -> Figure:
    """Of one loss and kind of request a point a row: time, of retraining, and average gap of accuracies, medians, with
    the latter's 95 % interval; down and left is better. Chosen settings are filled."""
    figure, axes = _drawn(len(rows))
    for row in rows:
        time = 1.0 if row["method"] == THEIRS else row["request_fraction"]
        if time is not None and row["gap"] is not None:
            place = time, max(row["gap"], _LEAST)
            filled = "full" if row["settings"] == "chosen" else "none"
            if (ends := row["intervals"]["gap"]) is not None:
                low, high = (max(end, _LEAST) for end in ends)
                axes.plot([time, time], [low, high], color=_colour(row, ours), linewidth=0.6, alpha=0.5)
            axes.plot(*place, "o", color=_colour(row, ours), fillstyle=filled, markersize=5)
            axes.annotate(row["method"], place, xytext=(5, -2), textcoords="offset points", fontsize=5.5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("time of a request, of retraining", fontsize=7)
    axes.set_ylabel("average gap of accuracies to retrained models, points", fontsize=7)
    _plain(axes)
    return figure


def ratios(rows: Sequence[Mapping[str, Any]], ours: str) -> Figure:
    """Of one loss and kind of request a row a method: the median ratio and its 95 % interval; nearest on top."""
    figure, axes = _drawn(len(rows))
    order = sorted(rows, key=lambda row: -row["ratio"])
    for place, row in enumerate(order):
        colour = _colour(row, ours)
        if row["low"] is not None:
            axes.plot([row["low"], row["high"]], [place] * 2, color=colour, linewidth=1.6)
        axes.plot(row["ratio"], place, "o", color=colour, markersize=5)
    axes.axvline(1, color="#cccccc", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(order)), list(map(label_of, order)))
    axes.set_xscale("log")
    axes.set_xlabel("distance to retrained models, over theirs from each other", fontsize=7)
    _plain(axes)
    return figure


def _drawn(rows: int) -> tuple[Figure, Axes]:
    """An empty figure for so many rows."""
    figure = Figure(figsize=(5, 0.13 * rows + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _plain(axes: Axes) -> None:
    """Small figures, numbers written out."""
    for axis, scale in ((axes.xaxis, axes.get_xscale()), (axes.yaxis, axes.get_yscale())):
        if scale == "log":
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("{x:g}")
    axes.tick_params(labelsize=6)
    axes.tick_params(which="minor", labelsize=4.5)


def _colour(row: Mapping[str, Any], ours: str) -> str:
    if is_ours(row["method"], ours):
        return COLOURS["fastntk"]
    return {ORIGINAL: COLOURS[ORIGINAL], THEIRS: COLOURS[RETRAINED]}.get(row["method"], "#5b7db1")
