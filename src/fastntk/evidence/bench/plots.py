"""Drawings of a grid, from stored results alone."""

from collections.abc import Sequence
from statistics import median

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastntk.evidence.bench.results import Cell, Results
from fastntk.evidence.bench.summary import figure_of, methods_of
from fastntk.evidence.compare import COMPARED_WITH
from fastntk.evidence.drawings import COLOURS
from fastntk.evidence.metrics import modified_entropy
from fastntk.evidence.report import FLOOR, REFERENCE

_RATES = np.linspace(0, 1, 101)


def accuracy_against_time(cells: Sequence[Cell], ours: str) -> Figure:
    """A point a method: median share of retraining's seconds, and median gap of accuracies and membership."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate((*methods_of(cells), FLOOR)):
        points = [(figure_of(cell, name, "time_fraction"), figure_of(cell, name, "average_gap")) for cell in cells]
        known = [(x, y) for x, y in points if x is not None and y is not None]
        if known:
            x, y = (median(values) for values in zip(*known, strict=True))
            axes.plot(x, y, "o", color=_colour(name, ours, place), markersize=9 if name == ours else 6)
            axes.annotate(name, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel(f"seconds over those of {REFERENCE}, median over requests")
    axes.set_ylabel(f"average gap to {REFERENCE}, points, median")
    axes.set_ylim(bottom=0)
    return _bare(figure)


def distance_ratios(cells: Sequence[Cell], ours: str) -> Figure:
    """A row a method, a point a request: distance to retraining over that of two retrained models."""
    found = {
        name: [ratio for cell in cells if (ratio := figure_of(cell, name, "distance_ratio")) is not None]
        for name in (*methods_of(cells), "original")
    }
    order = sorted((name for name in found if found[name]), key=lambda name: -median(found[name]))
    figure = Figure(figsize=(9, 0.34 * len(order) + 1.2), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(order):
        axes.plot(found[name], [place] * len(found[name]), "o", color=_colour(name, ours, place), alpha=0.45, ms=5)
        axes.plot(median(found[name]), place, "|", color="#222222", markersize=16, markeredgewidth=2)
    axes.axvline(1, color=COLOURS[FLOOR], linewidth=1.5, zorder=0)
    axes.set_yticks(range(len(order)), order)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="minor", labelsize=7)
    axes.set_xlabel("distance ratio; bar: median; line: the noise floor")
    return _bare(figure)


def attack_curves(results: Results, cells: Sequence[Cell], ours: str) -> Figure:
    """A curve a model: the attack's true against its false positive rate, forgotten against test samples."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate((*COMPARED_WITH, *methods_of(cells))):
        curves = [_roc(results, cell, name) for cell in cells if name in cell.rows]
        if curves:
            mean = np.mean(curves, 0)
            shown = name == ours or name in COMPARED_WITH
            label = f"{name}, area {np.trapezoid(mean, _RATES):.2f}"
            axes.plot(_RATES, mean, color=_colour(name, ours, place), linewidth=2.2 if shown else 0.9, label=label)
    axes.plot([0, 1], [0, 1], color="#cccccc", linewidth=0.8, zorder=0)
    axes.set_xlabel("test samples taken for members")
    axes.set_ylabel("forgotten samples taken for members")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _bare(figure)


def _roc(results: Results, cell: Cell, method: str) -> np.ndarray:
    """The true positive rate at every false positive rate of ``_RATES``, small modified entropy first."""
    scores = {
        part: np.sort(modified_entropy(results.logits(cell, method, part), results.labels(cell, part)).numpy())
        for part in ("forget", "test")
    }
    thresholds = np.quantile(scores["test"], _RATES)
    return np.searchsorted(scores["forget"], thresholds, side="right") / len(scores["forget"])


def _colour(name: str, ours: str, place: int) -> str:
    return COLOURS["fastntk"] if name == ours else COLOURS.get(name, f"C{place % 10}")


def _bare(figure: Figure) -> Figure:
    def clear(axes: Axes) -> None:
        axes.spines[["top", "right"]].set_visible(False)

    for axes in figure.axes:
        clear(axes)
    return figure
