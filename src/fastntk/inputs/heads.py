"""The classification head: what the logits are computed with last, found by a forward pass and never by a name."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastntk.common.errors import InputError, reason
from fastntk.inputs.called import called, evaluating

_SIDES = 32, 64, 224, 28, 16, 8, 4, 96, 128, 160, 192, 256, 299, 384
"""Of the images that are tried where the model says nothing of its own."""


def head_parameters(model: nn.Module) -> list[str]:
    """The names of the head's parameters, adapters apart, in the model's order.

    From the logits backward, every way to the images is followed up to the first matrix (or kernel) of parameters:
    that, what it is computed from (a weight norm's length and direction), and the shift that is added to it are the
    head. It may be several layers (a distilled transformer averages two) and need not be an ``nn.Linear``.

    Raises:
        InputError: no image size that was tried goes through the model, or no parameters but vectors are met.
    """
    parameters = {
        name: each.detach().requires_grad_(each.is_floating_point()) for name, each in model.named_parameters()
    }
    known = {id(each): name for name, each in parameters.items()}
    found = {known[id(each)] for each in _last_matrices(*_logits(model, parameters)) if id(each) in known}
    names = [name for name in parameters if name in found and ".lora_" not in name]
    if not names:
        raise InputError("the model's logits come from no matrix of parameters that could be its head. Tune others.")
    return names


def head_modules(model: nn.Module) -> list[str]:
    """The names of the modules that the head's parameters belong to."""
    owners = (name.partition(".parametrizations.") for name in head_parameters(model))
    return list(dict.fromkeys(name if cut else name.rpartition(".")[0] for name, cut, _ in owners))


def reset_head(model: nn.Module, seed: int) -> None:
    """Draw the head anew, in place: matrices N(0, 0.01^2), vectors 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in head_parameters(model):
            parameter = model.get_parameter(name)
            drawn = torch.randn(parameter.shape, generator=generator) * 0.01
            parameter.copy_(drawn if parameter.ndim > 1 else torch.zeros_like(drawn))


def take_backbone(model: nn.Module, other: nn.Module) -> None:
    """Give ``model`` all weights of another that differs from it in the head alone, and a head of zeros, in place: one
    that is drawn answers worse where the rest was fitted to other classes (docs/exact.md).

    Raises:
        InputError: they differ in something else.
    """
    heads, own = head_parameters(model), model.state_dict()
    adapted = tuple(f"{each.removesuffix('.base_layer')}." for each in head_modules(model))
    taken = {
        name: each
        for name, each in other.state_dict().items()
        if name not in heads and not (".lora_" in name and name.startswith(adapted))
    }
    odd = [name for name, each in taken.items() if name not in own or own[name].shape != each.shape]
    if odd:
        raise InputError(f"the models differ in {min(odd)!r} and not in the head alone. Take two of the same kind.")
    model.load_state_dict({**own, **taken})
    with torch.no_grad():
        for name in heads:
            model.get_parameter(name).zero_()


def _logits(model: nn.Module, parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The logits of one image of the first size that the model takes, with their history, and the image."""
    told = ""
    like = next((each for each in parameters.values() if each.is_floating_point()), torch.zeros(()))
    with evaluating(model), torch.enable_grad():
        for shape in _shapes(model):
            image = torch.zeros(1, *shape, dtype=like.dtype, device=like.device, requires_grad=True)
            try:
                with _unchanged(model):
                    out = called(model, parameters, image.clone())
            except InputError:
                raise
            except Exception as error:
                told = told or reason(error)
                continue
            if isinstance(out, Tensor) and out.grad_fn is not None:
                return out, image
            told = told or "it returns no tensor that depends on its parameters"
    raise InputError(
        f"the model's head cannot be found: no image that was tried goes through it ({told}). Name its parameters "
        "instead, by a regular expression."
    )


def _shapes(model: nn.Module) -> Iterable[tuple[int, ...]]:
    """Of the images that the model may take, the likeliest first: what its parts say, what its first layer has room
    for, then the usual ones."""
    first = next((each for each in model.modules() if isinstance(each, nn.Linear | nn.Conv2d)), None)
    channels = first.in_channels if isinstance(first, nn.Conv2d) and first.in_channels in (1, 3) else 3
    shapes: list[tuple[int, ...]] = [(channels, *side) for side in _stated(model)]
    if isinstance(first, nn.Linear):
        for count in (3, 1):
            side = math.isqrt(first.in_features // count)
            shapes += [(count, side, side)] if count * side * side == first.in_features else []
        shapes.append((first.in_features,))
    return dict.fromkeys([*shapes, *((channels, side, side) for side in _SIDES)])


def _stated(model: nn.Module) -> Iterator[tuple[int, int]]:
    """The image sizes that a model's parts have among their attributes."""
    for name in ("img_size", "image_size", "input_resolution"):
        for module in model.modules():
            size = getattr(module, name, None)
            pair = (size, size) if isinstance(size, int) else size
            if isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(each, int) for each in pair):
                yield pair[0], pair[1]


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Modules keep the attributes that they have: some make their windows smaller for good when an image is small."""
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for now, then in before:
            now.clear()
            now.update(then)


def _last_matrices(logits: Tensor, image: Tensor) -> Iterator[Tensor]:
    """The parameters at the end of every way back from the logits."""
    waiting: list[Any] = [logits.grad_fn]
    seen: set[Any] = set()
    on_the_way = _on_the_way(logits.grad_fn, image)
    if logits.grad_fn not in on_the_way and sum(leaf.ndim > 1 for leaf in _leaves(logits.grad_fn)) > 1:
        raise InputError("the model cuts its gradients above the last layer: name its parameters in place of 'head'.")
    while waiting:
        node = waiting.pop()
        seen.add(node)
        held = [leaf for each in _inputs(node) if each not in on_the_way for leaf in _leaves(each)]
        matrix = any(leaf.ndim > 1 for leaf in held)
        if matrix or "Add" in node.name():
            yield from held
        if not matrix:
            waiting += [each for each in _inputs(node) if each in on_the_way and each not in seen]


def _inputs(node: Any) -> list[Any]:
    """What a node of the graph was computed from."""
    return [each for each, _ in node.next_functions if each is not None]


def _on_the_way(start: Any, image: Tensor) -> set[Any]:
    """The nodes beneath ``start`` that the image went through."""
    found, done, waiting = set(), set(), [start]
    while waiting:
        node = waiting[-1]
        inner = _inputs(node)
        if node not in done:
            done.add(node)
            waiting += [each for each in inner if each not in done]
            continue
        waiting.pop()
        if getattr(node, "variable", None) is image or any(each in found for each in inner):
            found.add(node)
    return found


def _leaves(start: Any) -> Iterator[Tensor]:
    """The parameters that a node was computed from."""
    waiting, seen = [start], set()
    while waiting:
        node = waiting.pop()
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [each for each in _inputs(node) if each not in seen]
