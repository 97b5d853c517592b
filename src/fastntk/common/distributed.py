"""Several processes, on one machine or many, as ``torchrun`` starts them: each takes a share, all end with the same.

Outside such a job every function here does nothing, so that the code that calls them is the same for one process.
"""

import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastntk.common.errors import PeerLost
from fastntk.common.launch import launched

# A dead process is noticed at once, by its closed connection. This long a living one may be waited for, say while the
# first process solves.
_PATIENCE = timedelta(minutes=60)
_LOST = re.compile(r"connection|timed? ?out|broken pipe|gloo|nccl|socket", re.IGNORECASE)


def active() -> bool:
    """Whether processes are connected."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, 0 for the first or only one."""
    return dist.get_rank() if active() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if active() else 1


@contextmanager
def session(device: torch.device) -> Iterator[None]:
    """Connect to the other processes that the launcher started, if there are any, while a block lasts.

    Raises:
        PeerLost: another process ended before the block did.
    """
    if not launched():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    signal.signal(signal.SIGTERM, _ended)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or _LOST.search(str(error)):
            raise PeerLost from error
        raise
    finally:
        dist.destroy_process_group()


def _ended(number: int, frame: object) -> None:
    print(f"error: {PeerLost()}", file=sys.stderr, flush=True)
    os._exit(128 + number)


def leave() -> None:
    """End one of several processes at once, when its work is done.

    A process that tears the interpreter down is now and then aborted by torch ("terminate called without an active
    exception", one in some thirty jobs of three processes), and the launcher takes the job for failed.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def averaging(model: nn.Module) -> nn.Module:
    """``model``, whose backward passes leave the mean of all processes' gradients; outside a job, itself.

    A parameter that the network does not use does not keep the others waiting.
    """
    return DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True) if active() else model


def sum_(tensors: Iterable[Tensor]) -> None:
    """Add up each tensor over all processes, in place; every process gets the total."""
    if active():
        for tensor in tensors:
            dist.all_reduce(tensor)


def share_(tensors: Iterable[Tensor], source: int = 0) -> None:
    """Copy each tensor of one process over those of the others, in place."""
    if active():
        for tensor in tensors:
            dist.broadcast(tensor, source)


def shared(thing: Any) -> Any:
    """The first process's object, small and picklable, for every process."""
    box = [thing]
    if active():
        dist.broadcast_object_list(box, 0)
    return box[0]


def wait() -> None:
    """Until every process is here."""
    if active():
        dist.barrier()
