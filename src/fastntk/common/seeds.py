"""Seeds, and orders that are drawn by them."""

import torch
from jaxtyping import Int
from torch import Tensor

from fastntk.common.errors import InputError


def check_seed(seed: int) -> None:
    """Raises ``InputError`` unless it is one that every generator takes."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InputError(f"the seed must be a whole number from 0 to 2^63 - 1, not {seed!r}.")


def random_order(count: int, seed: int = 0) -> Int[Tensor, " count"]:
    """The numbers below ``count`` in a random order, the same for the same seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
