"""The results of a grid: one SQLite file. Cells have labels, rows have measures and logits."""

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
from fastntk.evidence.report import Report

FORMAT = Format("results", (unchanged,))
"""Of the file."""

_KEY = "data, model, per_class, seed, request"
_PARTS = ("forget", "test")
_TABLES = f"""
CREATE TABLE about (format INTEGER NOT NULL, fastntk TEXT NOT NULL);
CREATE TABLE cells (
    data TEXT, model TEXT, per_class INTEGER, seed INTEGER, request TEXT, settings TEXT NOT NULL, facts TEXT NOT NULL,
    forget BLOB NOT NULL, test BLOB NOT NULL, PRIMARY KEY ({_KEY}));
CREATE TABLE rows (
    data TEXT, model TEXT, per_class INTEGER, seed INTEGER, request TEXT, method TEXT, measures TEXT NOT NULL,
    forget BLOB NOT NULL, test BLOB NOT NULL, PRIMARY KEY ({_KEY}, method));
"""


@dataclass(frozen=True)
class Cell:
    """One request against one fitted model: what is known of it, and the measures of every method."""

    setting: Setting
    request: str
    facts: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, float | None]]


class Results:
    """A results file, made if it is not there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as database:
            there = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
            if not there:
                database.executescript(_TABLES)
                database.execute("INSERT INTO about VALUES (:format, :fastntk)", FORMAT.stamped({}))
            elif "about" in there:
                about = database.execute("SELECT format, fastntk FROM about").fetchone()
                FORMAT.read(dict(zip(("format", "fastntk"), about, strict=True)), path)

    def holds(self, setting: Setting, request: str, settings: Mapping[str, object]) -> bool:
        """Whether the cell is there, made with these settings."""
        with self._open() as database:
            found = database.execute(
                f"SELECT settings FROM cells WHERE ({_KEY}) = (?, ?, ?, ?, ?)", _key(setting, request)
            )
            row = found.fetchone()
        return row is not None and json.loads(row[0]) == settings

    def add(
        self,
        setting: Setting,
        request: str,
        settings: Mapping[str, object],
        facts: Mapping[str, object],
        report: Report,
    ) -> None:
        """Enter a cell, in place of an earlier one. Logits are kept in half precision."""
        key = _key(setting, request)
        with self._open() as database:
            for table in ("cells", "rows"):
                database.execute(f"DELETE FROM {table} WHERE ({_KEY}) = (?, ?, ?, ?, ?)", key)
            labels = (_packed(report.labels[part], np.int16) for part in _PARTS)
            made = (*key, json.dumps(settings), json.dumps(facts), *labels)
            database.execute("INSERT INTO cells VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", made)
            for method, measures in report.rows.items():
                scores = (_packed(report.logits[method][part], np.float16) for part in _PARTS)
                row = (*key, method, json.dumps(measures), *scores)
                database.execute("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def cells(self) -> list[Cell]:
        """All of them, in order of their names."""
        with self._open() as database:
            cells = database.execute(f"SELECT {_KEY}, facts FROM cells ORDER BY {_KEY}").fetchall()
            rows = database.execute(f"SELECT {_KEY}, method, measures FROM rows ORDER BY rowid").fetchall()
        measures: dict[tuple, dict[str, Any]] = {}
        for *key, method, text in rows:
            measures.setdefault(tuple(key), {})[method] = self._document(text)
        return [Cell(Setting(*key[:4]), key[4], self._document(facts), measures[tuple(key)]) for *key, facts in cells]

    def _document(self, text: str) -> Document:
        return Document(json.loads(text), str(self.path))

    def logits(self, cell: Cell, method: str, part: str) -> Tensor:
        """Of a method's model on the ``forget`` or ``test`` samples."""
        key = *_key(cell.setting, cell.request), method
        values = self._unpacked(f"SELECT {part} FROM rows WHERE ({_KEY}, method) = (?, ?, ?, ?, ?, ?)", key, np.float16)
        return torch.from_numpy(values.reshape(-1, cell.facts["classes"]).astype(np.float32))

    def labels(self, cell: Cell, part: str) -> Tensor:
        """Of the ``forget`` or ``test`` samples."""
        query = f"SELECT {part} FROM cells WHERE ({_KEY}) = (?, ?, ?, ?, ?)"
        values = self._unpacked(query, _key(cell.setting, cell.request), np.int16)
        return torch.from_numpy(values.astype(np.int64))

    def _unpacked(self, query: str, key: tuple, kind: type[np.generic]) -> np.ndarray:
        """A blob's numbers."""
        with self._open() as database:
            return np.frombuffer(database.execute(query, key).fetchone()[0], kind)

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


def _key(setting: Setting, request: str) -> tuple[str, str, int, int, str]:
    return setting.data, setting.model, setting.per_class, setting.seed, request


def _packed(values: Tensor, kind: type[np.generic]) -> bytes:
    return values.numpy().astype(kind).tobytes()
