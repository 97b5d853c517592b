"""How the arithmetic is done: always said, never chosen by a library's default."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch

from fastntk.common.errors import InputError
from fastntk.common.machine import CPU_PRODUCTS, GPU_PRODUCTS
from fastntk.common.typed import check_types
from fastntk.jacobians.combinations import ClassProbes

PRECISIONS = ("full", "tf32", "bf16")


@dataclass(frozen=True)
class Numerics:
    """How to compute what a memory is made of. But for class probes, none of it changes what is computed.

    Attributes:
        batch_size: images a batch of Jacobians, at most; fewer where a batch's Jacobians would take over 1 GiB.
        precision: of the network. ``full``: the model's own dtype, no rounding in between. ``tf32``: products of
            float32 numbers on NVIDIA's tensor cores, with 10 bits of mantissa; elsewhere the same as ``full``.
            ``bf16``: the network runs under autocast to bfloat16 (8 bits of mantissa), parameters and sums stay as they
            are. What either costs is in docs/benchmarks-cost.md: bf16 a quarter of the answer to a request, in a hard
            case.
        dtype: of the sums and products of the primal form. ``torch.float32`` halves their memory; sums that samples are
            taken away from lose digits with it, so that a solve may come out less exact.
        workers: processes that read images ahead.
        class_probes: replace the C logits of each sample by this many random combinations
            (``fastntk.jacobians.combinations``); None takes all classes.
        probe_seed: of these combinations.

    Raises:
        InputError: a number is out of range, or the precision or dtype is none of those above.
    """

    batch_size: int = 64
    precision: str = "full"
    dtype: torch.dtype = torch.float64
    workers: int = 0
    class_probes: int | None = None
    probe_seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        if self.precision not in PRECISIONS:
            raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, not {self.precision!r}.")
        if self.dtype not in (torch.float64, torch.float32):
            raise InputError(f"sums must be float64 or float32, not {_name(self.dtype)}.")
        if self.batch_size < 1 or self.workers < 0:
            raise InputError(
                f"batch_size must be at least 1 and workers not negative, not {self.batch_size} and {self.workers}."
            )

    @property
    def probes(self) -> ClassProbes | None:
        """The random combinations, if there are any."""
        return None if self.class_probes is None else ClassProbes(self.class_probes, self.probe_seed)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; how many processes read ahead is a matter of each run."""
        return {**vars(self), "dtype": _name(self.dtype), "workers": 0}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Numerics":
        """The reverse of ``to_dict``."""
        given = {each.name: document[each.name] for each in fields(cls)}
        return cls(**{**given, "dtype": getattr(torch, given["dtype"])})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """The network's arithmetic while a block lasts; ``precision`` as in ``Numerics``."""
    wanted = dict.fromkeys(CPU_PRODUCTS, "ieee") | dict.fromkeys(
        GPU_PRODUCTS, "tf32" if precision == "tf32" else "ieee"
    )
    before = {each: each.fp32_precision for each in wanted}
    try:
        _set(wanted)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        _set(before)


def _set(products: Mapping[Any, str]) -> None:
    matmul, conv = GPU_PRODUCTS  # torch has older settings of the same, and refuses to say them where the two differ
    torch.backends.cuda.matmul.allow_tf32 = products[matmul] == "tf32"
    torch.backends.cudnn.allow_tf32 = products[conv] == "tf32"
    for each, precision in products.items():
        each.fp32_precision = precision
