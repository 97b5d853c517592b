"""One pass over a training set: in shards, by any number of processes, resumable.

The shards are the same however many processes share them, and a shard's batches are the same too. What the processes
add up differs in the order of float64 additions only.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from jaxtyping import Float
from torch import Tensor

from fastntk.common import distributed
from fastntk.common.errors import InputError
from fastntk.common.files import digest, discard, mapped, read_tensors, writable, write_tensors
from fastntk.inputs.batches import digests_and_labels
from fastntk.inputs.called import state_at
from fastntk.jacobians.jacobian import Jacobian
from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.rows import PART, Rows
from fastntk.solve.solution import Solution, Solved
from fastntk.solve.sums import Sums, accumulate

log = logging.getLogger(__name__)

Restore = Callable[[Mapping[str, Tensor], float], Solution]
"""From a solution's tensors and ridge to the solution."""

SHARD = 512
"""Samples a shard."""

_LOCK = "lock"
_HALF_WRITTEN = ".sums-*"  # what fastntk.common.files writes first, where a process was killed meanwhile
_OVERHEAD = 0.1  # the share of the time that writing partial sums may take


@dataclass
class Checkpoint:
    """Partial sums on disk: every file holds the sums over the shards that it names, and no shard is in two files.
    From ``open`` to ``close`` no other job uses the folder.

    Args:
        folder: shared by all processes; made if need be, removed by ``clear``.
        key: what the sums depend on; files with another key are removed.
    """

    folder: Path
    key: str
    _earlier: list[tuple[Path, list[int]]] = field(default_factory=list)
    _due: float = 0.0
    _lock: FileLock | None = None

    def open(self) -> set[int]:
        """The shards that earlier jobs completed, the same set for every process.

        Raises:
            InputError: another job is preparing in the folder.
        """
        if not distributed.shared(self._taken() if distributed.rank() == 0 else None):
            raise InputError(f"another process is preparing with {self.folder}. Wait for it, or stop it.")
        if distributed.rank() == 0:
            for path in self.folder.glob(_HALF_WRITTEN):
                discard(path)
            for path in sorted(self.folder.glob("sums-*.safetensors")):
                tensors, record = read_tensors(path)
                if record.get("key") != self.key:
                    log.info("partial sums of another preparation are removed: %s", path)
                    discard(path)
                elif record.get("digest") != _digest(tensors):
                    log.warning("partial sums are damaged, and removed: %s", path)
                    discard(path)
                else:
                    self._earlier.append((path, record["shards"]))
        self._earlier = distributed.shared(self._earlier)
        return {shard for _, shards in self._earlier for shard in shards}

    def _taken(self) -> bool:
        """Whether the folder is this job's."""
        self._lock = FileLock(writable(self.folder) / _LOCK, timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            return False
        return True

    def write(self, sums: Mapping[str, Tensor], shards: Sequence[int]) -> None:
        """Write this process's sums, over the shards it has completed, unless the last time was too recent."""
        if time.monotonic() < self._due:
            return
        started = time.monotonic()
        record = {"key": self.key, "shards": list(shards), "digest": _digest(sums)}
        write_tensors(self.folder / f"sums-{shards[0]}.safetensors", dict(sums), record)
        done = time.monotonic()
        self._due = done + (done - started) / _OVERHEAD

    def add_earlier_(self, sums: Mapping[str, Tensor]) -> None:
        """Add this process's part of what earlier jobs wrote."""
        for path, _ in self._earlier[distributed.rank() :: distributed.size()]:
            tensors, _ = read_tensors(path)
            for name, tensor in sums.items():
                tensor.add_(tensors[name].to(tensor))

    def clear(self) -> None:
        """Remove the partial sums: the pass is complete."""
        distributed.wait()
        if distributed.rank() == 0:
            _emptied(self.folder)

    def close(self) -> None:
        """Let other jobs use the folder; what was completed stays."""
        if self._lock:
            self._lock.release()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return digest(dict(sorted(tensors.items())))


@contextmanager
def resumed(folder: Path | None, key: Callable[[], str]) -> Iterator[Checkpoint | None]:
    """Partial sums in a folder, if there is one: removed when the block is done, kept where it fails. ``key`` makes
    that of the ``Checkpoint``."""
    partial = Checkpoint(folder, key()) if folder else None
    try:
        yield partial
        if partial:
            partial.clear()
    finally:
        if partial:
            partial.close()


def clear(folder: Path) -> None:
    """Remove the partial sums in a folder, and the folder if nothing else is in it, unless a job is using them."""
    if folder.is_dir():
        with suppress(Timeout), FileLock(folder / _LOCK, timeout=0):
            _emptied(folder)


def _emptied(folder: Path) -> None:
    for path in [*folder.glob("sums-*.safetensors"), *folder.glob(_HALF_WRITTEN), folder / _LOCK]:
        discard(path)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def shards(count: int) -> list[range]:
    """The positions of ``count`` samples, shard by shard."""
    return [range(start, min(start + SHARD, count)) for start in range(0, count, SHARD)]


def remaining(checkpoint: Checkpoint | None, count: int) -> list[int]:
    """Of ``count`` shards, this process's share of those that no earlier job completed."""
    done = checkpoint.open() if checkpoint else set()
    if done:
        log.info("going on from %d of %d shards", len(done), count)
    return [shard for shard in range(count) if shard not in done][distributed.rank() :: distributed.size()]


def collect_sums(
    linearised: Linearised, count: int, checkpoint: Checkpoint | None = None
) -> tuple[Sums, Float[Tensor, "samples outputs"]]:
    """The sums over the samples 0 .. ``count`` - 1, streamed, and their residuals; every process ends with all."""
    one = linearised.rows([0])
    parts, sums = shards(count), Sums.zero(one.jacobian, linearised.numerics.dtype)
    residuals = one.residual.new_zeros(count, one.residual.shape[1])
    everything = {"residuals": residuals, **{each.name: getattr(sums, each.name) for each in fields(Sums)}}
    mine = remaining(checkpoint, len(parts))
    for position, shard in enumerate(mine):
        stream = linearised.stream(parts[shard], f"shard {shard + 1} of {len(parts)}")
        accumulate(_noting(stream, residuals[parts[shard].start :]), sums)
        if checkpoint:
            checkpoint.write(everything, mine[: position + 1])
    if checkpoint:
        checkpoint.add_earlier_(everything)
    distributed.sum_(list(everything.values()))
    if int(sums.samples) != count:
        raise InputError(
            f"the partial sums are over {int(sums.samples)} samples, and there are {count}. Remove "
            f"{checkpoint.folder if checkpoint else 'them'} and prepare again."
        )
    return sums.complete_(), residuals


def _noting(batches: Iterable[tuple[Jacobian, Tensor]], residuals: Tensor) -> Iterator[tuple[Jacobian, Tensor]]:
    """The batches, whose residuals are written into the rows from the first on."""
    start = 0
    for jacobian, residual in batches:
        residuals[start : start + len(residual)] = residual
        start += len(residual)
        yield jacobian, residual


def collect_rows(linearised: Linearised, count: int) -> Rows:
    """The rows of the samples 0 .. ``count`` - 1; every process ends with all of them."""
    if not distributed.active():
        return linearised.rows(range(count), "Jacobians")
    one, parts = linearised.rows([0]), []
    for shard, positions in enumerate(shards(count)):
        owner = shard % distributed.size()
        if owner == distributed.rank():
            parts.append(linearised.rows(positions, f"shard {shard + 1}"))
        else:
            parts.append(one[torch.zeros(len(positions), dtype=torch.long)])
    for shard, part in enumerate(parts):
        distributed.share_(part.tensors().values(), shard % distributed.size())
    return Rows.together(parts)


def stored_rows(linearised: Linearised, count: int, dtype: torch.dtype, folder: Path | None) -> Rows:
    """The same with the Jacobians on the disk of a folder (None: that of temporary files), ``dtype`` numbers for all
    but the head's part, in files that are gone with the process; every process has its own."""
    one, parts = linearised.rows([0]), [range(start, min(start + PART, count)) for start in range(0, count, PART)]
    whole = empty_rows(one, count, dtype, writable(folder) if folder else None)
    for number, positions in enumerate(parts):
        owner = number % distributed.size()
        if owner == distributed.rank():
            part = linearised.rows(positions, f"part {number + 1} of {len(parts)}")
        else:
            part = one[torch.zeros(len(positions), dtype=torch.long)]
        if distributed.active():
            distributed.share_(part.tensors().values(), owner)
        whole.put_(slice(positions.start, positions.stop), part)
    if folder:
        distributed.wait()
        if distributed.rank() == 0:
            clear(folder)
    return whole


def empty_rows(like: Rows, count: int, dtype: torch.dtype, folder: Path | None) -> Rows:
    """Zeros for the rows of so many samples, with what grows with the parameters on disk, as ``stored_rows`` has it."""

    def empty(name: str, tensor: Tensor) -> Tensor:
        shape = (count, *tensor.shape[1:])
        if name in ("rest", "features"):
            return mapped(shape, dtype if name == "rest" else tensor.dtype, folder)
        return tensor.new_zeros(shape)

    return like.each(empty)


def key(linearised: Linearised, count: int) -> str:
    """A digest of what the sums depend on: weights, tuned parameters, every image and label, loss and numerics; of the
    first process, for all."""
    return distributed.shared(_key(linearised, count) if distributed.rank() == 0 else None)


def _key(linearised: Linearised, count: int) -> str:
    numerics = linearised.numerics
    images, labels = digests_and_labels(linearised.train, range(count), numerics.batch_size, numerics.workers)
    everyone = {"images": images, "labels": labels}
    state = hashlib.sha256(digest(state_at(linearised.jacobian.model, {})).encode())
    state.update(digest({**everyone, **linearised.jacobian.parameters}).encode())
    state.update(repr((count, linearised.loss, replace(numerics, workers=0), SHARD)).encode())
    return state.hexdigest()


def solved_once(solve: Callable[[], Solved], restore: Restore, residuals: Float[Tensor, "samples outputs"]) -> Solved:
    """What the first process solves, for every process; ``residuals`` are known to all of them."""
    if not distributed.active():
        return solve()
    parcel, tensors = None, {}
    if distributed.rank() == 0:
        done = solve()
        tensors = {name: tensor.contiguous() for name, tensor in done.solution.tensors().items()}
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        parcel = done.solution.ridge, done.calibration, shapes
    ridge, calibration, shapes = distributed.shared(parcel)
    device = residuals.device
    if distributed.rank():
        tensors = {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}  # of one backend
    distributed.share_(tensors.values())
    return Solved(restore(tensors, ridge), residuals, calibration)
