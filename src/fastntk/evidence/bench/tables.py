"""What a reader should conclude, and tables, from stored results alone."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from fastntk.evidence.bench.results import Cell
from fastntk.evidence.bench.summary import (
    NUMBERS,
    THEIRS,
    audited,
    flags,
    is_ours,
    kind_of,
    label_of,
    middle,
    own_row,
    retrained_of,
    value,
    verdict_of,
)
from fastntk.evidence.measures import MEASURES, RATIOS, shown
from fastntk.evidence.report import ORIGINAL

_NEAR, _GAP = 1.10, 0.3  # the ratio, and the points of gap beyond the retrained models' own, that are called near

Row = Mapping[str, Any]


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


def conclusions(found: Row) -> list[str]:
    """What a reader should conclude of ``ours``, by loss and kind of request, what falls short first; then of its
    verdicts."""
    told = []
    for loss, kind, rows in grouped(found["rows"]):
        own = [row for row in rows if row["method"] == found["ours"]]
        if own:
            told.append(_concluded(loss, kind, own[-1], rows))
    return [text for _, text in sorted(told, key=lambda each: not each[0])] + _judged(found["flags"], found["doubt"])


def _judged(flags: Mapping[str, int], doubt: Mapping[str, int]) -> list[str]:
    """What is to be said of the verdicts, if an audit speaks of any answer."""
    if not (answers := flags["bad"] + flags["good"]):
        return []
    return [
        f"Of {answers} answers that an audit speaks of, {flags['bad']} were off by more than 3 points from the "
        f"retrained models' mean; the verdict had flagged {flags['bad_and_flagged']} of these, and "
        f"{flags['good_and_flagged']} of the others. In {doubt['within']} of {doubt['models']} cases a retrained model "
        "lay within the doubt."
    ]


def _concluded(loss: str, kind: str, own: Row, rows: Sequence[Row]) -> tuple[bool, str]:
    """Whether something falls short, and what is to be said of ours on one kind of request."""
    ratio, gap, theirs = own["ratio"], own["gap"], own["gap_retrained"]
    others = _others(own, rows)
    farther, nearer = (
        [row for row in others if row["nearer"] and row["nearer"][end] * sign > sign] for end, sign in _SIDES
    )
    undecided = [row for row in others if row not in farther and row not in nearer]
    short = [
        *([f"the ratio is above {_NEAR:.2f}"] if ratio is None or ratio > _NEAR else []),
        *(["the gap is more than theirs"] if gap is None or theirs is None or gap > theirs + _GAP else []),
        *(["it is not nearer than every other method"] if len(farther) < len(others) else []),
    ]
    beside = f"{len(farther)} of {len(others)} other methods are farther, by an interval that excludes it"
    for word, some in (("nearer", nearer), ("open", undecided)):
        beside += f"; {word}: {_list([row['method'] for row in some])}" if some else ""
    text = (
        f"**{kind}, {loss}** ({own['requests']} requests): {label_of(own)} lies {_text(ratio)} ({_range(_ends(own))}) "
        f"times as far from retrained models as they from each other, in {own['unit']}; average gap {_text(gap, 1)}, "
        f"theirs {_text(theirs, 1)}."
    )
    if own["low"] is None:
        return True, f"{text} So few requests give no interval: nothing follows from them."
    return bool(short), f"{text} {beside}." + (f" Falls short: {', '.join(short)}." if short else "")


_SIDES = (0, 1), (1, -1)  # of an interval: all of it above 1, all of it below


def _others(own: Row, rows: Sequence[Row]) -> list[Row]:
    """A row of every other method, with chosen settings where there are any; those called as ours and more are ours,
    and of those that came to the same (NegGrad+ with either loss, where the fit's is cross-entropy) one counts."""
    found = {row["method"]: row for row in rows if row["method"] not in (own["method"], ORIGINAL, THEIRS)}
    others = [row for name, row in found.items() if not is_ours(name, own["method"])]
    return list({(row["ratio_logits"], row["ratio_probabilities"], row["gap"]): row for row in others}.values())


def overviews(found: Row) -> list[Table]:
    """A table for each loss and kind of request: medians of every method and its settings, the nearest first."""
    return [_overview(*group) for group in grouped(found["rows"])]


def _overview(loss: str, kind: str, rows: Sequence[Row]) -> Table:
    columns = ("95 %", *(number.heading for number in NUMBERS.values()), "off", "R within", "over ours")
    return Table(
        f"{kind}, {loss}",
        f"Medians over {max(row['requests'] for row in rows)} requests; 95 %: of the ratio in {rows[0]['unit']}, by "
        "which rows are ordered; off: the share of retrained models from which an accuracy is off by more than 3 "
        "points; R within: in how many requests relearning on retained data lies in the range of theirs; over ours: "
        "the 95 % interval of the ratio over that of ours on the same requests. The ratios of single retrained models "
        f"have a standard deviation of {_text(rows[0]['ratio_deviation'])}.",
        columns,
        {label_of(row): _figures(row) for row in sorted(rows, key=lambda row: row["ratio"])},
    )


def _figures(row: Row) -> list[str]:
    texts = [_text(row[name], number.decimals) for name, number in NUMBERS.items()]
    shares = _text(row["off"]), _text(row["relearn_retained_within"])
    return [_range(_ends(row)), *texts, *shares, _range(row["nearer"])]


def grouped(rows: Iterable[Row]) -> list[tuple[str, str, list[Row]]]:
    """The rows of a summary for each loss and kind of request."""
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        found[row["loss"], row["kind"]].append(row)
    return [(loss, kind, some) for (loss, kind), some in found.items()]


def _ends(row: Row) -> tuple[float, float] | None:
    return None if row["low"] is None else (row["low"], row["high"])


def _range(ends: Sequence[float] | None) -> str:
    return "–" if ends is None else f"{ends[0]:.2f} to {ends[1]:.2f}"


def _text(number: float | None, decimals: int = 2) -> str:
    return "–" if number is None else f"{number:.{decimals}f}"


def _list(texts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))


def tables(cells: Iterable[Cell]) -> list[Table]:
    """One for each data, model, images a class, loss and request: means over seeds, and standard deviations."""
    found: dict[tuple, list[Cell]] = defaultdict(list)
    for cell in cells:
        setting = cell.setting
        found[setting.data, setting.model, setting.per_class, setting.loss, cell.request].append(cell)
    return [_table(*group) for group in found.items()]


def _table(group: tuple, cells: Sequence[Cell]) -> Table:
    (data, model, per_class, loss, request), columns = group, shown("terminal", "pages")
    found = {method: [cell for cell in cells if method in cell.rows] for method in cells[0].rows}
    return Table(
        f"{data}, {model}, {per_class} images a class, {loss}, forgotten: {request}",
        f"{_audits(cells)} Seeds: {', '.join(str(cell.setting.seed) for cell in cells)}.{_choices(cells)}",
        [measure.heading for measure in columns.values()],
        {method: [_cell(those, method, name) for name in columns] for method, those in found.items()},
    )


def _cell(cells: Sequence[Cell], method: str, name: str) -> str:
    """Over seeds, what could not be told of one as ``value`` has it."""
    values = [each for cell in cells if (each := value(cell, method, name)) is not None]
    text = MEASURES[name].text
    spread = f" ± {text(stdev(values))}" if len(values) > 1 else ""
    return f"{text(mean(values) if values else None)}{spread}"


def _audits(cells: Sequence[Cell]) -> str:
    audits = [f"{cell.facts['audit']['verdict']} ({cell.facts['audit']['ratio']:.2f})" for cell in cells]
    return f"Audit of the memory before the request: {', '.join(audits)}."


def _choices(cells: Sequence[Cell]) -> str:
    """What was chosen; of the first seed."""
    told = [f"{name}: {_settings(choice['method'])}" for name, choice in cells[0].facts["chosen"].items()]
    return f" Chosen (seed {cells[0].setting.seed}): {'; '.join(told)}." if told else ""


def _settings(method: Sequence[Any]) -> str:
    name, fields = method[:2]
    given = (f"{field}={each:.3g}" if isinstance(each, float) else f"{field}={each}" for field, each in fields.items())
    return f"{name}({', '.join(text for text in given if not text.startswith('seed='))})"


def by_model(cells: Iterable[Cell], ours: str) -> Table:
    """One method's figures for each data, model, images a class and loss: over seeds and requests."""
    found: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        if ours in cell.rows:
            setting = cell.setting
            found[f"{setting.data}, {setting.model}, {setting.per_class}, {setting.loss}"].append(cell)
    return Table(
        f"{ours}, by model",
        "Medians over seeds and kinds of request; the gap beside the retrained models' own; of the answers that an "
        "audit speaks of, how many were off by more than 3 points, and how many of these and of the others the verdict "
        "had flagged.",
        ["requests", "ratio", "gap, retrained", "gap", "off, flagged", "others, flagged"],
        {name: _of_model(group, ours) for name, group in found.items()},
        "data, model, images a class, loss",
    )


def _of_model(cells: Sequence[Cell], ours: str) -> list[str]:
    judged, count = [(cell, own_row(cell, ours)) for cell in cells], flags(audited(cells, ours))
    medians = [
        middle(value(*each, RATIOS[each[0].facts["unit"]]) for each in judged),
        middle(value(cell, THEIRS, "average_gap") for cell in cells),
        middle(value(*each, "average_gap") for each in judged),
    ]
    flagged = [f"{count[part]}, {count[f'{part}_and_flagged']}" for part in ("bad", "good")]
    return [str(len(cells)), *map(_text, medians), *flagged]


def in_words(cell: Cell, ours: str) -> str:
    """How near the answer of ``ours`` to a request came."""
    row, setting, kind = own_row(cell, ours), cell.setting, kind_of(cell)
    ratio, original = (value(cell, name, RATIOS[cell.facts["unit"]]) for name in (row, ORIGINAL))
    theirs = sorted(cell.rows[name]["forget_accuracy"] or 0.0 for name in retrained_of(cell))
    verdict = None if value(cell, row, "doubt") is None else verdict_of(cell, row)
    return (
        f"{setting.data}, {setting.model}, {setting.per_class} a class, {setting.loss}, seed {setting.seed}, {kind}: "
        f"{_text(value(cell, row, 'forget_accuracy'), 1)} % of the forgotten images are still recognised, by retrained "
        f"models {theirs[0]:.1f} to {theirs[-1]:.1f} %; {_text(ratio)} times as far from these as they from each "
        f"other, the original {_text(original)}{f'; verdict: {verdict}' if verdict else ''}."
    )
