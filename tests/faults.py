"""Faults of a disk and of a process, at every operation on a folder: it fails, it is the last before a kill, or the
last before a crash that loses whatever had not been synced.

An operation is the creation of a file or folder, a write, a sync, a change of a name, a removal, a change of rights,
and a statement of SQLite that writes. They are interposed on in a fork of this process, in which the command line runs.
"""

import contextlib
import errno
import io
import os
import sqlite3
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastntk.cli.main import main
from fastntk.common import files

FAULTS = "fails", "killed", "torn"
KILLED, _RAISED = 9, 70
_OPEN, _FSYNC, _WRITES = io.open, os.fsync, set("wax+")


@dataclass
class Injector:
    """Counts the operations under ``root``; the one numbered ``at`` has the ``fault``.

    Attributes:
        unsynced: files with content that a crash may lose.
        names: how to undo what was done to names and is not synced, in order, with the folder that must be.
    """

    root: Path
    at: int = 0
    fault: str = "fails"
    count: int = 0
    unsynced: set[Path] = field(default_factory=set)
    names: list[tuple[Path, Callable[[], object]]] = field(default_factory=list)

    def operation(
        self, path: Any, do: Callable[[], Any], half: Callable[[], object] = lambda: None, error: type = OSError
    ) -> Any:
        """Do it, or what the fault makes of it."""
        if self.root not in (Path(path), *Path(path).parents):
            return do()
        self.count += 1
        if self.count != self.at:
            return do()
        if self.fault == "fails":
            half()
            raise error(errno.ENOSPC, "no space left on device") if error is OSError else error("disk I/O error")
        result = do()
        if self.fault == "torn":
            self._lose()
        os._exit(KILLED)
        return result

    def _lose(self) -> None:
        """What a crash may do: names go back, unsynced files lose their second half."""
        for path in self.unsynced:
            if path.is_file():
                os.truncate(path, path.stat().st_size // 2)
        for _, undo in reversed(self.names):
            undo()

    def wrote(self, path: Path) -> None:
        """Content that is not synced."""
        if not path.exists():
            self.names.append((path.parent, lambda: path.unlink(missing_ok=True)))
        self.unsynced.add(path)

    def synced(self, path: Path) -> None:
        """A file's content, or a folder's names."""
        self.unsynced.discard(path)
        self.names = [(folder, undo) for folder, undo in self.names if folder != path]

    def install(self) -> None:
        """For good: the process is a fork that ends soon."""
        real = {name: getattr(os, name) for name in ("mkdir", "rmdir", "unlink", "replace", "open", "chmod", "fsync")}
        self.real = real

        def mkdir(path: Any, *more: Any, **options: Any) -> None:
            def do() -> None:
                real["mkdir"](path, *more, **options)
                self.names.append((Path(path).parent, lambda: _remove(Path(path), real)))

            self.operation(path, do)

        def rmdir(path: Any, *, dir_fd: int | None = None) -> None:
            self.operation(_full(path, dir_fd), lambda: real["rmdir"](path, dir_fd=dir_fd))

        def unlink(path: Any, *, dir_fd: int | None = None) -> None:
            whole = _full(path, dir_fd)

            def do() -> None:
                content = whole.read_bytes() if whole.is_file() and not whole.is_symlink() else None
                real["unlink"](path, dir_fd=dir_fd)
                if content is not None:
                    self.names.append((whole.parent, lambda: whole.parent.is_dir() and _put(whole, content)))

            self.operation(whole, do)

        def replace(source: Any, target: Any, **options: Any) -> None:
            source, target = Path(source), Path(target)

            def do() -> None:
                before = target.read_bytes() if target.is_file() else None
                real["replace"](source, target, **options)
                if source in self.unsynced:
                    self.unsynced.remove(source)
                    self.unsynced.add(target)
                self.names.append((target.parent, lambda: _back(source, target, before, real)))

            self.operation(target, do)

        def opened(path: Any, flags: int, *more: Any, **options: Any) -> int:
            if not flags & os.O_CREAT or os.path.exists(path):
                return real["open"](path, flags, *more, **options)
            return self.operation(path, lambda: real["open"](path, flags, *more, **options))

        def chmod(path: Any, *more: Any, **options: Any) -> None:
            self.operation(path, lambda: real["chmod"](path, *more, **options))

        def fsync(handle: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{handle}"))
            self.operation(path, lambda: self.synced(path))

        patched = {"mkdir": mkdir, "rmdir": rmdir, "unlink": unlink, "remove": unlink, "replace": replace}
        for name, each in {**patched, "rename": replace, "open": opened, "chmod": chmod, "fsync": fsync}.items():
            setattr(os, name, each)
        self._install_writers()

    def _install_writers(self) -> None:
        """Whoever writes content."""
        save, connect = files.save_file, sqlite3.connect

        def opened(path: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
            if isinstance(path, int) or not set(mode) & _WRITES:
                return _OPEN(path, mode, *more, **options)
            if "w" in mode or "x" in mode:
                self.operation(path, lambda: self.wrote(Path(path)))
            file = _OPEN(path, mode, *more, **options)
            return _File(self, Path(path), file) if not mode.startswith("r") else file

        def saved(tensors: Any, path: Any, metadata: Any = None) -> None:
            def do() -> None:
                self.wrote(Path(path))
                save(tensors, path, metadata)

            self.operation(path, do, lambda: Path(path).write_bytes(b"half of it"))

        injector = self

        class Connection(sqlite3.Connection):
            def execute(self, statement: str, *more: Any) -> sqlite3.Cursor:
                if statement.split()[0].upper() in ("SELECT", "PRAGMA"):
                    return super().execute(statement, *more)
                do = super().execute
                return injector.operation(self.place, lambda: do(statement, *more), error=sqlite3.OperationalError)

        def connected(path: Any, **options: Any) -> sqlite3.Connection:
            database = connect(path, factory=Connection, **options)
            database.place = path
            return database

        io.open = opened  # type: ignore[assignment]
        files.save_file, sqlite3.connect = saved, connected  # type: ignore[assignment]


class _File:
    """A file that is open for writing."""

    def __init__(self, injector: Injector, path: Path, file: Any) -> None:
        self._injector, self._path, self._file = injector, path, file

    def write(self, text: Any) -> int:
        def half() -> None:
            self._file.write(text[: len(text) // 2])
            self._file.flush()

        return self._injector.operation(self._path, lambda: (self._file.write(text), self._file.flush())[0], half)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _full(path: Any, dir_fd: int | None) -> Path:
    return Path(path) if dir_fd is None else Path(os.readlink(f"/proc/self/fd/{dir_fd}")) / path


def _put(path: Path, content: bytes) -> None:
    with _OPEN(path, "wb") as file:
        file.write(content)


def _back(source: Path, target: Path, before: bytes | None, real: dict[str, Callable[..., Any]]) -> None:
    """A change of a name, undone."""
    if target.exists() and source.parent.is_dir():
        real["replace"](target, source)
    if before is not None:
        _put(target, before)


def _remove(path: Path, real: dict[str, Callable[..., Any]]) -> None:
    """A folder that was never there, with what is in it."""
    for inner in path.iterdir() if path.is_dir() else ():
        _remove(inner, real) if inner.is_dir() else real["unlink"](inner)
    if path.is_dir():
        real["rmdir"](path)


@dataclass(frozen=True)
class Outcome:
    """Of a command: its exit status, how many operations it made, and all that it said."""

    status: int
    operations: int
    said: str

    @property
    def killed(self) -> bool:
        return self.status == KILLED

    @property
    def traceback(self) -> bool:
        return self.status == _RAISED or "Traceback" in self.said


def warm() -> None:
    """What a command imports at its first words and torch at a first derivative along a direction, for all forks."""
    here = torch.zeros(1)
    torch.func.jvp(torch.sin, (here,), (here,))
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        main(["ledger", os.devnull])


def run(words: Sequence[object], root: Path, at: int = 0, fault: str = "fails") -> Outcome:
    """The command line in a fork, with a fault at one of its operations under ``root`` (0: at none)."""
    said, counted = root.parent / "said.txt", root.parent / "counted.txt"
    sys.stdout.flush()
    child = os.fork()
    if not child:
        status = _RAISED
        try:
            with _OPEN(said, "w") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            sys.stdout, sys.stderr = (_OPEN(fd, "w", closefd=False) for fd in (1, 2))
            injector = Injector(root, at, fault)
            injector.install()
            try:
                main([str(word) for word in words])
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 0
            with _OPEN(counted, "w") as out:
                out.write(str(injector.count))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Outcome(status, int(counted.read_text() or 0) if status != KILLED else 0, said.read_text())


class Killed(BaseException):
    """As if the process ended here."""


def failing(monkeypatch, module, name, call, error):
    """The ``call``-th call of a function raises; those before it are as ever."""
    real, calls = getattr(module, name), [0]

    def sometimes(*arguments, **options):
        calls[0] += 1
        if calls[0] == call:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, sometimes)
    return calls
