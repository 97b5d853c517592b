"""Evidence: models side by side with one retrained without the forgotten data, as a table, JSON and a page."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset

from fastntk.common.errors import InputError
from fastntk.common.files import write, write_json
from fastntk.evidence.metrics import (
    accuracy,
    agreement,
    average_gap,
    kl_divergence,
    logit_distance,
    margins,
    modified_entropy,
    taken_for_members,
    tug_of_war,
)
from fastntk.evidence.pages import page, svg
from fastntk.inputs.images import labels_of
from fastntk.tuning.outputs import Model, logits_of

REFERENCE, FLOOR = "retrain", "retrain_other_seed"
COLUMNS = {
    "retain_accuracy": "retain %",
    "forget_accuracy": "forget %",
    "test_accuracy": "test %",
    "forget_distance": "d forget",
    "test_distance": "d test",
    "distance_ratio": "ratio",
    "membership": "member %",
    "average_gap": "gap",
    "tug_of_war": "ToW",
    "forget_kl": "KL",
    "forget_agreement": "agree %",
    "relearn_steps": "relearn",
    "head_recovery": "refit %",
    "seconds": "seconds",
    "peak_megabytes": "MB",
}
PLACES = {column: 1 if heading.endswith("%") else 2 for column, heading in COLUMNS.items()}
_ON_TERMINAL = [*list(COLUMNS)[:7], "seconds"]
_COMPARED = ("relearn_steps", "head_recovery", "peak_megabytes", "doubt")
"""What ``comparison.compare`` measures; it takes the request, not only the models."""


@dataclass(frozen=True)
class Report:
    """One request's evidence.

    Attributes:
        rows: per model, None where it cannot be known: accuracies in percent on the retained, forgotten and test
            samples; ``membership``, the share of the forgotten ones that an attack takes for members, in percent;
            seconds. Against the reference model: root mean square logit distances on the forgotten and test samples;
            ``distance_ratio``, the former over that of the row ``retrain_other_seed``; KL divergence and agreement of
            predictions on the forgotten ones; ``average_gap`` of accuracies and membership; ``tug_of_war`` of
            accuracies. See ``fastntk.evidence.metrics``. From ``comparison.compare`` alone: ``relearn_steps`` and
            ``head_recovery`` (``fastntk.evidence.recovery``), the method's ``peak_megabytes`` of memory, and of an answer whose
            memory was audited its ``doubt`` (``fastntk.Audit``).
        logits: per model and set (``retain``, ``forget``, ``test``), so that other metrics need no model.
        labels: per set.
        reference: the name of the row that distances are to.
    """

    rows: dict[str, dict[str, float | None]]
    logits: dict[str, dict[str, Float[Tensor, "samples classes"]]]
    labels: dict[str, Int[Tensor, " samples"]]
    reference: str

    def margins(self, model: str, part: str = "forget") -> Float[Tensor, " samples"]:
        """Per sample: the label's logit less the largest other."""
        return margins(self.logits[model][part], self.labels[part])

    def to_dict(self) -> dict[str, object]:
        """For JSON: the rows and what they are compared with."""
        return {"rows": self.rows, "reference": self.reference}

    def table(self, title: str = "") -> Table:
        """For a terminal."""
        caption = (
            "%: accuracies; member: of the forgotten, taken for members by an attack; d: root mean square logit "
            f"distance to {self.reference}; ratio: d forget over that of {FLOOR}"
        )
        table = Table(title=title, caption=caption, caption_justify="left", box=SIMPLE_HEAD, padding=0)
        table.add_column("model", no_wrap=True)
        for column in _ON_TERMINAL:
            heading = COLUMNS[column]
            table.add_column(heading, justify="right", min_width=max(map(len, heading.split())))
        for name, row in self.rows.items():
            table.add_row(name, *(_cell(row[column], column) for column in _ON_TERMINAL))
        return table


def _cell(value: float | None, column: str) -> str:
    return "–" if value is None else f"{value:.{PLACES[column]}f}"


def evaluate(
    models: Mapping[str, Model],
    *,
    retain: Dataset,
    forget: Dataset,
    test: Dataset,
    seconds: Mapping[str, float | None] | None = None,
    reference: str = REFERENCE,
    device: torch.device | str = "cpu",
) -> Report:
    """Compare models with the one retrained on the retained data.

    Args:
        models: by name; modules, or functions of a batch of images (``fastntk.at(model, parameters)``). One should be
            called ``reference``; a second retrained model beside it shows how far apart two of them lie.
        retain: the training samples that stay.
        forget: those that go.
        test: samples that no model was fitted to.
        seconds: what each model took to make.
        reference: the row that distances are to; without it, distances are left out.
        device: where the models are.

    Raises:
        InputError: there is no model, or a set is empty.
    """
    if not models:
        raise InputError("there is no model to evaluate.")
    sets = {"retain": retain, "forget": forget, "test": test}
    for name, part in sets.items():
        if not len(part):  # type: ignore[arg-type]
            raise InputError(f"the {name} set is empty: there is nothing to measure on it.")
    labels = {name: labels_of(part) for name, part in sets.items()}
    logits = {
        name: {part: logits_of(model, data, device).cpu() for part, data in sets.items()}
        for name, model in models.items()
    }
    rows = {name: _own(logits[name], labels) | {"seconds": (seconds or {}).get(name)} for name in models}
    for name in rows:
        rows[name] |= dict.fromkeys(_COMPARED) | _against(name, rows, logits, reference)
    return Report(rows, logits, labels, reference)


_ACCURACIES = ("retain_accuracy", "forget_accuracy", "test_accuracy")


def _own(logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> dict[str, float | None]:
    """What a model's own outputs say."""
    row: dict[str, float | None] = {f"{part}_accuracy": accuracy(logits[part], labels[part]) for part in labels}
    entropy = {part: modified_entropy(logits[part], labels[part]) for part in labels}
    return row | {"membership": taken_for_members(entropy["forget"], entropy["retain"], entropy["test"])}


def _against(
    name: str, rows: Mapping[str, Mapping[str, Any]], logits: Mapping[str, Mapping[str, Tensor]], reference: str
) -> dict[str, float | None]:
    """What they say beside the reference model's."""
    if reference not in rows:
        return dict.fromkeys(column for column in COLUMNS if column not in rows[name])
    ours, theirs = logits[name], logits[reference]
    distance = {part: logit_distance(ours[part], theirs[part]) for part in ("forget", "test")}
    floor = logit_distance(logits[FLOOR]["forget"], theirs["forget"]) if FLOOR in rows else 0.0
    ours_in, theirs_in = (
        {column: rows[model][column] for column in (*_ACCURACIES, "membership")} for model in (name, reference)
    )
    accuracies = ({column: each[column] for column in _ACCURACIES} for each in (ours_in, theirs_in))
    return {
        "forget_distance": distance["forget"],
        "test_distance": distance["test"],
        "distance_ratio": distance["forget"] / floor if floor else None,
        "average_gap": average_gap(ours_in, theirs_in),
        "tug_of_war": tug_of_war(*accuracies),
        "forget_kl": kl_divergence(theirs["forget"], ours["forget"]),
        "forget_agreement": agreement(theirs["forget"], ours["forget"]),
    }


def environment() -> dict[str, str | int]:
    """What the numbers were made with."""
    return {
        "fastntk": version("fastntk"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def document(reports: Mapping[str, Report]) -> dict[str, object]:
    """``{"scenarios": {name: {"rows": ...}}, "environment": ...}``, for JSON."""
    return {"scenarios": {name: report.to_dict() for name, report in reports.items()}, "environment": environment()}


def write_report(folder: Path, title: str, reports: Mapping[str, Report], notes: Mapping[str, str]) -> None:
    """``report.json``, ``report.html`` and a drawing a report in ``folder``; ``notes`` stand above the tables."""
    write_json(folder / "report.json", document(reports))
    for name, report in reports.items():
        drawing = svg(draw(report))
        write(folder / f"{name}.svg", lambda file, text=drawing: file.write_text(text))  # type: ignore[misc]
    write(folder / "report.html", lambda file: file.write_text(html(title, reports, notes)))


def html(title: str, reports: Mapping[str, Report], notes: Mapping[str, str]) -> str:
    """A page without outside references: per scenario the table, the accuracies and the margins as drawings."""
    sections = [
        {
            "name": name,
            "note": notes.get(name, ""),
            "reference": report.reference,
            "rows": {model: [_cell(row[column], column) for column in COLUMNS] for model, row in report.rows.items()},
            "figure": svg(draw(report)),
        }
        for name, report in reports.items()
    ]
    columns = list(COLUMNS.values())
    return page("report.html", title=title, columns=columns, sections=sections, environment=environment())


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
    parts, width = ("retain", "forget", "test"), 0.8 / len(report.rows)
    for place, (name, row) in enumerate(report.rows.items()):
        left = [i + (place - (len(report.rows) - 1) / 2) * width for i in range(len(parts))]
        heights = [row[f"{part}_accuracy"] or 0.0 for part in parts]
        bars = axes.bar(left, heights, width * 0.92, label=name, color=COLOURS.get(name))
        axes.bar_label(bars, [f"{height:.0f}" for height in heights], fontsize=8, padding=1)
    axes.set_xticks(range(len(parts)), ["retained images", "forgotten images", "test images"])
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
