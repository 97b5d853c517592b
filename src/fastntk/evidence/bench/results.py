"""The results of a grid: an SQLite file a configuration. Cells have labels, rows have measures and logits."""

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastntk.common.errors import InputError
from fastntk.common.formats import Document, Format, unchanged
from fastntk.evidence.bench.config import Setting
from fastntk.evidence.measures import MEASURES
from fastntk.evidence.report import Measures, Report, is_retrained

FORMAT = Format("results", (unchanged, unchanged))
"""Of the files. One of an older version has other tables, which hold less, and is refused."""

_KEY = "data, model, per_class, seed, loss, request"
_THESE = f"({_KEY}) = (?, ?, ?, ?, ?, ?)"
_ANY = "SELECT name FROM sqlite_master"
_TABLES = (
    "CREATE TABLE about (format INTEGER NOT NULL, fastntk TEXT NOT NULL)",
    f"""CREATE TABLE cells (
    data TEXT, model TEXT, per_class INTEGER, seed INTEGER, loss TEXT, request TEXT, settings TEXT NOT NULL,
    facts TEXT NOT NULL, labels BLOB NOT NULL, PRIMARY KEY ({_KEY}))""",
    f"""CREATE TABLE rows (
    data TEXT, model TEXT, per_class INTEGER, seed INTEGER, loss TEXT, request TEXT, method TEXT,
    measures TEXT NOT NULL, logits BLOB NOT NULL, PRIMARY KEY ({_KEY}, method))""",
)


@dataclass(frozen=True)
class Cell:
    """One request against one fitted model: what is known of it, and the measures of every method."""

    setting: Setting
    request: str
    facts: Mapping[str, Any]
    rows: Mapping[str, Measures]


@dataclass(frozen=True)
class Measured:
    """The rows of a cell that was made before, perhaps with other methods.

    Attributes:
        answers: a digest of what each row's answer depends on, by the row's name.
        rows: their measures.
        scores: the score and seconds of settings on requests that nobody asks for, by a digest of what these depend on.
    """

    answers: Mapping[str, str]
    rows: Mapping[str, Measures]
    scores: Mapping[str, tuple[float, float]]

    def of(self, answers: Mapping[str, str]) -> dict[str, Measures]:
        """Of rows that are to be, by the digests of their answers, those that were measured, with all measures that
        there are; none where the retrained models are others, which all are compared with."""
        retrained = [
            {name: each for name, each in some.items() if is_retrained(name)} for some in (answers, self.answers)
        ]
        if retrained[0] != retrained[1]:
            return {}
        known = {self.answers[name]: row for name, row in self.rows.items() if name in self.answers}
        return {name: known[each] for name, each in answers.items() if set(known.get(each, ())) == set(MEASURES)}


class Results:
    """A results file, made with its first cell."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (tables := self._tables()):
            return
        [about] = self._read("SELECT format, fastntk FROM about") if "about" in tables else [(0, "before 0.1.0")]
        FORMAT.read(dict(zip(("format", "fastntk"), about, strict=True)), path)
        if about[0] < FORMAT.version:
            raise InputError(f"the results {path} are of an older fastntk, {about[1]}. Run the grid anew.")

    def holds(self, setting: Setting, request: str, settings: Mapping[str, object]) -> bool:
        """Whether the cell is there, made with these settings."""
        found = self._read(f"SELECT settings FROM cells WHERE {_THESE}", _key(setting, request))
        return any(json.loads(text) == settings for (text,) in found)

    def measured(self, setting: Setting, request: str) -> Measured:
        """What the cell has, with whatever settings it was made."""
        key = _key(setting, request)
        facts = self._read(f"SELECT facts FROM cells WHERE {_THESE}", key)
        rows = self._read(f"SELECT method, measures FROM rows WHERE {_THESE}", key)
        known = json.loads(facts[0][0]) if facts else {}
        scores = {key: (score, seconds) for key, (score, seconds) in known.get("scores", {}).items()}
        return Measured(known.get("answers", {}), {name: json.loads(measures) for name, measures in rows}, scores)

    def add(
        self,
        setting: Setting,
        request: str,
        settings: Mapping[str, object],
        facts: Mapping[str, object],
        report: Report,
    ) -> None:
        """Enter a cell, in place of an earlier one. Logits are those on the forgotten samples, in half precision."""
        key = _key(setting, request)
        with self._open() as database:
            database.execute("BEGIN IMMEDIATE")  # the tables, if they are not there, with the cell or not at all
            if not database.execute(_ANY).fetchone():
                for table in _TABLES:
                    database.execute(table)
                database.execute("INSERT INTO about VALUES (:format, :fastntk)", FORMAT.stamped({}))
            for table in ("cells", "rows"):
                database.execute(f"DELETE FROM {table} WHERE {_THESE}", key)
            made = (*key, json.dumps(settings), json.dumps(facts), _packed(report.labels["forget"], np.int16))
            database.execute("INSERT INTO cells VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", made)
            for method, measures in report.rows.items():
                row = (*key, method, json.dumps(measures), _packed(report.logits[method]["forget"], np.float16))
                database.execute("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def cells(self) -> list[Cell]:
        """All of them, in order of their names."""
        cells = self._read(f"SELECT {_KEY}, facts FROM cells ORDER BY {_KEY}")
        rows = self._read(f"SELECT {_KEY}, method, measures FROM rows ORDER BY rowid")
        measures: dict[tuple, dict[str, Any]] = {}
        for *key, method, text in rows:
            measures.setdefault(tuple(key), {})[method] = self._document(text)
        return [Cell(Setting(*key[:5]), key[5], self._document(facts), measures[tuple(key)]) for *key, facts in cells]

    def _document(self, text: str) -> Document:
        return Document(json.loads(text), str(self.path))

    def logits(self, cell: Cell, method: str) -> Tensor:
        """Of a method's model on the forgotten samples."""
        key = *_key(cell.setting, cell.request), method
        values = self._unpacked(f"SELECT logits FROM rows WHERE {_THESE} AND method = ?", key, np.float16)
        return torch.from_numpy(values.reshape(-1, cell.facts["classes"]).astype(np.float32))

    def labels(self, cell: Cell) -> Tensor:
        """Of the forgotten samples."""
        query = f"SELECT labels FROM cells WHERE {_THESE}"
        values = self._unpacked(query, _key(cell.setting, cell.request), np.int16)
        return torch.from_numpy(values.astype(np.int64))

    def _unpacked(self, query: str, key: tuple, kind: type[np.generic]) -> np.ndarray:
        """A blob's numbers."""
        return np.frombuffer(self._read(query, key)[0][0], kind)

    def _tables(self) -> set[str]:
        return {name for (name,) in self._read(_ANY)}

    def _read(self, query: str, key: tuple = ()) -> list[Any]:
        """Rows; none of a file that is not there or empty."""
        if not self.path.exists():
            return []
        with self._open() as database:
            return database.execute(query, key).fetchall() if database.execute(_ANY).fetchone() else []

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """One transaction."""
        try:
            database = sqlite3.connect(self.path)
        except sqlite3.Error as error:
            raise InputError(f"the results {self.path} cannot be opened ({error}).") from error
        try:
            with database:
                yield database
        except sqlite3.Error as error:
            raise InputError(f"the results {self.path} cannot be used ({error}).") from error
        finally:
            database.close()


def check_results(folder: Path) -> None:
    """Raises ``InputError`` for results in a folder that cannot be read beside others: before hours are spent."""
    for path in folder.glob("*.sqlite"):
        Results(path)


def stored_cells(folder: Path) -> list[Cell]:
    """Those of all configurations whose results are in a folder.

    Raises:
        InputError: there is none, or two of them hold the same one.
    """
    paths = sorted(folder.glob("*.sqlite"))
    cells = {path: Results(path).cells() for path in paths}
    if not any(cells.values()):
        raise InputError(f"there are no results in {folder}. Run a configuration first.")
    seen: dict[tuple, Path] = {}
    for path, each in ((path, each) for path, some in cells.items() for each in some):
        other = seen.setdefault(_key(each.setting, each.request), path)
        if other != path:
            raise InputError(f"{other} and {path} both have {each.setting}, {each.request}. Move one elsewhere.")
    return [each for some in cells.values() for each in some]


def _key(setting: Setting, request: str) -> tuple[str, str, int, int, str, str]:
    return setting.data, setting.model, setting.per_class, setting.seed, setting.loss, request


def _packed(values: Tensor, kind: type[np.generic]) -> bytes:
    return values.numpy().astype(kind).tobytes()
