"""A model called with other parameters than its own."""

import copy
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastntk.common.errors import InputError, reason
from fastntk.common.machine import out_of_memory

REPLACING = threading.RLock()
"""Held while a model's parameters are replaced for a pass, and by whoever reads what they are."""


def called(model: nn.Module, parameters: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """What ``model`` makes of ``images`` with some of its parameters replaced; the model itself is not changed.

    A parameter that lies in several places of the model (tied weights, a module under two names) is replaced in all.
    ``functional_call`` alone leaves a module that has two names with the replaced tensors in it.

    Raises:
        InputError: the model is wrapped in ``nn.DataParallel``.
    """
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise InputError("the model is wrapped in nn.DataParallel. Give the module inside: model.module.")
    with REPLACING:
        replaced = _in_all_places(model, parameters)
        try:
            return functional_call(uncached(model), replaced, (suited(model, images),), tie_weights=False)
        finally:
            uncached(model)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and afterwards as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Whatever is done to the model meanwhile, it is afterwards as it was: parameters, buffers, what is trained, and
    modes. Holds a copy of the model."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        model.load_state_dict(state)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        for module, training in modes:
            module.training = training


def _in_all_places(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters under every name that they have in the model."""
    places: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():  # of a module's names, one
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append(f"{prefix}.{name}" if prefix else name)
    return {place: tensor for name, tensor in parameters.items() for place in places[id(model.get_parameter(name))]}


def apart(model: nn.Module) -> nn.Module:
    """The same model in modules of its own, over the same tensors: parameters that ``called`` replaces for a pass are
    not replaced in the model that another thread may be using. Raises like ``copied``."""
    with REPLACING:
        own = (value for module in uncached(model).modules() for value in vars(module).values())
        tensors = (each for each in own if isinstance(each, Tensor))
        return copied(model, [*model.parameters(), *model.buffers(), *tensors])


def copied(model: nn.Module, shared: Iterable[Tensor] = ()) -> nn.Module:
    """A copy of a model, which has some tensors in common with it.

    Raises:
        InputError: its modules cannot be copied.
    """
    with REPLACING:
        try:
            return copy.deepcopy(model, {id(each): each for each in shared})
        except Exception as error:  # of whatever its modules hold
            if out_of_memory(error):
                raise
            raise InputError(
                f"the model cannot be copied ({reason(error)}). Keep what cannot be copied outside of its modules."
            ) from error


def suited(model: nn.Module, images: Tensor) -> Tensor:
    """The images as they are, or, where none of the model's parameters is of their dtype, in that of the first."""
    dtypes = dict.fromkeys(each.dtype for each in model.parameters() if each.is_floating_point())
    return images if not dtypes or images.dtype in dtypes else images.to(next(iter(dtypes)))


def uncached(model: nn.Module) -> nn.Module:
    """The model, after its modules dropped what they computed from their parameters and keep from one pass to the next.

    In eval mode the attention of LeViT, TinyViT and others does, and would go on with the old biases; its ``train``
    drops it. Whatever else a ``train`` does to modes and to what requires gradients is undone. Autocast keeps what it
    has cast as long as it lasts, and is emptied too.
    """
    torch.clear_autocast_cache()
    for module in model.modules():
        if type(module).train is not nn.Module.train and keeps(module):
            modes = [(each, each.training) for each in module.modules()]
            free = [(each, each.requires_grad) for each in module.parameters()]
            module.train(True)
            for each, mode in modes:
                each.training = mode
            for parameter, wanted in free:
                if parameter.requires_grad != wanted:
                    parameter.requires_grad_(wanted)
    return model


def keeps(module: nn.Module) -> bool:
    """Whether a module has tensors that are neither its parameters nor its buffers: attributes, or a dict of them."""
    own = [value for name, value in vars(module).items() if not name.startswith("_")]
    inside = [each for value in own if isinstance(value, dict) for each in value.values()]
    return any(isinstance(each, Tensor) for each in (*own, *inside))


def state_at(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's state dict with some of its parameters replaced, under all names that they have."""
    with REPLACING:
        replaced = {name: parameters[first] for name, first in _aliases(model).items() if first in parameters}
        return {**model.state_dict(), **replaced}


def _aliases(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter, with the one that ``named_parameters`` gives."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
