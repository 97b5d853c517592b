"""Writing whole files or none, and reading what was written."""

import hashlib
import json
import math
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastntk.common.errors import InputError

DECIDED = ".now"
"""Where a ``switching`` that was decided has what is left of it to do."""

UNDERWAY = "underway"
"""In a folder, what says that something has begun there and is not done (``underway``)."""

_WAIT = 60.0  # seconds

_STAGED, _GONE = ".next", "gone.json"


def writable(folder: Path) -> Path:
    """``folder``, made if need be.

    Raises:
        InputError: it cannot be made or written to.
    """
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder


def check_writable(folder: Path) -> None:
    """Raises ``InputError`` if ``folder`` cannot be written to, or could not be made; nothing is left there."""
    with _writing(folder):
        above = (folder, *folder.absolute().parents)
        there = next(each for each in above if each.exists() or each.is_symlink())  # raises for a name that is too long
        with tempfile.TemporaryFile(dir=there):
            pass


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"the folder {folder} cannot be written ({error.strerror}). Choose another one, or make it writable."
        ) from error


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Let ``save`` write a file in a folder beside ``path``, sync it and switch: ``path`` is old or new, never half.

    Whatever else ``save`` writes there goes with the folder; what a killed process leaves of it goes when the same file
    is written again.

    Raises:
        InputError: the disk is full or the folder cannot be written; ``path`` is as it was.
    """
    beside = aside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        discard(beside)
        beside.mkdir()
        save(beside / path.name)
        (beside / path.name).chmod(beside.stat().st_mode & 0o666)  # as the umask says: safetensors does not ask it
        with (beside / path.name).open("rb+") as file:
            os.fsync(file.fileno())
        (beside / path.name).replace(path)
        sync(path.parent)
    except (OSError, SafetensorError, sqlite3.Error) as error:
        raise InputError(f"{path} cannot be written ({error}); what was there is unchanged.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # where not even that can be done, the next writing does it


@contextmanager
def switching(folder: Path, gone: Sequence[str] = ()) -> Iterator[Path]:
    """Replace several files of a folder, and remove what is ``gone``, in one step, when the block ends.

    The block writes them into the folder that it is given, ``.next``, whose new name ``.now`` decides: from then on
    ``complete`` goes on with what is left to do, whoever was cut off. Where the block fails nothing has changed.

    Raises:
        InputError: they cannot be written; the folder is as it was.
    """
    complete(folder)
    staged = folder / _STAGED
    discard(staged)
    try:
        staged.mkdir()
        yield staged
        write_json(staged / _GONE, {"gone": list(gone)})
        staged.rename(folder / DECIDED)
        sync(folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error}); what was there is unchanged.") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    complete(folder)


def complete(folder: Path) -> None:
    """Do what is left of a ``switching`` that was cut off after it was decided, if there was one.

    Raises:
        InputError: it cannot be done yet; what was decided stays so.
    """
    decided = folder / DECIDED
    if not decided.is_dir():
        return
    for name in read_json(decided / _GONE)["gone"] if (decided / _GONE).is_file() else ():
        discard(folder / name)
    try:
        for path in decided.iterdir():
            if path.name != _GONE:
                path.replace(folder / path.name)
        sync(folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error}). Make it writable; its new files are kept.") from error
    discard(decided)


def lock_of(folder: Path) -> FileLock:
    """A folder's, which waits for another process for a minute."""
    return FileLock(folder / "lock", timeout=_WAIT)


@contextmanager
def held(lock: BaseFileLock, what: Path) -> Iterator[None]:
    """A lock, taken; ``what`` is the folder that it is of.

    Raises:
        InputError: another process has it for longer than the lock waits, or it cannot be taken.
    """
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(f"{what} is in use by another process. Try again later.") from error
    except OSError as error:
        raise InputError(f"{what} cannot be locked ({error.strerror}). Make it writable.") from error
    try:
        yield
    finally:
        lock.release()


def aside(path: Path) -> Path:
    """Where ``write`` writes before it switches."""
    return path.with_name(f".{path.name}.new")


def discard(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it, if it is there.

    Raises:
        InputError: it cannot be removed.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif os.path.lexists(path):  # of what is not there a read-only file system says that it cannot be removed
            path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be removed ({error.strerror}).") from error


@contextmanager
def underway(folder: Path) -> Iterator[None]:
    """A file in a folder says that something has begun, until it is done; it stays where that failed or was cut off,
    until ``settled``."""
    write(folder / UNDERWAY, Path.touch)
    yield
    settled(folder)


def settled(folder: Path) -> None:
    """Nothing is under way, or left to do, in a folder: who may only read it leaves it as it is."""
    if (folder / UNDERWAY).exists() and os.access(folder, os.W_OK):
        discard(folder / UNDERWAY)


def sync(folder: Path) -> None:
    """Make the names in a folder durable.

    Raises:
        InputError: the disk does not take them; they are as they should be, and may not outlast a crash.
    """
    if os.name != "posix":  # a folder cannot be opened
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise InputError(
            f"what was written in {folder} may not outlast a crash: the disk does not sync it ({error.strerror}). Mend "
            "the disk, and repeat the command."
        ) from error


def room(folder: Path | None = None) -> int:
    """Bytes that are free on the disk of a folder, or where it will be (None: of temporary files)."""
    place = folder or Path(tempfile.gettempdir())
    return shutil.disk_usage(next(each for each in (place, *place.absolute().parents) if each.exists())).free


def mapped(shape: Sequence[int], dtype: torch.dtype, folder: Path | None = None) -> Tensor:
    """Zeros in a file without a name, on the disk of a folder (None: that of temporary files), which are read and
    written page by page and are gone with the process.

    Raises:
        InputError: the disk has no room for them.
    """
    place, size = folder or Path(tempfile.gettempdir()), math.prod(shape) * dtype.itemsize
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.truncate(max(size, 1))
            if hasattr(os, "posix_fallocate"):  # now, as a page that finds no room later ends the process
                os.posix_fallocate(file.fileno(), 0, max(size, 1))
            pages = np.memmap(file, dtype=np.uint8, mode="r+", shape=(max(size, 1),))
    except OSError as error:
        raise InputError(
            f"{place} has no room for {size / 1e9:.1f} GB of rows ({error.strerror}). Free some, or set TMPDIR."
        ) from error
    return torch.from_numpy(pages)[:size].view(dtype).view(*shape)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, object] | None = None) -> None:
    """Tensors by name as safetensors, with a record that JSON can hold in the header. Of tensors that share memory
    each is written."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        dense = tensor.detach().cpu().contiguous()
        plain[name] = dense.clone() if dense.untyped_storage().data_ptr() in seen else dense
        seen.add(dense.untyped_storage().data_ptr())
    write(path, lambda file: save_file(plain, file, {"fastntk": json.dumps(record or {})}))


def read_tensors(path: Path, names: Sequence[str] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``write_tensors`` wrote: the tensors of the given names (None: all), and the record.

    Raises:
        InputError: the file is missing, corrupt, truncated, or not of this kind.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}.")
    try:
        with safe_open(path, "pt") as file:
            record = (file.metadata() or {}).get("fastntk")
            tensors = {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}). It may be truncated: copy it again.") from error
    try:
        return tensors, json.loads(record or "")
    except ValueError as error:
        raise InputError(f"{path} was not written by fastntk.") from error


def write_json(path: Path, document: Mapping[str, object]) -> None:
    """A JSON file, whole or not at all."""
    write(path, lambda file: file.write_text(json.dumps(document, indent=2) + "\n"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: the file is missing or is not JSON.
    """
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(document, dict):
        raise InputError(f"{path} does not hold a JSON object.")
    return document


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A SHA-256 of names and values."""
    state = hashlib.sha256()
    for name, tensor in tensors.items():
        state.update(name.encode())
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def file_digest(path: Path) -> str:
    """The SHA-256 of a file.

    Raises:
        InputError: it cannot be read.
    """
    state = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**22):
                state.update(block)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from error
    return state.hexdigest()
