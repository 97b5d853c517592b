"""Low-rank adapters (LoRA) from Hugging Face peft, put into a model's own layers.

An adapted layer computes ``W x + B A x`` with ``A`` ``[rank, inputs]`` drawn at random and ``B`` ``[outputs, rank]``
zero at first. Source: Hu et al. 2021, LoRA (arXiv 2106.09685).
"""

import re
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from fastntk.common.errors import InputError
from fastntk.inputs.called import copied
from fastntk.inputs.libraries import peft
from fastntk.inputs.structure import attention_blocks
from fastntk.tuning.prompts import prompts_of


def adapters(model: nn.Module) -> dict[str, int]:
    """The adapted layers of the model by name, with their ranks."""
    return {
        name: next(iter(part.lora_A.values())).weight.shape[0]
        for name, part in model.named_modules()
        if hasattr(part, "base_layer") and hasattr(part, "lora_A")
    }


def lora_targets(model: nn.Module, pattern: str | None = None) -> list[str]:
    """The names of the layers that adapters go to, whether they have them already or not.

    Args:
        model: any.
        pattern: a regular expression over the names of linear layers and convolutions; by default all linear layers
            of the blocks' attention or, where that keeps its weights elsewhere (``nn.MultiheadAttention``), of the
            rest of these blocks.

    Raises:
        InputError: nothing matches, or there is no attention and no pattern.
    """
    layers = _layers(model)
    if pattern is not None:
        try:
            found = [name for name in layers if re.search(pattern, name)]
        except re.error as error:
            raise InputError(f"LoRA's {pattern!r} is no regular expression ({error}).") from error
        if not found:
            raise InputError(f"LoRA's {pattern!r} matches no layer. The model has {', '.join(list(layers)[-4:])}, ...")
        return found
    inside = tuple(f"{name}." for name in attention_blocks(model))
    if not inside:
        raise InputError(
            "LoRA needs targets in this model, which has no attention. Name them by a regular expression over its "
            f"layers, as 'lora:8:{re.escape(next(iter(layers), 'layer'))}'."
        )
    fused = {f"{name}.out_proj" for name, part in model.named_modules() if isinstance(part, nn.MultiheadAttention)}
    linear = [
        name
        for name, layer in layers.items()
        if isinstance(layer, nn.Linear) and name.startswith(inside) and name not in fused
    ]
    return [name for name in linear if _in_attention(model, name)] or linear


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers and convolutions by name; adapted ones as what they were."""
    adapted = adapters(model)
    found = {name: getattr(part, "base_layer", part) for name, part in model.named_modules()}
    inner = tuple(f"{name}." for name in adapted)
    return {
        name: part
        for name, part in found.items()
        if isinstance(part, nn.Linear | nn.Conv2d) and not name.startswith(inner)
    }


def _in_attention(model: nn.Module, name: str) -> bool:
    """Whether the layer of that name lies in a module that attends."""
    parts = name.split(".")[:-1]
    above = (model.get_submodule(".".join(parts[: k + 1])) for k in range(len(parts)))
    return any("attention" in type(module).__name__.lower() for module in above)


def add_lora(model: nn.Module, rank: int = 8, pattern: str | None = None, seed: int = 0) -> list[str]:
    """Put adapters of the given rank into ``model``, in place; returns the names of the adapted layers.

    The product ``B A`` is not scaled (peft's ``lora_alpha`` is the rank). See ``lora_targets`` for ``pattern``.

    Raises:
        InputError: the model has adapters already, no layer to adapt or one that cannot be, or peft is not installed.
    """
    if adapters(model):
        raise InputError("the model has adapters already. Take them off first: fastntk.remove_lora(model).")
    if rank < 1:
        raise InputError(f"an adapter needs a rank of at least 1, not {rank}.")
    targets = lora_targets(model, pattern)
    names = "|".join(map(re.escape, targets))
    config = peft().LoraConfig(r=rank, lora_alpha=rank, target_modules=f"({names})")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            peft().inject_adapter_in_model(config, model)
        except ValueError as error:
            _take_off(model)
            raise InputError(f"one of the layers cannot be adapted ({error}). Name others by a pattern.") from error
    return targets


def remove_lora(model: nn.Module) -> None:
    """Take the adapters off again; the model is then bit for bit what it was before ``add_lora``.

    Raises:
        InputError: it has none.
    """
    if not adapters(model):
        raise InputError("the model has no adapters.")
    _take_off(model)


def merged(model: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """A copy of ``model`` at other values of its tuned parameters, in its library's own architecture: the product of
    every adapter is added to its layer's weight, ``W + B A``.

    Raises:
        InputError: it has prompts, which no library's architecture has.
    """
    if prompts_of(model):
        raise InputError("prompts are in no library's architecture, so neither timm nor transformers loads the model.")
    found = copied(model)
    found.load_state_dict(parameters, strict=False)
    for name in adapters(found):
        found.get_submodule(name).merge()  # type: ignore[operator]
    _take_off(found)
    return found.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _take_off(model: nn.Module) -> None:
    for name in adapters(model):
        model.set_submodule(name, cast(nn.Module, model.get_submodule(name).base_layer))
    if hasattr(model, "peft_config"):
        del model.peft_config
