"""Drawings of a report."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastntk.evidence.measures import PARTS
from fastntk.evidence.report import Report

_QUANTILES, _AROUND = (0.05, 0.25, 0.5, 0.75, 0.95), 0.04
_LEAST, _FEWEST = 20, 5  # images

COLOURS = {
    "original": "#8d8d8d",
    "retrain": "#1b7f4b",
    "retrain_2": "#7cc49a",
    "fastntk": "#d1495b",
    "fastntk_exact_head": "#e8a0a9",
    "fastntk_gain": "#8c2f5e",
    "fastntk_gain_exact_head": "#c98aa8",
    "golatkar": "#5b7db1",
    "golatkar_step": "#a9bddb",
}


def draw(report: Report) -> Figure:
    """Above, accuracies on the three sets; below, what the logit margins of the forgotten images are like."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplot_mosaic([["accuracies"], ["margins"]], height_ratios=[3, 2])
    _draw_accuracies(report, axes["accuracies"])
    _draw_margins(report, axes["margins"])
    for each in axes.values():
        each.spines[["top", "right"]].set_visible(False)
    axes["accuracies"].legend(ncols=7, frameon=False, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def _draw_accuracies(report: Report, axes: Axes) -> None:
    """Bars, a colour a model."""
    width = 0.8 / len(report.rows)
    for place, (name, row) in enumerate(report.rows.items()):
        left = [i + (place - (len(report.rows) - 1) / 2) * width for i in range(len(PARTS))]
        heights = [row[f"{part}_accuracy"] for part in PARTS]
        bars = axes.bar(left, [height or 0.0 for height in heights], width * 0.92, label=name, color=COLOURS.get(name))
        told = ["–" if height is None else f"{height:.0f}" for height in heights]
        axes.bar_label(bars, told, fontsize=8, padding=1)
    axes.set_xticks(range(len(PARTS)), ["retained images", "forgotten images", "test images"])
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 112)


def _draw_margins(report: Report, axes: Axes) -> None:
    """The label's logit less the largest other, over the forgotten images: from the 5th to the 95th percentile, the
    middle half, and the median, each a mean over quantiles around it; of fewer than ``_LEAST`` the mean, and of fewer
    than ``_FEWEST`` nothing. No image's own is in the drawing."""
    enough = len(report.labels["forget"]) >= _FEWEST
    names = ("original", "fastntk", "retrain", "retrain_2") if enough else ()
    shown = [name for name in names if name in report.rows]
    for place, name in enumerate(shown):
        margins, colour = report.margins(name).double(), COLOURS.get(name)
        middle = float(margins.mean())
        if len(margins) >= _LEAST:
            around = torch.tensor(_QUANTILES).double()[:, None] + torch.tensor([-_AROUND, 0.0, _AROUND])
            low, first, middle, third, high = margins.quantile(around.flatten()).view(around.shape).mean(1).tolist()
            axes.plot([low, high], [place] * 2, color=colour, linewidth=1.6)
            axes.plot([first, third], [place] * 2, color=colour, linewidth=9, solid_capstyle="butt")
        axes.plot([middle], [place], "o", color=colour, markeredgecolor="white", markersize=8)
    axes.axvline(0, color="#cccccc", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(shown)), shown)
    axes.invert_yaxis()
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel("logit margin of the right class on the forgotten images")
