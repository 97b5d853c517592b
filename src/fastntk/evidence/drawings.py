"""Drawings of a report."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastntk.evidence.measures import PARTS
from fastntk.evidence.report import Report

COLOURS = {
    "original": "#8d8d8d",
    "retrain": "#1b7f4b",
    "retrain_other_seed": "#7cc49a",
    "fastntk": "#d1495b",
    "fastntk_exact_head": "#e8a0a9",
    "fastntk_gain": "#8c2f5e",
    "fastntk_gain_exact_head": "#c98aa8",
    "golatkar": "#5b7db1",
    "golatkar_trapezium": "#a9bddb",
}


def draw(report: Report) -> Figure:
    """Above, accuracies on the three sets; below, the logit margins of every forgotten image."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplot_mosaic([["accuracies", "accuracies"], ["margins", "spread"]])
    _draw_accuracies(report, axes["accuracies"])
    _draw_margins(report, axes["margins"], axes["spread"])
    for each in axes.values():
        each.spines[["top", "right"]].set_visible(False)
    axes["accuracies"].legend(ncols=7, frameon=False, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def _draw_accuracies(report: Report, axes: Axes) -> None:
    """Bars, a colour a model."""
    width = 0.8 / len(report.rows)
    for place, (name, row) in enumerate(report.rows.items()):
        left = [i + (place - (len(report.rows) - 1) / 2) * width for i in range(len(PARTS))]
        heights = [row[f"{part}_accuracy"] or 0.0 for part in PARTS]
        bars = axes.bar(left, heights, width * 0.92, label=name, color=COLOURS.get(name))
        axes.bar_label(bars, [f"{height:.0f}" for height in heights], fontsize=8, padding=1)
    axes.set_xticks(range(len(PARTS)), ["retained images", "forgotten images", "test images"])
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 112)


def _draw_margins(report: Report, curves: Axes, spread: Axes) -> None:
    """Per forgotten image: the label's logit less the largest other, image by image and as histograms."""
    shown = [name for name in ("original", "fastntk", "retrain", "retrain_other_seed") if name in report.rows]
    values = {name: report.margins(name) for name in shown}
    order = values[report.reference if report.reference in values else shown[0]].argsort()
    everything = torch.cat(list(values.values()))
    for name, margin in values.items():
        curves.plot(margin[order], ".", markersize=5, color=COLOURS.get(name))
        limits = (float(everything.min()), float(everything.max()))
        spread.hist(margin, bins=24, range=limits, histtype="step", linewidth=1.6, color=COLOURS.get(name))
    curves.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
    curves.set_xlabel(f"forgotten images, in order of their margin under {report.reference}")
    curves.set_ylabel("logit margin of the right class")
    spread.set_xlabel("logit margin of the right class")
    spread.set_ylabel("forgotten images")
