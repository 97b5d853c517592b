"""Tables and a summary, drawn from stored results alone."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev

from fastntk.bench.results import Cell
from fastntk.comparison import COMPARED_WITH
from fastntk.report import COLUMNS, FLOOR, PLACES, REFERENCE


@dataclass(frozen=True)
class Table:
    """Of one data, model, number of images and request: a row a method, means over seeds and standard deviations."""

    title: str
    note: str
    rows: Mapping[str, Sequence[str]]

    def markdown(self) -> str:
        """The table with its title."""
        head = f"| method | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"
        rows = (f"| {method} | {' | '.join(texts)} |" for method, texts in self.rows.items())
        return "\n".join([f"### {self.title}", "", self.note, "", *head, *rows])


def tables(cells: Iterable[Cell]) -> list[Table]:
    """All of them."""
    groups: dict[tuple, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.setting.data, cell.setting.model, cell.setting.per_class, cell.request].append(cell)
    return [_table(*group) for group in groups.items()]


def _table(group: tuple, cells: Sequence[Cell]) -> Table:
    data, model, per_class, request = group
    found = {method: [cell.rows[method] for cell in cells if method in cell.rows] for method in cells[0].rows}
    return Table(
        f"{data}, {model}, {per_class} images a class, forgotten: {request}",
        f"{_audits(cells)} Seeds: {', '.join(str(cell.setting.seed) for cell in cells)}.",
        {method: [_cell(rows, column) for column in COLUMNS] for method, rows in found.items()},
    )


def _cell(rows: Sequence[Mapping[str, float | None]], column: str) -> str:
    values = [value for row in rows if (value := row[column]) is not None]
    if not values:
        return "–"
    spread = f" ± {stdev(values):.{PLACES[column]}f}" if len(values) > 1 else ""
    return f"{mean(values):.{PLACES[column]}f}{spread}"


def _audits(cells: Sequence[Cell]) -> str:
    audits = [f"{cell.facts['audit']['verdict']} ({cell.facts['audit']['ratio']:.2f})" for cell in cells]
    return f"Audit of the memory before the request: {', '.join(audits)}."


def summary(cells: Sequence[Cell], ours: str) -> dict[str, object]:
    """Medians over cells of every method, and how often the method ``ours`` was off, and flagged.

    ``distance_ratio``, ``average_gap`` as in a report; ``time_fraction`` is a method's seconds over retraining's.
    ``membership_within`` is the share of cells in which the attack takes as many forgotten samples for members as in
    the retrained models: within their difference, or the 95 % interval of a share of so many samples if that is more.
    A cell is off if an accuracy of ``ours`` differs from the retrained models' mean by more than 3 points; ``flagged``
    if its verdict was not "trusted".
    """
    names = *methods_of(cells), FLOOR
    medians = {
        figure: {name: _median(figure_of(cell, name, figure) for cell in cells) for name in names}
        for figure in ("distance_ratio", "average_gap", "time_fraction")
    }
    judged = [(_off(cell, ours), _flagged(cell, ours)) for cell in cells if ours in cell.rows]
    good = [flagged for off, flagged in judged if not off]
    return {
        "cells": len(cells),
        **medians,
        "membership_within": mean(_within(cell, ours) for cell in cells if ours in cell.rows) if judged else None,
        "off": sum(off for off, _ in judged),
        "off_and_not_flagged": sum(off and not flagged for off, flagged in judged),
        "good_and_flagged": sum(good),
        "good": len(good),
    }


def methods_of(cells: Iterable[Cell]) -> list[str]:
    """The names of all methods in any cell."""
    return list({name: None for cell in cells for name in cell.rows if name not in COMPARED_WITH})


def figure_of(cell: Cell, method: str, figure: str) -> float | None:
    """A measure of a method, or its ``time_fraction``: seconds over those of retraining."""
    row = cell.rows.get(method, {})
    if figure != "time_fraction":
        return row.get(figure)
    ours, whole = row.get("seconds"), cell.rows[REFERENCE]["seconds"]
    return ours / whole if ours is not None and whole else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _retrained(cell: Cell, column: str) -> tuple[float, float]:
    one, other = (cell.rows[name][column] or 0.0 for name in (REFERENCE, FLOOR))
    return one, other


def _off(cell: Cell, ours: str) -> bool:
    parts = ("retain_accuracy", "forget_accuracy", "test_accuracy")
    return any(abs((cell.rows[ours][part] or 0.0) - mean(_retrained(cell, part))) > 3 for part in parts)


def _flagged(cell: Cell, ours: str) -> bool:
    return not cell.facts["notes"][ours].startswith("trusted")


def _within(cell: Cell, ours: str) -> bool:
    one, other = _retrained(cell, "membership")
    share = (one + other) / 200
    sampling = 196 * math.sqrt(share * (1 - share) / cell.facts["forgotten"])
    return abs((cell.rows[ours]["membership"] or 0.0) - 100 * share) <= max(abs(one - other), sampling)
