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
    for prefix, module in model.named_modules():  # of a module's names, one
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append(f"{prefix}.{name}" if prefix else name)
    replaced = {place: tensor for name, tensor in parameters.items() for place in places[id(model.get_parameter(name))]}
    return functional_call(model, replaced, (images,), tie_weights=False)


def state_at(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's state dict with some of its parameters replaced, under all names that they have."""
    replaced = {name: parameters[first] for name, first in _aliases(model).items() if first in parameters}
    return {**model.state_dict(), **replaced}


def _aliases(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter, with the one that ``named_parameters`` gives."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}


def check_logits(logits: object, batch: int, classes: int | None = None) -> None:
    """Raises ``InputError`` unless a model's output for a batch is ``[batch, classes]``."""
    if isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == batch and classes in (None, logits.shape[1]):
        return
    got = f"a tensor {list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    wanted = "classes" if classes is None else str(classes)
    raise InputError(
        f"the model must return logits of shape [batch, {wanted}], not {got} for a batch of {batch}. Wrap it in a "
        "module that does."
    )
