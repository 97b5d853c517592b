"""The tuned parameters of a model, and copies of them."""

from collections.abc import Mapping

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


def check_values(values: object, parameters: Mapping[str, torch.Tensor], what: str, remedy: str) -> None:
    """Raises ``InputError``, with a remedy, unless ``values``, which are ``what``, are finite tensors for exactly these
    parameters, of their shapes."""
    if not isinstance(values, Mapping):
        raise InputError(f"{what} must be tensors by name, not a {type(values).__name__}. {remedy}")
    if odd := [name for name, each in values.items() if not isinstance(each, torch.Tensor)]:
        raise InputError(f"{what} must be tensors by name, and {odd[0]!r} is none. {remedy}")
    if set(values) != set(parameters):
        other = sorted(map(str, set(values) ^ set(parameters)))[0]
        raise InputError(f"{what} does not hold the model's tuned parameters: they differ in {other!r}. {remedy}")
    for name, parameter in parameters.items():
        if values[name].shape != parameter.shape:
            shapes = f"{list(values[name].shape)} for {name!r}, not {list(parameter.shape)}"
            raise InputError(f"{what} has shape {shapes}. {remedy}")
        if not torch.isfinite(values[name]).all():
            raise InputError(f"{what} has NaN or infinite values in {name!r}. {remedy}")
