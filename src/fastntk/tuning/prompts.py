"""Visual prompts: tokens that are learned and that the blocks of a vision transformer see beside the image's own.

Shallow prompts enter at the first block and leave after the last one; with deep prompts every block has its own. A
transformer's blocks do not mind the order of their tokens, so prompts go to the end, and what follows the blocks
(norms, pooling, the head) never sees them: any library's transformer takes them unchanged.
Source: Jia et al. 2022, Visual Prompt Tuning (arXiv 2203.12119).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastntk.common.errors import InputError
from fastntk.inputs.structure import transformer_blocks

NAME = "prompts"


class Prompts(nn.Module):
    """The prompts of a model.

    Attributes:
        lengths: how many enter before the first block, or before each block.
        deep: whether every block has its own.
        tokens: ``[1, length, width]`` for every length above 0.
    """

    def __init__(self, lengths: Sequence[int], deep: bool, tokens: Iterable[Tensor]) -> None:
        super().__init__()
        self.lengths, self.deep = tuple(lengths), deep
        self.tokens = nn.ParameterList(tokens)
        self._hooks: list[Any] = []

    def attach(self, number: int, first: nn.Module, last: nn.Module) -> None:
        """Let the tokens of that number enter before the block ``first`` and leave after ``last``."""
        self._hooks.append(first.register_forward_pre_hook(_Enter(self, number)))
        self._hooks.append(last.register_forward_hook(_Leave(self.tokens[number].shape[1])))

    def detach(self) -> None:
        """Let no tokens enter any more."""
        for hook in self._hooks:
            hook.remove()


class _Enter:
    """Appends prompts to the tokens that a block is given."""

    def __init__(self, prompts: Prompts, number: int) -> None:
        self.prompts, self.number = prompts, number

    def __call__(self, block: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens = arguments[0] if arguments else None
        if not isinstance(tokens, Tensor) or tokens.ndim != 3:
            raise InputError("prompts need a plain vision transformer, whose blocks take [batch, tokens, width].")
        prompts = self.prompts.tokens[self.number].expand(len(tokens), -1, -1)
        return torch.cat([tokens, prompts.to(tokens.dtype)], 1), *arguments[1:]


class _Leave:
    """Takes the last tokens off what a block returns."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, block: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return output[0][:, : -self.length], *output[1:]
        return output[:, : -self.length]


def prompts_of(model: nn.Module) -> Prompts | None:
    """The model's prompts, if it has any."""
    prompts = getattr(model, NAME, None)
    return prompts if isinstance(prompts, Prompts) else None


def add_prompts(model: nn.Module, lengths: int | Sequence[int] = 10, *, deep: bool = False, seed: int = 0) -> Prompts:
    """Give a vision transformer prompts, in place: the module ``model.prompts``. Nothing else of it changes.

    The tokens start uniform on ``[-v, v]`` with ``v^2 = 6 / (inputs of a patch + width)``, as in the paper.

    Args:
        model: of timm, torchvision, transformers or your own, with blocks from tokens to tokens.
        lengths: how many prompts; if ``deep``, in every block, or one number a block, where 0 gives it none.
        deep: whether every block has its own.
        seed: of the first values.

    Raises:
        InputError: the model is no plain vision transformer, has other prompts already, or the lengths do not fit.
    """
    places = list(transformer_blocks(model).values())
    if hasattr(model, NAME):
        raise InputError("the model has prompts already. Take them off first: fastntk.remove_prompts(model).")
    spans = [(block, block) for block in places] if deep else [(places[0], places[-1])]
    each = [lengths] * len(spans) if isinstance(lengths, int) else list(lengths)
    if len(each) != len(spans):
        raise InputError(f"prompts need one length for each of the model's {len(spans)} blocks, not {len(each)}.")
    if min(each) < 0 or not any(each):
        raise InputError(f"the number of prompts must be 0 or more, and above 0 somewhere, not {each}.")
    width, generator = _width(places[0]), torch.Generator().manual_seed(seed)
    bound = math.sqrt(6 / (_patch(model) + width))
    used = [(length, span) for length, span in zip(each, spans, strict=True) if length]
    tokens = [(2 * torch.rand(1, length, width, generator=generator) - 1) * bound for length, _ in used]
    prompts = Prompts(each, deep, tokens).to(next(model.parameters()))
    model.add_module(NAME, prompts)
    for number, (_, span) in enumerate(used):
        prompts.attach(number, *span)
    return prompts


def remove_prompts(model: nn.Module) -> None:
    """Take the prompts off again; the model is then bit for bit what it was before ``add_prompts``.

    Raises:
        InputError: it has none.
    """
    prompts = prompts_of(model)
    if prompts is None:
        raise InputError("the model has no prompts.")
    prompts.detach()
    delattr(model, NAME)


def _width(block: nn.Module) -> int:
    """Of the tokens: what the block's first norm, or else its first linear layer, takes."""
    for part in block.modules():
        if isinstance(part, nn.LayerNorm | nn.RMSNorm):
            return int(part.normalized_shape[-1])
    return next(part.in_features for part in block.modules() if isinstance(part, nn.Linear))


def _patch(model: nn.Module) -> int:
    """Numbers in a patch of the image."""
    convolution = next((part for part in model.modules() if isinstance(part, nn.Conv2d)), None)
    return 0 if convolution is None else convolution.weight[0].numel()
