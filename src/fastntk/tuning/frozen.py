"""Whether what is not tuned has stayed as it was."""

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fastntk.common.errors import InputError
from fastntk.tuning.parameters import tuned

log = logging.getLogger(__name__)


def check_frozen(
    model: nn.Module,
    before: Mapping[str, Tensor],
    remedy: str,
    same: Callable[[Tensor, Tensor], bool] = torch.equal,
) -> None:
    """What is not tuned has to be as it was before training, as far as that is known: no step takes back what it
    learned. Of running statistics, which have no gradient, a warning says so.

    Args:
        model: after training.
        before: its state before.
        remedy: for parameters.
        same: whether a tensor is as it was before.

    Raises:
        InputError: a parameter has moved, or has another shape.
    """
    free, parameters = set(tuned(model)), dict(model.named_parameters())
    state = {name: each for name, each in model.state_dict().items() if name in before and name not in free}
    moved = sorted(name for name, each in state.items() if not same(each, before[name]))
    if frozen := [name for name in moved if name in parameters]:
        raise InputError(f"{frozen[0]!r} has moved, and is not selected to be tuned ({len(frozen)} such). {remedy}")
    if moved:
        log.warning(
            "%s moved with the training (%d such): what they learned stays whatever is forgotten. Train with norms in "
            "eval mode.",
            *(moved[0], len(moved)),
        )
