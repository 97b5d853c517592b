"""Models by name from timm, torchvision and transformers, or of your own, with a new head and their preprocessing."""

from pathlib import Path

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from fastntk.common.errors import InputError, reason
from fastntk.common.seeds import check_seed
from fastntk.inputs.called import called
from fastntk.inputs.checks import check_logits, taking
from fastntk.inputs.heads import reset_head
from fastntk.inputs.images import Preprocessing
from fastntk.inputs.makers import maker
from fastntk.inputs.weights import load_weights, read_weights

_MOST = 1_000_000  # classes


def load_model(
    name: str, classes: int, *, weights: Path | str | None = None, size: int | None = None, seed: int = 0
) -> tuple[nn.Module, Preprocessing]:
    """A model with a new head of ``classes`` classes, in eval mode, and the preprocessing it expects.

    Args:
        name: a timm name, or a torchvision name that timm does not have; ``torchvision/resnet18`` and ``timm/resnet18``
            say which where both have it. ``transformers/vit`` is a type of transformers' image classifiers,
            ``transformers/FOLDER`` what ``save_pretrained`` wrote, its weights included. ``FILE.py:FUNCTION`` is your
            own: the function is called with the number of classes and returns the module and its ``Preprocessing``.
        classes: C.
        weights: a local state dict (.safetensors, or .pt/.pth of tensors only) whose head is ignored if it has other
            classes; ``"pretrained"`` lets the library download its own; None keeps random weights.
        size: the side of the input images in pixels; by default the model's own.
        seed: of the head, N(0, 0.01^2) with bias 0, and of random weights.

    Raises:
        InputError: unknown name, a file that cannot be read, or weights that do not fit (the message names the tensor).
    """
    check_seed(seed)
    if not 2 <= classes <= _MOST:
        raise InputError(f"a classifier has from 2 to {_MOST:,} classes, not {classes}.")
    pretrained = weights == "pretrained"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, preprocessing = _made(name, classes, size, pretrained)
    if weights is not None and not pretrained:
        load_weights(model, read_weights(Path(weights)))
    _check_made(model)
    _check_output(model.eval(), preprocessing.size, classes)
    reset_head(model, seed)
    return model.eval().to(memory_format=torch.channels_last), preprocessing  # type: ignore[call-overload]


def _made(name: str, classes: int, size: int | None, pretrained: bool) -> tuple[nn.Module, Preprocessing]:
    make = maker(name)
    try:
        return make(classes, size, pretrained)
    except InputError:
        raise
    except Exception as error:  # whatever a library says of a size that is none of its model's, or without a network
        if pretrained and isinstance(error, OSError | RuntimeError):
            raise InputError(
                f"the pretrained weights of {name} cannot be had ({reason(error)}). The library downloads them, if it "
                "has any: without a network, copy a file of them here and give its path."
            ) from error
        if size:
            told = f"there is no {name} that takes images of {size} x {size} ({reason(error)}). Choose another size."
        else:
            told = f"{name} cannot be made ({reason(error)}). Install what it needs, or choose another."
        raise InputError(told) from error


def _check_made(model: nn.Module) -> None:
    """Raises ``InputError`` for a parameter without a shape."""
    for name, each in model.named_parameters():
        if isinstance(each, UninitializedParameter):
            raise InputError(f"parameter {name!r} is Lazy, and has no shape before a first pass. Make one first.")


def _check_output(model: nn.Module, size: int, classes: int) -> None:
    """Raises ``InputError`` if the model cannot take an image of that side, or does not give its logits."""
    image = torch.zeros(1, 3, 1, 1).expand(1, 3, size, size)  # which takes no memory yet
    with torch.no_grad(), taking(image, "Choose another size."):
        logits = called(model, {}, image)
    check_logits(logits, 1, classes)
