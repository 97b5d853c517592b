"""The folder of a memory: all or nothing at every step, and no trace of a purged sample.

ledger.sqlite          which of the files below are the memory, with their SHA-256, and every request
ledger.sqlite.sha256   of the ledger itself
base-N.safetensors     the memory as of the latest purge
journal-N.safetensors  what request N changed since: the trace of its samples, until it is purged
lock                   held while the folder is read or written

A file is written whole and synced before a transaction of the ledger makes it part of the memory; a base or a journal
that the ledger does not name is left over from a crash and removed when the folder is next opened. Nothing else in the
folder is ever touched.
"""

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from fastntk.common.errors import InputError
from fastntk.common.files import discard, file_digest, held, lock_of, read_tensors, sync, writable, write_tensors
from fastntk.common.formats import Document, Format
from fastntk.memory.audit import Audit
from fastntk.memory.certificate import Certificate
from fastntk.memory.disk.format import BASE, JOURNAL
from fastntk.memory.disk.ledger import Ledger, Request

log = logging.getLogger(__name__)

_LEFT_OVER = re.compile(r"\.?(base|journal)-\d+\.safetensors(\.new)?|\.ledger\.sqlite(\.sha256)?\.new")


class Folder:
    """One folder. ``version`` is that of the contents which this process has in its own memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()  # wherever the process goes
        self.ledger, self._lock = Ledger(self.folder / "ledger.sqlite"), lock_of(self.folder)
        self.version: object = None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other process reads or writes the folder meanwhile. Where this one may not write, it reads without a lock.

        Raises:
            InputError: another one kept it for over a minute, or there is no lock to be had.
        """
        if self.readonly:
            yield
            return
        with held(self._lock, self.folder):
            yield

    @property
    def readonly(self) -> bool:
        """Whether this process may read the folder and not write it: somebody else's, or a snapshot."""
        return self.folder.is_dir() and not os.access(self.folder, os.W_OK)

    def create(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any], audit: Audit | None) -> None:
        """A new memory, with the audit that it has had, if any, in place of an unused one.

        Raises:
            InputError: it cannot be written, the memory in the folder has answered requests, or there are other files
                in it and no memory.
        """
        writable(self.folder)
        with self.locked():
            self.check_unused()
            self._check_vacant()
            self.ledger.announce()
            self.ledger.create(self._write(BASE, f"base-{self._next()}", tensors, record), audit)
            self._opened()

    def check_there(self) -> None:
        """Raises ``InputError`` if there is no memory, whole or damaged, in the folder."""
        if not self.ledger.path.is_file() and (self.ledger.announced() or not any(self.folder.glob("base-*"))):
            raise InputError(f"there is no memory in {self.folder}. Prepare one first.")

    def read(self) -> tuple[Document, list[Document]]:
        """All of the memory, checked: the base, and the journals of the requests since, in order; each a record with
        its tensors under that key. The lock must be held.

        Raises:
            InputError: a file is missing, damaged or of another kind or format.
        """
        self.check()
        self._opened()
        base = next(name for name in self.ledger.files() if name.startswith("base"))
        return self._read(BASE, base), [self._read(JOURNAL, name) for name in self.ledger.pending()]

    def _read(self, kind: Format, name: str) -> Document:
        tensors, record = read_tensors(self.folder / name)
        return kind.read({**record, "tensors": tensors}, self.folder / name)

    @contextmanager
    def unused(self) -> Iterator[None]:
        """The memory in the folder, if there is one, answers no request meanwhile, and has not answered one.

        Raises:
            InputError: it has.
        """
        if not self.folder.is_dir():
            yield
            return
        with self.locked():
            self.check_unused()
            yield

    def check_unused(self) -> None:
        """Raises ``InputError`` if the memory in the folder, if any, has answered requests, or its ledger is lost."""
        if self.ledger.path.is_file() and self.ledger.used():
            raise InputError(
                f"the memory in {self.folder} has answered requests, which a new one would undo. Refresh it, or choose "
                "another folder."
            )
        bases = sorted(path.name for path in self.folder.glob("base-*")) if self.folder.is_dir() else []
        if bases and not self.ledger.path.is_file() and not self.ledger.announced():
            raise InputError(
                f"{self.folder} holds {bases[0]} without the ledger of its requests: a new memory would make samples "
                "members again that were forgotten. Restore ledger.sqlite from a backup, or choose another folder."
            )

    def _check_vacant(self) -> None:
        """Raises ``InputError`` if there is no memory in the folder, but something else."""
        if self.ledger.path.is_file() or self.ledger.announced():
            return
        names = sorted(path.name for path in self.folder.iterdir() if path.name != "lock")
        others = [name for name in names if not _LEFT_OVER.fullmatch(name)]
        if others:
            raise InputError(f"{self.folder} holds other files ({others[0]}). Choose a folder that is empty or new.")

    def requests(self) -> list[Request]:
        """What the ledger says of every request; takes the lock.

        Raises:
            InputError: there is no ledger, or it is damaged.
        """
        if not self.ledger.path.is_file():
            raise InputError(f"there is no ledger {self.ledger.path}.")
        with self.locked():
            self.ledger.check()
            return self.ledger.requests()

    def check(self) -> None:
        """Raises ``InputError`` that names the first file which is missing or damaged."""
        self.ledger.check()
        for name, expected in self.ledger.files().items():
            if (self.folder / name).is_symlink():
                raise InputError(
                    f"{self.folder / name} is a link: a purge would leave what it points to. Put the file in its place."
                )
            if not (self.folder / name).is_file():
                raise InputError(f"{self.folder / name} is missing. Restore it from a backup, or prepare again.")
            if file_digest(self.folder / name) != expected:
                raise InputError(f"{self.folder / name} is damaged. Restore it from a backup, or prepare again.")

    def append(
        self, certificate: Certificate, journal: tuple[Mapping[str, Tensor], Mapping[str, Any]], started: float
    ) -> float:
        """Make an answer durable; returns the seconds since ``started``. ``finish`` must follow, under the same lock.

        Raises:
            InputError: it cannot be written; the memory is as it was.
        """
        file = self._write(JOURNAL, f"journal-{self.ledger.count() + 1}", *journal)
        try:
            self.ledger.answer(certificate, file, time.perf_counter() - started)
        except InputError as error:
            if file[0] not in self.ledger.files():
                discard(self.folder / file[0])
                raise
            log.warning("the request is answered, but: %s", error)
        return time.perf_counter() - started

    def finish(self, certificate: Certificate) -> None:
        """The answer is known to this process in full; what was measured of it since goes into the ledger."""
        if certificate.error is not None:
            self.ledger.amend(certificate)
        self.version = self.ledger.version()

    def audited(self, audit: Audit) -> None:
        """Enter an audit into the ledger; the lock must be held."""
        self.ledger.audited(audit)
        self.version = self.ledger.version()

    def replace(
        self,
        tensors: Mapping[str, Tensor],
        record: Mapping[str, Any],
        started: float,
        refresh: Mapping[str, object] | None = None,
    ) -> None:
        """Write the memory anew, without a trace of what has left it, and remove everything older.

        The lock must be held; the work began at ``started``. With ``refresh``, what is known of it, it is entered into
        the ledger as one.

        Raises:
            InputError: it cannot be written; the memory is as it was.
        """
        base = self._write(BASE, f"base-{self._next()}", tensors, record)
        self.ledger.switch(base, time.perf_counter() - started, refresh)
        self._opened(started)

    def _next(self) -> int:
        """A number that no base in the folder has."""
        found = (re.fullmatch(r"base-(\d+)\.safetensors", path.name) for path in self.folder.iterdir())
        return 1 + max((int(each[1]) for each in found if each), default=0)

    def _write(
        self, kind: Format, name: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]
    ) -> tuple[str, str]:
        """A new file and its SHA-256."""
        path = self.folder / f"{name}.safetensors"
        write_tensors(path, tensors, kind.stamped(record))
        return path.name, file_digest(path)

    def _opened(self, started: float | None = None) -> None:
        """Remove what is not part of the memory any more, say so of the requests concerned, and note the version."""
        if self.readonly:
            self.version = self.ledger.version()
            return
        kept = self.ledger.files()
        for path in self.folder.iterdir():
            if path.name not in kept and _LEFT_OVER.fullmatch(path.name):
                discard(path)
        sync(self.folder)
        self.ledger.purged(None if started is None else time.perf_counter() - started)
        self.version = self.ledger.version()
