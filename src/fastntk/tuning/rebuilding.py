"""The tuned parameters before fitting, for a model that was fitted before anybody thought of keeping them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastntk.common.errors import InputError
from fastntk.inputs.heads import head_parameters
from fastntk.inputs.models import load_model
from fastntk.inputs.weights import named_as, read_weights
from fastntk.tuning.frozen import check_frozen
from fastntk.tuning.parameters import tuned
from fastntk.tuning.prompts import NAME

HEADS = "zero", "fitted"
"""What the head is taken to have started from: zeros, or where it is now, so that nothing pulls at it."""


@dataclass(frozen=True)
class RebuiltStart:
    """``theta_0`` as far as it can be known, and what was assumed of it.

    Attributes:
        initial: the tuned parameters, for ``prepare``.
        assumed: a sentence for each kind of parameter.
    """

    initial: dict[str, Tensor]
    assumed: list[str]


def rebuilt_start(model: nn.Module, weights: Mapping[str, Tensor] | Path | str, *, head: str = "zero") -> RebuiltStart:
    """The tuned parameters before fitting, from the pretrained weights that the model was made of.

    LoRA's added product was zero, whatever its ``A`` was, which is taken as it is; prompts and the head are drawn at
    random, small: of them nothing but the draw is lost where they are taken as zero. All else is what was pretrained.
    What a wrong head costs was measured: docs/benchmarks-cross-entropy.md.

    Args:
        model: fitted, as ``tune`` left it.
        weights: a state dict, a file of one, or the name of a library's pretrained model (which the library downloads).
        head: one of ``HEADS``.

    Raises:
        InputError: a tuned parameter is in none of these, or of another shape; one that is not tuned is not as it was
            there, so that it was trained too; or the weights cannot be had.
    """
    if head not in HEADS:
        raise InputError(f"the head's start is {' or '.join(HEADS)}, not {head!r}.")
    known, own = named_as(model.state_dict(), _read(weights)), head_parameters(model)
    numbers = {name: each for name, each in known.items() if each.is_floating_point()}  # no counters, which files lack
    remedy = "Select everything that was trained, or give the weights that it was trained from."
    check_frozen(model, numbers, remedy, _but_for_rounding)
    initial: dict[str, Tensor] = {}
    assumed: dict[str, None] = {}
    for name, parameter in tuned(model).items():
        value, said = _start_of(name, parameter.detach(), known, own, head)
        initial[name] = value.to(parameter).clone()
        assumed[said] = None
    if unknown := [name for name, _ in model.named_parameters() if name not in initial and name not in known]:
        assumed[f"{unknown[0]!r} was not trained ({len(unknown)} such, not tuned, and not in these weights)"] = None
    return RebuiltStart(initial, list(assumed))


def _but_for_rounding(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same, or one is the other as a file in half precision has it."""
    if one.shape != other.shape:
        return False
    kinds = one.dtype, other.dtype, torch.float16, torch.bfloat16
    pairs = (one, other.to(one.device)), (other.to(one.device), one)
    return any(torch.equal(a, b.to(kind).to(a.dtype)) for kind in kinds for a, b in pairs)


def _start_of(
    name: str, now: Tensor, known: Mapping[str, Tensor], own: Collection[str], head: str
) -> tuple[Tensor, str]:
    """A parameter's start, and what that rests on."""
    if name in own:
        if head == "fitted":
            return now, "the head is taken to have started where it is: nothing pulls at it"
        return torch.zeros_like(now), "the head is taken to have started from zero"
    if ".lora_B." in name:
        return torch.zeros_like(now), "LoRA's B started from zero"
    if ".lora_A." in name:
        return now, "LoRA's A is taken as it is: with B at zero it had no effect"
    if name.startswith(f"{NAME}."):
        return torch.zeros_like(now), "prompts are taken to have started from zero"
    if name not in known or known[name].shape != now.shape:
        have = f"has shape {list(known[name].shape)} in them" if name in known else "is not in them"
        raise InputError(
            f"the start of {name!r} is not known from these weights: it {have}, the model has {list(now.shape)}. Give "
            "the weights that this very model was fitted from, or prepare with a snapshot of your own."
        )
    return known[name], "all else started from the pretrained weights that were given"


def _read(weights: Mapping[str, Tensor] | Path | str) -> Mapping[str, Tensor]:
    if isinstance(weights, Mapping):
        return weights
    if isinstance(weights, Path) or Path(weights).is_file():
        return read_weights(Path(weights))
    return load_model(weights, 2, weights="pretrained")[0].state_dict()
