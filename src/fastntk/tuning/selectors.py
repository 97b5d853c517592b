"""Which parameters are tuned: selectors by name, everything else frozen."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from fastntk.common.errors import InputError
from fastntk.common.plugins import Registry
from fastntk.inputs.called import copied
from fastntk.inputs.heads import head_parameters
from fastntk.inputs.structure import blocks, transformer_blocks
from fastntk.tuning.lora import adapters, add_lora, lora_targets, remove_lora
from fastntk.tuning.parameters import tuned
from fastntk.tuning.prompts import add_prompts, prompts_of, remove_prompts

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)


LAYER_NORMS = (nn.LayerNorm,)


NORMS = (*BATCH_NORMS, *LAYER_NORMS, nn.GroupNorm)


@dataclass(frozen=True)
class Selector:
    """A named selection, written ``name`` or ``name:argument``.

    Attributes:
        meaning: in a few words.
        names: of the parameters in a model, given the argument; adds to the model what it is to tune.
        argument: the one meant by ``name`` alone; None for a selector that takes none.
        adds: whether it adds parameters.
    """

    meaning: str
    names: Callable[[nn.Module, str], list[str]]
    argument: str | None = None
    adds: bool = False


def _parameters(model: nn.Module, wanted: Callable[[str], bool] = lambda name: True) -> list[str]:
    return [name for name, _ in model.named_parameters() if wanted(name)]


def _of_modules(kinds: tuple[type[nn.Module], ...]) -> Callable[[nn.Module, str], list[str]]:
    def names(model: nn.Module, _: str) -> list[str]:
        own = {name for name, module in model.named_modules() if isinstance(module, kinds)}
        return _parameters(model, lambda name: name.rpartition(".")[0] in own)

    return names


def _of_head(model: nn.Module, _: str) -> list[str]:
    return head_parameters(model)


def _of_last(model: nn.Module, argument: str) -> list[str]:
    count, found = _whole(argument, "last"), list(blocks(model))
    if not 1 <= count <= len(found):
        raise InputError(f"'last:{count}' needs a model with that many blocks; this one has {len(found)}.")
    return _parameters(model, lambda name: name.startswith(tuple(f"{block}." for block in found[-count:])))


def _of_prompts(model: nn.Module, argument: str) -> list[str]:
    return _prompts(model, [_whole(argument, "prompt")], deep=False)


def _of_deep_prompts(model: nn.Module, argument: str) -> list[str]:
    lengths = [_whole(part, "deep-prompt") for part in argument.split(",")]
    return _prompts(model, lengths * len(transformer_blocks(model)) if len(lengths) == 1 else lengths, deep=True)


def _prompts(model: nn.Module, lengths: list[int], deep: bool) -> list[str]:
    present = prompts_of(model)
    if present is None or (present.lengths, present.deep) != (tuple(lengths), deep):
        add_prompts(model, lengths, deep=deep)
    return _parameters(model, lambda name: name.startswith("prompts."))


def _of_lora(model: nn.Module, argument: str) -> list[str]:
    text, _, pattern = argument.partition(":")
    rank, present = _whole(text, "lora"), adapters(model)
    if present != dict.fromkeys(lora_targets(model, pattern or None), rank):
        add_lora(model, rank, pattern or None)
    return _parameters(model, lambda name: ".lora_A." in name or ".lora_B." in name)


def _whole(text: str, selector: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise InputError(f"selector {selector!r} takes whole numbers after its colon, not {text!r}.")
    return int(text)


_OWN: dict[str, Selector] = {
    "bn": Selector("batch norms", _of_modules(BATCH_NORMS)),
    "ln": Selector("layer norms", _of_modules(LAYER_NORMS)),
    "norm": Selector("all norms", _of_modules(NORMS)),
    "bias": Selector("biases", lambda model, _: _parameters(model, lambda name: name.endswith("bias"))),
    "head": Selector("the classification head", _of_head),
    "prompt": Selector("visual prompts before the first block, so many", _of_prompts, "10", adds=True),
    "deep-prompt": Selector("visual prompts in every block, so many, or 4,2,...", _of_deep_prompts, "10", adds=True),
    "lora": Selector("adapters of this rank; ':' and a pattern of layers may follow", _of_lora, "8", adds=True),
    "last": Selector("the last blocks, so many", _of_last, "1"),
    "all": Selector("everything", lambda model, _: _parameters(model)),
}

SELECTORS: Registry[Selector] = Registry(
    "selectors", _OWN, lambda made: isinstance(made, Selector), "a fastntk.tuning.selectors.Selector"
)
"""Selectors by name."""


def tunables(model: nn.Module) -> dict[str, int]:
    """How many parameters each named selector would tune in ``model``.

    Those that do not apply are left out, and LoRA where peft is not installed.
    """
    found = {}
    for key, selector in SELECTORS.items():
        trial = copied(model) if selector.adds else model
        try:
            names = set(selector.names(trial, selector.argument or ""))
        except InputError:
            continue
        found[key] = sum(parameter.numel() for name, parameter in trial.named_parameters() if name in names)
    return {key: size for key, size in found.items() if size}


def _parsed(selector: str) -> tuple[Selector, str] | None:
    """A named selector and its argument; None for a regular expression, in which a colon may occur too."""
    key, colon, argument = selector.partition(":")
    named = SELECTORS.get(key)
    if named is None or (colon and named.argument is None):
        return None
    return named, argument or named.argument or ""


def _matching(model: nn.Module, selector: str) -> list[str]:
    """The parameter names of one selector: a named one, or a regular expression over the names."""
    named = _parsed(selector)
    try:
        names = named[0].names(model, named[1]) if named else _parameters(model, _searching(selector))
    except re.error as error:
        raise InputError(f"selector {selector!r} is neither a name nor a regular expression ({error}).") from error
    if not names:
        offer = ", ".join(f"{key} ({size:,} parameters)" for key, size in tunables(model).items())
        raise InputError(f"selector {selector!r} matches no parameter of this model. It offers: {offer}.")
    return names


def _searching(pattern: str) -> Callable[[str], bool]:
    expression = re.compile(pattern)
    return lambda name: bool(expression.search(name))


@contextmanager
def _whole_or_not_at_all(model: nn.Module) -> Iterator[None]:
    """What was added to the model meanwhile is taken off again if the block fails."""
    before = prompts_of(model), adapters(model)
    try:
        yield
    except InputError:
        if prompts_of(model) and not before[0]:
            remove_prompts(model)
        if adapters(model) and not before[1]:
            remove_lora(model)
        raise


def select(model: nn.Module, *selectors: str | Iterable[str]) -> list[str]:
    """The names of the parameters that the selectors choose, in the model's own order, each once.

    Selectors that add parameters do so first: the others see the names as they are then.

    Raises:
        InputError: no selector, or one that matches nothing; the message offers what exists.
    """
    chosen: set[str] = set()
    adding = [each for each in selectors if isinstance(each, str) and (named := _parsed(each)) and named[0].adds]
    with _whole_or_not_at_all(model):
        for selector in [*adding, *selectors]:
            if isinstance(selector, str) and not selector.strip():
                raise InputError("a selector is empty. Leave it out, or say 'all'.")
            chosen.update(_matching(model, selector) if isinstance(selector, str) else _listed(model, selector))
        if not chosen:
            offer = ", ".join(tunables(model))
            raise InputError(f"no parameter is selected to be tuned. Choose at least one of: {offer}.")
    return _parameters(model, lambda name: name in chosen)


def _listed(model: nn.Module, names: Iterable[str]) -> list[str]:
    known, wanted = set(_parameters(model)), list(names)
    for name in wanted:
        if name not in known:
            raise InputError(f"the model has no parameter {name!r}. 'all' tunes every one of its {len(known)}.")
    return wanted


def tune(model: nn.Module, *selectors: str | Iterable[str]) -> dict[str, nn.Parameter]:
    """Freeze all of ``model`` but the selected parameters, in place, and return those by name.

    Args:
        model: any module that maps images to logits.
        selectors: ``"bn"``, ``"ln"``, ``"norm"``, ``"bias"``, ``"head"``, ``"last:K"`` blocks, ``"all"``;
            ``"prompt:N"``, ``"deep-prompt:N"`` and ``"lora:RANK"``, which add what they tune unless it is there
            (``add_prompts``, ``add_lora``); a regular expression over parameter names; or an iterable of exact names.
            They add up.

    Returns:
        The tuned parameters themselves (not copies), in the model's order.

    Raises:
        InputError: nothing is selected, or a selector does not apply to this model, which then stays as it was.
    """
    names = set(select(model, *selectors))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return tuned(model)
