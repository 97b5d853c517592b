"""The ledger of a memory's folder: which files are the memory, and every request with its state.

A request is first ``answered`` (its weights are durable, its samples' trace is still in the folder) and then ``purged``
(the trace is gone). The ledger names no sample. It is a SQLite database beside a small file with its SHA-256; while a
transaction is under way that file says so, and after a crash SQLite rolls the transaction back.
"""

import json
import sqlite3
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from fastntk.common.errors import InputError
from fastntk.common.files import file_digest, read_json, write_json
from fastntk.common.formats import Document
from fastntk.memory.audit import Audit
from fastntk.memory.certificate import Certificate
from fastntk.memory.disk.format import ENTRY, LEDGER

_TABLES = (
    "CREATE TABLE about (format INTEGER NOT NULL, fastntk TEXT NOT NULL)",
    "CREATE TABLE files (name TEXT PRIMARY KEY, sha256 TEXT NOT NULL)",
    """CREATE TABLE requests (
        number INTEGER PRIMARY KEY, request TEXT UNIQUE NOT NULL, kind TEXT NOT NULL, state TEXT NOT NULL,
        answered TEXT NOT NULL, purged TEXT, seconds REAL NOT NULL, purge_seconds REAL, file TEXT,
        certificate TEXT NOT NULL)""",
)
_INSERT = f"INSERT INTO requests VALUES ({', '.join('?' * 10)})"
_PENDING = {"transaction": "under way"}


@dataclass(frozen=True)
class Request:
    """A row of the ledger.

    Attributes:
        number: from 1, in the order of the answers.
        request: its id, random.
        kind: ``forget``, ``remember``, ``refresh`` or ``audit``.
        state: ``answered`` or ``purged``.
        answered: when, as ISO 8601 in UTC.
        purged: when the samples' trace was gone from the folder, or None.
        seconds: until the new weights were durable.
        purge_seconds: what purging took, shared by all requests that were purged together.
        file: the journal that holds its samples' trace, until it is purged.
        certificate: what is known of the answer, without the salt of the hashed ids.
    """

    number: int
    request: str
    kind: str
    state: str
    answered: str
    purged: str | None
    seconds: float
    purge_seconds: float | None
    file: str | None
    certificate: Mapping[str, object]

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


class Ledger:
    """One database file; every method opens and closes it."""

    def __init__(self, path: Path) -> None:
        self.path, self._sum = path, path.with_name(f"{path.name}.sha256")

    def create(self, base: tuple[str, str]) -> None:
        """A ledger of no requests, in place of what was there; ``base`` is a file's name and SHA-256."""
        self.path.unlink(missing_ok=True)
        with self._writing() as database:
            for table in _TABLES:
                database.execute(table)
            database.execute("INSERT INTO about VALUES (:format, :fastntk)", LEDGER.stamped({}))
            database.execute("INSERT INTO files VALUES (?, ?)", base)

    def answer(self, certificate: Certificate, journal: tuple[str, str], seconds: float) -> None:
        """Enter a request whose journal, a file's name and SHA-256, is now part of the memory."""
        with self._writing() as database:
            database.execute("INSERT INTO files VALUES (?, ?)", journal)
            row = certificate.request, certificate.kind, certificate.to_ledger()
            _enter(database, *row, seconds, file=journal[0])

    def audited(self, audit: Audit) -> None:
        """Enter an audit; it changes nothing of the memory."""
        with self._writing() as database:
            _enter(database, str(uuid.uuid4()), "audit", audit.to_dict(), audit.seconds, purged=True)

    def audit(self) -> Audit | None:
        """The latest one since the memory was linearised."""
        for request in reversed(self.requests()):
            if request.kind == "refresh":
                return None
            if request.kind == "audit":
                return Audit.from_dict(request.certificate)
        return None

    def amend(self, certificate: Certificate) -> None:
        """What has been measured of a request since it was answered."""
        with self._writing() as database:
            given = _packed(certificate.to_ledger()), certificate.request
            database.execute("UPDATE requests SET certificate = ? WHERE request = ?", given)

    def switch(self, base: tuple[str, str], seconds: float, refresh: Mapping[str, object] | None) -> None:
        """``base`` alone is the memory from now on; with ``refresh``, what is known of one, it is entered as well."""
        with self._writing() as database:
            database.execute("DELETE FROM files")
            database.execute("INSERT INTO files VALUES (?, ?)", base)
            database.execute("UPDATE requests SET file = NULL")
            if refresh is not None:
                _enter(database, str(uuid.uuid4()), "refresh", refresh, seconds)

    def purged(self, seconds: float | None) -> None:
        """The files that ``switch`` has left out are gone; so say the requests concerned."""
        concerned = "state = 'answered' AND file IS NULL"
        if self._one(f"SELECT count(*) FROM requests WHERE {concerned}"):
            with self._writing() as database:
                change = f"UPDATE requests SET state = 'purged', purged = ?, purge_seconds = ? WHERE {concerned}"
                database.execute(change, (now(), seconds))

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it or nothing.

        Raises:
            InputError: the disk is full or the database cannot be written; it is as it was.
        """
        write_json(self._sum, _PENDING)
        with self._open() as database:
            database.execute("BEGIN IMMEDIATE")
            yield database
            database.execute("COMMIT")
        self._seal()

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        database = None
        try:
            database = sqlite3.connect(self.path, isolation_level=None)
            database.row_factory = sqlite3.Row
            for pragma in ("secure_delete = ON", "journal_mode = DELETE", "synchronous = EXTRA"):
                database.execute(f"PRAGMA {pragma}")
            yield database
        except sqlite3.Error as error:
            raise InputError(f"the ledger {self.path} cannot be used ({error}).") from error
        finally:
            if database:
                database.close()  # which rolls back what was not committed

    def _seal(self) -> None:
        write_json(self._sum, {"sha256": file_digest(self.path)})

    def check(self) -> None:
        """Raises ``InputError`` if the database is missing, not what was last written, or of an unknown format."""
        if not self.path.is_file():
            raise InputError(f"there is no ledger {self.path}.")
        expected = read_json(self._sum)
        if expected == _PENDING:
            with self._open() as database:
                state = database.execute("PRAGMA integrity_check").fetchone()[0]
            if state != "ok":
                raise InputError(f"the ledger {self.path} is damaged ({state}).")
            self._seal()
        elif expected != {"sha256": file_digest(self.path)}:
            raise InputError(f"the ledger {self.path} or {self._sum} is damaged: they do not belong together.")
        with self._open() as database:
            known = database.execute("SELECT name FROM sqlite_master WHERE name = 'about'").fetchone()
            about = dict(database.execute("SELECT * FROM about").fetchone()) if known else {}
        LEDGER.read(about, self.path)

    def requests(self) -> list[Request]:
        """All of them, in order."""
        with self._open() as database:
            rows = [dict(row) for row in database.execute("SELECT * FROM requests ORDER BY number")]
        return [Request(**{**row, "certificate": self._unpacked(row["certificate"])}) for row in rows]

    def _unpacked(self, text: str) -> Document:
        return ENTRY.read(json.loads(text), self.path)

    def files(self) -> dict[str, str]:
        """The files that make up the memory, with their SHA-256."""
        with self._open() as database:
            return {row["name"]: row["sha256"] for row in database.execute("SELECT * FROM files")}

    def count(self) -> int:
        """How many rows there are."""
        return self._one("SELECT count(*) FROM requests")

    def used(self) -> bool:
        """Whether a request has been answered, or the memory refreshed."""
        return bool(self._one("SELECT count(*) FROM requests WHERE kind != 'audit'"))

    def pending(self) -> list[str]:
        """The journals that are part of the memory, in order."""
        with self._open() as database:
            rows = database.execute("SELECT file FROM requests WHERE file IS NOT NULL ORDER BY number")
            return [row["file"] for row in rows]

    def version(self) -> tuple[int, dict[str, str]]:
        """Changes with every request and every purge."""
        return self.count(), self.files()

    def _one(self, query: str) -> int:
        with self._open() as database:
            return int(database.execute(query).fetchone()[0])


def _enter(
    database: sqlite3.Connection,
    request: str,
    kind: str,
    certificate: Mapping[str, object],
    seconds: float,
    file: str | None = None,
    purged: bool = False,
) -> None:
    """Insert a row: answered now, or, where nothing is to be purged, purged now as well."""
    time, state = now(), "purged" if purged else "answered"
    row = None, request, kind, state, time, time if purged else None, seconds, None, file, _packed(certificate)
    database.execute(_INSERT, row)


def _packed(certificate: Mapping[str, object]) -> str:
    return json.dumps(ENTRY.stamped(certificate))


def now() -> str:
    """The time as ISO 8601 in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
