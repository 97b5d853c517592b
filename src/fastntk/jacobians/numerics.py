"""How many bits the arithmetic has: always said, never chosen by a library's default."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastntk.common.errors import InputError

PRECISIONS = ("full", "tf32", "bf16")
"""``full``: the model's own dtype, no rounding in between. ``tf32``: products of float32 numbers on NVIDIA's tensor
cores, with 10 bits of mantissa; elsewhere the same as ``full``. ``bf16``: the network runs under autocast to bfloat16
(8 bits of mantissa), parameters and sums stay as they are. What bf16 costs is in docs/benchmarks.md (a quarter of the
answer to a request, in a hard case); what TF32 costs has not been measured yet."""


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """The network's arithmetic while a block lasts.

    Raises:
        InputError: the precision is not one of ``PRECISIONS``.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}.")
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
