"""Models by name from timm, torchvision and transformers, or of your own, with a new head and their preprocessing."""

from pathlib import Path

import torch
from torch import nn

from fastntk.common.errors import InputError
from fastntk.inputs.called import check_logits
from fastntk.inputs.heads import reset_head
from fastntk.inputs.images import Preprocessing
from fastntk.inputs.makers import maker
from fastntk.inputs.weights import load_weights, read_weights


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
    if classes < 2:
        raise InputError(f"a classifier needs at least 2 classes, got {classes}.")
    pretrained = weights == "pretrained"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, preprocessing = _made(name, classes, size, pretrained)
    if weights is not None and not pretrained:
        load_weights(model, read_weights(Path(weights)))
    reset_head(model, seed)
    _check_output(model.eval(), preprocessing.size, classes)
    return model.eval().to(memory_format=torch.channels_last), preprocessing  # type: ignore[call-overload]


def _made(name: str, classes: int, size: int | None, pretrained: bool) -> tuple[nn.Module, Preprocessing]:
    make = maker(name)
    if not pretrained:
        return make(classes, size, False)
    try:
        return make(classes, size, True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"the pretrained weights of {name} cannot be had ({str(error).splitlines()[0]}). The library downloads "
            "them, if it has any: without a network, copy a file of them here and give its path."
        ) from error


def _check_output(model: nn.Module, size: int, classes: int) -> None:
    """Raises ``InputError`` if the model cannot take an image of that side, or does not give its logits."""
    try:
        with torch.no_grad():
            logits = model(torch.zeros(1, 3, size, size))
    except Exception as error:  # whatever a model says of a size that is not its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"the model cannot take images of {size} x {size} ({reason}). Choose another size.") from error
    check_logits(logits, 1, classes)
