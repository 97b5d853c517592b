"""Whether what is not tuned has stayed as it was."""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastntk.common.errors import InputError
from fastntk.tuning.parameters import tuned

log = logging.getLogger(__name__)


def check_frozen(model: nn.Module, before: Mapping[str, Tensor], remedy: str) -> None:
    """What is not tuned has to be as it was before training, as far as that is known: no step takes back what it
    learned. Of running statistics, which have no gradient, a warning says so.

    Args:
        model: after training.
        before: its state before; a tensor that is the other rounded to half precision is the same.
        remedy: for parameters.

    Raises:
        InputError: a parameter has moved, or has another shape.
    """
    free, parameters = set(tuned(model)), dict(model.named_parameters())
    state = {name: each for name, each in model.state_dict().items() if name in before and each.is_floating_point()}
    moved = sorted(name for name, each in state.items() if name not in free and not _same(each, before[name]))
    if frozen := [name for name in moved if name in parameters]:
        raise InputError(f"{frozen[0]!r} has moved, and is not selected to be tuned ({len(frozen)} such). {remedy}")
    if moved:
        log.warning(
            "%s moved with the training (%d such): what they learned stays whatever is forgotten. Train with norms in "
            "eval mode.",
            *(moved[0], len(moved)),
        )


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    kinds = one.dtype, other.dtype, torch.float16, torch.bfloat16
    pairs = (one, other.to(one.device)), (other.to(one.device), one)
    return any(torch.equal(a, b.to(kind).to(a.dtype)) for kind in kinds for a, b in pairs)
