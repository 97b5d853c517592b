"""Of the machine: devices, free memory, clocks, and settings of the process that long passes run faster with."""

import ctypes
import gc
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fastntk.common.errors import InputError, reason

# glibc's names for its settings (mallopt), and values: blocks up to 128 MiB come from the heap and up to 1 GiB of freed
# memory stays there. By default every large activation is given back to the system and asked for again, page by page.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = (-3, 2**27), (-1, 2**30)


GPU_PRODUCTS = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
"""Torch's settings of how float32 is multiplied on a GPU."""

CPU_PRODUCTS = torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv  # type: ignore[attr-defined]
"""The same on a CPU."""


def settle(*, autocast: bool = False) -> None:
    """Flush denormal numbers to zero, which some processors compute with ten times slower, and keep freed memory.

    The latter where the C library is glibc; elsewhere it stays as it is. Products and convolutions take float32 as it
    is, whatever was set before (``torch.set_float32_matmul_precision``; cuDNN's own default is to round it to TF32,
    which ``fastntk.jacobians.numerics`` can ask for), and a GPU's convolutions are those that give the same result
    every time. All of it holds for the process from then on.

    Args:
        autocast: whether what follows may round as autocast has it, where it is in force.

    Raises:
        InputError: it may not; or torch's inference mode is in force.
    """
    if torch.is_inference_mode_enabled():
        raise InputError("torch.inference_mode is in force, and there are no gradients in it. Leave it outside.")
    if not autocast and any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
        raise InputError(
            "autocast is in force, which would round the solves as well. Leave it outside; precision='bf16' is for "
            "the network alone."
        )
    torch.set_flush_denormal(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # which torch has two settings of
    for each in (*GPU_PRODUCTS, *CPU_PRODUCTS):
        each.fp32_precision = "ieee"
    if mallopt := _of_glibc("mallopt"):
        for name, value in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            mallopt(name, value)


def free_bytes(device: torch.device) -> int:
    """Memory that can be allocated on ``device`` now, with what torch has taken of a GPU and does not use."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return int(psutil.virtual_memory().available)


def out_of_memory(error: Exception) -> bool:
    """Whether an error is that of an allocation: of a GPU, of Python, or of torch on a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def device_name(device: torch.device) -> str:
    """``cpu``, or what the GPU calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def synchronise(device: torch.device) -> None:
    """Until a device has done all that it was given; only GPUs are given work ahead."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now() -> str:
    """The time as ISO 8601 in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def elapsed(started: float, device: torch.device) -> float:
    """Seconds from ``started``, by ``time.perf_counter``, to the end of all that ``device`` was given."""
    synchronise(device)
    return time.perf_counter() - started


@dataclass
class Peak:
    """The most bytes that were held while a block lasted, more than before it."""

    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the memory that a block takes: of the device if it is a GPU, else of this process.

    The process is looked at every 5 ms; memory that it had freed and kept is given back to the system first, where the
    C library is glibc, as it would hide what is used again.
    """
    gc.collect()
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    if trim := _of_glibc("malloc_trim"):
        trim(0)
    process, over = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not over.wait(0.005):
            peak.bytes = max(peak.bytes, process.memory_info().rss - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()
        peak.bytes = max(peak.bytes, process.memory_info().rss - before)


def peak_tensors(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that were held at once while some work lasted, more than before it.

    Unlike ``peak_memory`` exact for small work, and without what libraries take beside tensors.
    """
    if device.type == "cuda":
        with peak_memory(device) as peak:
            work()
        return peak.bytes
    with _Held() as held:
        work()
    return held.most


class _Held(TorchDispatchMode):
    """The bytes of the tensors that operations return, until they are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in given | self.sizes.keys():
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._leave, storage._cdata)
        return out

    def _leave(self, storage: int) -> None:
        self.now -= self.sizes.pop(storage)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """Those of the dense tensors among some values."""
    for each in tree_iter(values):
        if isinstance(each, Tensor) and each.layout == torch.strided:
            yield each.untyped_storage()


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library, if it is glibc and has it."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def parse_device(name: str) -> torch.device:
    """A device that is there.

    Raises:
        InputError: it is not.
    """
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} is not there ({reason(error)}). Use 'cpu'.") from error
    return device
