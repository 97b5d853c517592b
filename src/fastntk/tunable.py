"""Which parameters are tuned: selectors by name, everything else frozen."""

import re
from collections.abc import Callable, Iterable

import torch
from torch import nn

from fastntk.errors import InputError

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
LAYER_NORMS = (nn.LayerNorm,)
NORMS = (*BATCH_NORMS, *LAYER_NORMS, nn.GroupNorm)


def head_name(model: nn.Module) -> str:
    """The name of the classification head: the last ``nn.Linear`` that the model registers.

    Raises:
        InputError: the model has no linear layer.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise InputError(
            "the model has no linear layer that could be its head. Tune other parameters, for example 'bn'."
        )
    return linear[-1]


def _of_modules(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[str]:
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, kinds)
        for name, _ in module.named_parameters(recurse=False)
    ]


def _of_head(model: nn.Module) -> list[str]:
    head = head_name(model)
    return [f"{head}.{name}" if head else name for name, _ in model.get_submodule(head).named_parameters()]


SELECTORS: dict[str, Callable[[nn.Module], list[str]]] = {
    "bn": lambda model: _of_modules(model, BATCH_NORMS),
    "ln": lambda model: _of_modules(model, LAYER_NORMS),
    "norm": lambda model: _of_modules(model, NORMS),
    "bias": lambda model: [name for name, _ in model.named_parameters() if name.endswith("bias")],
    "head": _of_head,
    "all": lambda model: [name for name, _ in model.named_parameters()],
}
"""Named selections: batch norm, layer norm, any norm, biases, the classification head, everything."""


def tunables(model: nn.Module) -> dict[str, int]:
    """How many parameters each named selector would tune in ``model``; selectors that match nothing are left out."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    has_linear = any(isinstance(module, nn.Linear) for module in model.modules())
    found = {key: select(model) for key, select in SELECTORS.items() if key != "head" or has_linear}
    return {key: sum(sizes[name] for name in names) for key, names in found.items() if names}


def _matching(model: nn.Module, selector: str) -> list[str]:
    """The parameter names of one selector: a key of ``SELECTORS``, or a regular expression over the names."""
    if selector in SELECTORS:
        names = SELECTORS[selector](model)
    else:
        try:
            names = [name for name, _ in model.named_parameters() if re.search(selector, name)]
        except re.error as error:
            raise InputError(f"selector {selector!r} is neither a name nor a regular expression ({error}).") from error
    if not names:
        offer = ", ".join(f"{key} ({size:,} parameters)" for key, size in tunables(model).items())
        raise InputError(f"selector {selector!r} matches no parameter of this model. It offers: {offer}.")
    return names


def select(model: nn.Module, *selectors: str | Iterable[str]) -> list[str]:
    """The names of the parameters that the selectors choose, in the model's own order, each once.

    Raises:
        InputError: no selector, or one that matches nothing; the message offers what exists.
    """
    chosen: set[str] = set()
    known = dict(model.named_parameters())
    for selector in selectors:
        if isinstance(selector, str):
            chosen.update(_matching(model, selector))
            continue
        for name in selector:
            if name not in known:
                raise InputError(f"the model has no parameter {name!r}. 'all' tunes every one of its {len(known)}.")
            chosen.add(name)
    if not chosen:
        offer = ", ".join(tunables(model))
        raise InputError(f"no parameter is selected to be tuned. Choose at least one of: {offer}.")
    return [name for name in known if name in chosen]


def tune(model: nn.Module, *selectors: str | Iterable[str]) -> dict[str, nn.Parameter]:
    """Freeze all of ``model`` but the selected parameters, in place, and return those by name.

    Args:
        model: any module that maps images to logits.
        selectors: ``"bn"``, ``"ln"``, ``"norm"``, ``"bias"``, ``"head"``, ``"all"``, a regular expression over
            parameter names, or an iterable of exact names; they add up.

    Returns:
        The tuned parameters themselves (not copies), in the model's order.

    Raises:
        InputError: nothing is selected, or a selector matches nothing.
    """
    names = set(select(model, *selectors))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return tuned(model)


def tuned(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of ``model`` that require gradients: those that ``tune`` left free.

    Raises:
        InputError: there are none.
    """
    free = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not free:
        raise InputError("no parameter of the model is tuned. Call fastntk.tune(model, 'bn', 'head') first.")
    return free


def snapshot(parameters: dict[str, nn.Parameter] | dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Detached copies, safe from later training."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}
