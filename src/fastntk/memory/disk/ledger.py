"""The ledger of a memory's folder: which files are the memory, and every request with its state.

A request is first ``answered`` (its weights are durable, its samples' trace is still in the folder), then ``purged``
(the trace is gone, but for what the answer itself and the anchor tell together: docs/limits.md), and ``re-anchored`` by
a refresh (that is gone too). The ledger names no sample. It is a SQLite database beside a small file with its SHA-256;
while a transaction is under way that file says so, and after a crash SQLite rolls the transaction back.
"""

import json
import logging
import sqlite3
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from fastntk.common.errors import InputError
from fastntk.common.files import file_digest, read_json, write, write_json
from fastntk.common.formats import Document
from fastntk.common.machine import now
from fastntk.memory.audit import Audit
from fastntk.memory.certificate import Certificate
from fastntk.memory.disk.format import ENTRY, LEDGER

log = logging.getLogger(__name__)

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
        state: ``answered``, ``purged`` or ``re-anchored``.
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

    def announce(self) -> None:
        """A memory is about to be made in the folder."""
        write_json(self._sum, _PENDING)

    def announced(self) -> bool:
        """Whether something was begun here; where there is no ledger, a memory that was never completed."""
        return self._sum.is_file() and read_json(self._sum) == _PENDING

    def create(self, base: tuple[str, str], audit: Audit | None) -> None:
        """A ledger of no request but an audit, if there was one, in place of what was there; ``base`` is a file's name
        and SHA-256."""
        if self.path.is_file():
            with self._writing() as database:
                for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                    database.execute(f"DROP TABLE {table}")
                _fill(database, base, audit)
            return

        def save(path: Path) -> None:
            with _connected(path) as database:
                database.execute("BEGIN IMMEDIATE")
                _fill(database, base, audit)
                database.execute("COMMIT")

        write(self.path, save)
        self._seal()

    def answer(self, certificate: Certificate, journal: tuple[str, str], seconds: float) -> None:
        """Enter a request whose journal, a file's name and SHA-256, is now part of the memory."""
        with self._writing() as database:
            database.execute("INSERT INTO files VALUES (?, ?)", journal)
            row = certificate.request, certificate.kind, certificate.to_ledger()
            _enter(database, *row, seconds, file=journal[0])

    def audited(self, audit: Audit) -> None:
        """Enter an audit; it changes nothing of the memory."""
        with self._writing() as database:
            _enter_audit(database, audit)

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
        """What ``switch`` has left out is gone: so say the requests concerned, and those before a refresh."""
        concerned = "state = 'answered' AND file IS NULL"
        last = "(SELECT max(number) FROM requests WHERE kind = 'refresh')"
        before = f"state = 'purged' AND kind IN ('forget', 'remember') AND number < {last}"
        with self._open() as database:
            some = _one(database, f"SELECT count(*) FROM requests WHERE ({concerned}) OR ({before})")
        if some:
            with self._writing() as database:
                change = f"UPDATE requests SET state = 'purged', purged = ?, purge_seconds = ? WHERE {concerned}"
                database.execute(change, (now(), seconds))
                database.execute(f"UPDATE requests SET state = 're-anchored' WHERE {before}")

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
        try:
            with _connected(self.path) as database:
                yield database
        except sqlite3.Error as error:
            raise InputError(
                f"the ledger {self.path} cannot be used ({error}). Restore the folder from a backup, or remove it and "
                "prepare again, if nothing has been forgotten in it."
            ) from error

    def _seal(self) -> None:
        """Write the sum of what has been committed. Where it cannot be, that is not undone: ``check`` makes it up."""
        try:
            write_json(self._sum, {"sha256": file_digest(self.path)})
        except InputError as error:
            log.warning("%s It will be made up for when the memory is next opened.", error)

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
        certificates: list[Document] = [ENTRY.read(json.loads(row["certificate"]), self.path) for row in rows]
        return [Request(**{**row, "certificate": each}) for row, each in zip(rows, certificates, strict=True)]

    def files(self) -> dict[str, str]:
        """The files that make up the memory, with their SHA-256."""
        with self._open() as database:
            return {row["name"]: row["sha256"] for row in database.execute("SELECT * FROM files")}

    def count(self) -> int:
        """How many rows there are."""
        with self._open() as database:
            return _one(database, "SELECT count(*) FROM requests")

    def used(self) -> bool:
        """Whether a request has been answered, or the memory refreshed."""
        with self._open() as database:
            return bool(_one(database, "SELECT count(*) FROM requests WHERE kind != 'audit'"))

    def pending(self) -> list[str]:
        """The journals that are part of the memory, in order."""
        with self._open() as database:
            rows = database.execute("SELECT file FROM requests WHERE file IS NOT NULL ORDER BY number")
            return [row["file"] for row in rows]

    def version(self) -> tuple[int, dict[str, str]]:
        """Changes with every request and every purge."""
        return self.count(), self.files()


@contextmanager
def _connected(path: Path) -> Iterator[sqlite3.Connection]:
    database = sqlite3.connect(path, isolation_level=None)
    try:
        database.row_factory = sqlite3.Row
        for pragma in ("secure_delete = ON", "journal_mode = DELETE", "synchronous = EXTRA"):
            database.execute(f"PRAGMA {pragma}")
        yield database
    finally:
        database.close()  # which rolls back what was not committed


def _one(database: sqlite3.Connection, query: str) -> int:
    return int(database.execute(query).fetchone()[0])


def _fill(database: sqlite3.Connection, base: tuple[str, str], audit: Audit | None) -> None:
    """The tables, with the base and an audit, if any."""
    for table in _TABLES:
        database.execute(table)
    database.execute("INSERT INTO about VALUES (:format, :fastntk)", LEDGER.stamped({}))
    database.execute("INSERT INTO files VALUES (?, ?)", base)
    if audit:
        _enter_audit(database, audit)


def _enter_audit(database: sqlite3.Connection, audit: Audit) -> None:
    _enter(database, str(uuid.uuid4()), "audit", audit.to_dict(), audit.seconds, purged=True)


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
