"""A model called with other parameters than its own."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.func import functional_call

from fastntk.common.errors import InputError


def called(model: nn.Module, parameters: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """What ``model`` makes of ``images`` with some of its parameters replaced; the model itself is not changed.

    A parameter that lies in several places of the model (tied weights, a module under two names) is replaced in all.
    ``functional_call`` alone leaves a module that has two names with the replaced tensors in it.

    Raises:
        InputError: the model is wrapped in ``nn.DataParallel``.
    """
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise InputError("the model is wrapped in nn.DataParallel. Give the module inside: model.module.")
    places: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():  # each module once
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append(f"{prefix}.{name}" if prefix else name)
    replaced = {place: tensor for name, tensor in parameters.items() for place in places[id(model.get_parameter(name))]}
    return functional_call(model, replaced, (images,), tie_weights=False)
