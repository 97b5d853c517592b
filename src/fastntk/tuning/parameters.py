"""The tuned parameters of a model, and copies of them."""

import torch
from torch import nn

from fastntk.common.errors import InputError
from fastntk.inputs.called import REPLACING
from fastntk.inputs.checks import check_numbers


def tuned(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of ``model`` that require gradients: those that ``tune`` left free.

    Raises:
        InputError: there are none, or one is of half precision.
    """
    with REPLACING:
        free = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not free:
        raise InputError("no parameter of the model is tuned. Call fastntk.tune(model, 'bn', 'head') first.")
    check_numbers(free)
    return free


def snapshot(parameters: dict[str, nn.Parameter] | dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Detached copies, safe from later training."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}
