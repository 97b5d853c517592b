"""Tables, drawn from stored results alone."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from fastntk.evidence.bench.results import Cell
from fastntk.evidence.bench.summary import FIGURES, SHARES, figure_of, methods_of, summarise, verdict_of
from fastntk.evidence.measures import MEASURES, shown
from fastntk.evidence.report import FLOOR, REFERENCE


@dataclass(frozen=True)
class Table:
    """A row a method, or a row a request."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[str]]
    first: str = "method"

    def markdown(self) -> str:
        """The table with its title."""
        head = f"| {self.first} | {' | '.join(self.columns)} |", "|---" * (len(self.columns) + 1) + "|"
        rows = (f"| {name} | {' | '.join(texts)} |" for name, texts in self.rows.items())
        return "\n".join([f"### {self.title}", "", self.note, "", *head, *rows])


def tables(cells: Iterable[Cell]) -> list[Table]:
    """One for each data, model, number of images and request: means over seeds, and standard deviations."""
    groups: dict[tuple, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.setting.data, cell.setting.model, cell.setting.per_class, cell.request].append(cell)
    return [_table(*group) for group in groups.items()]


def _table(group: tuple, cells: Sequence[Cell]) -> Table:
    (data, model, per_class, request), columns = group, shown("terminal", "pages")
    found = {method: [cell.rows[method] for cell in cells if method in cell.rows] for method in cells[0].rows}
    return Table(
        f"{data}, {model}, {per_class} images a class, forgotten: {request}",
        f"{_audits(cells)} Seeds: {', '.join(str(cell.setting.seed) for cell in cells)}.",
        [measure.heading for measure in columns.values()],
        {method: [_cell(rows, name) for name in columns] for method, rows in found.items()},
    )


def _cell(rows: Sequence[Mapping[str, float | None]], name: str) -> str:
    values, text = [value for row in rows if (value := row.get(name)) is not None], MEASURES[name].text
    spread = f" ± {text(stdev(values))}" if len(values) > 1 else ""
    return f"{text(mean(values) if values else None)}{spread}"


def _audits(cells: Sequence[Cell]) -> str:
    audits = [f"{cell.facts['audit']['verdict']} ({cell.facts['audit']['ratio']:.2f})" for cell in cells]
    return f"Audit of the memory before the request: {', '.join(audits)}."


def overviews(cells: Sequence[Cell], found: Mapping[str, Any], ours: str) -> list[Table]:
    """All requests, from their summary, and those of each kind."""
    kinds = {cell.request: None for cell in cells}
    groups = {kind: summarise([cell for cell in cells if cell.request == kind], ours) for kind in kinds}
    of_kinds = (overview(summary, f"All requests: {kind}") for kind, summary in groups.items())
    return [overview(found, "All requests"), *of_kinds]


def overview(found: Mapping[str, Any], title: str) -> Table:
    """The figures of a summary that are of every method, the nearest to retraining first."""
    headings = {**{name: figure.heading for name, figure in FIGURES.items()}, **SHARES}
    order = sorted(found["distance_ratio"], key=lambda name: found["distance_ratio"][name] or math.inf)
    rows = {
        name: ["–" if (value := found[figure][name]) is None else f"{value:.2f}" for figure in headings]
        for name in order
    }
    note = (
        f"Medians over {found['cells']} requests, and the shares of them that are within what retrained models do, and "
        "in which an accuracy is off by more than 3 points from the first of these."
    )
    return Table(title, note, list(headings.values()), rows)


_BY_MODEL = ("distance_ratio", "relearn_ratio", "membership_within", "relearn_within", "time_fraction")


def by_model(cells: Iterable[Cell], ours: str) -> Table:
    """One method's figures for each data, model and number of images: over seeds and requests."""
    groups: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        if ours in cell.rows:
            groups[f"{cell.setting.data}, {cell.setting.model}, {cell.setting.per_class}"].append(cell)
    headings = (SHARES[name] if name in SHARES else FIGURES[name].heading for name in _BY_MODEL)
    return Table(
        f"{ours}, by model",
        "Medians over seeds and requests; the gap beside the second retrained model's; how many answers were off by "
        "more than 3 points of accuracy, and how many of these and of the others had been doubted.",
        ["requests", "average gap, retrained", "average gap", *headings, "off, doubted", "others, doubted"],
        {name: _of_model(summarise(group, ours), ours) for name, group in groups.items()},
        "data, model, images a class",
    )


def _of_model(found: Mapping[str, Any], ours: str) -> list[str]:
    gaps, flags = found["average_gap"], found["flags"]["off"]
    figures = [gaps[FLOOR], gaps[ours], *(found[figure][ours] for figure in _BY_MODEL)]
    doubted = [f"{flags[part]}, {flags[f'{part}_and_doubted']}" for part in ("bad", "good")]
    return [str(found["cells"]), *("–" if each is None else f"{each:.2f}" for each in figures), *doubted]


_BESIDE_RETRAINED = "forget_accuracy", "membership", "relearn_steps"


def by_request(cells: Iterable[Cell], ours: str) -> Table:
    """One method beside the two retrained models, request by request."""
    headings = (MEASURES[name].heading for name in _BESIDE_RETRAINED)
    pairs = [text for heading in headings for text in (f"{heading}, retrained", heading)]
    return Table(
        f"{ours}, request by request",
        "Beside the figures of both retrained models, and the second's gap to the first; then the method that is "
        "nearest to retraining, and what came with the answer, before anything was retrained: the verdict and the "
        "doubt, the points within which a retrained model's accuracy on the forgotten images should lie.",
        [*pairs, "gap, retrained", "gap", "ratio", "nearest", "verdict", "doubt"],
        {_name_of(cell): _beside_retrained(cell, ours) for cell in cells if ours in cell.rows},
        "request",
    )


def _name_of(cell: Cell) -> str:
    setting = cell.setting
    return f"{setting.data}, {setting.model}, {setting.per_class}, {cell.request}, seed {setting.seed}"


def _beside_retrained(cell: Cell, ours: str) -> list[str]:
    pairs = (
        [", ".join(_cell([cell.rows[name]], column) for name in (REFERENCE, FLOOR)), _cell([cell.rows[ours]], column)]
        for column in _BESIDE_RETRAINED
    )
    gaps = [_cell([cell.rows[name]], "average_gap") for name in (FLOOR, ours)]
    return [*(text for pair in pairs for text in pair), *gaps, *_nearest(cell, ours), *_said(cell, ours)]


def _said(cell: Cell, ours: str) -> list[str]:
    doubt = cell.rows[ours].get("doubt")
    return [verdict_of(cell, ours) or "–", "–" if doubt is None else f"{doubt:.1f}"]


def _nearest(cell: Cell, ours: str) -> list[str]:
    """The ratio of a method, and the name and the ratio of the nearest one of all."""
    ratios = {name: ratio for name in methods_of([cell]) if (ratio := figure_of(cell, name, "distance_ratio"))}
    name = min(ratios, key=ratios.__getitem__, default=None)
    return [_cell([cell.rows[ours]], "distance_ratio"), "–" if name is None else f"{name} {ratios[name]:.2f}"]
