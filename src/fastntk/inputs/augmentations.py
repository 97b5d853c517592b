"""Random changes of training images, by torchvision: each image its own, from a seed of its own."""

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from fastntk.common.errors import InputError
from fastntk.inputs.libraries import torchvision

Shape = tuple[int, int]


def _transforms() -> ModuleType:
    torchvision()
    return importlib.import_module("torchvision.transforms.v2")


def _flip(shape: Shape) -> Callable[[Tensor], Tensor]:
    return _transforms().RandomHorizontalFlip()


def _crop(shape: Shape) -> Callable[[Tensor], Tensor]:
    around = max(1, min(shape) // 8)
    return _transforms().RandomCrop(shape, padding=around, padding_mode="reflect")


AUGMENTATIONS: dict[str, Callable[[Shape], Callable[[Tensor], Tensor]]] = {"flip": _flip, "crop": _crop}
"""By name, what makes them from the height and width of the images: a mirror image in half of all cases; a window of
the image's own size out of it, reflected by an eighth at every side."""


def check_augmentations(names: Sequence[str]) -> None:
    """Raises ``InputError`` for a name that there is not."""
    for name in names:
        if name not in AUGMENTATIONS:
            raise InputError(f"there is no augmentation {name!r}. There are: {', '.join(AUGMENTATIONS)}.")


def augmented(
    images: Float[Tensor, "batch *shape"], names: Sequence[str], seeds: Sequence[int]
) -> Float[Tensor, "batch *shape"]:
    """The images, each changed at random by the augmentations of these names in order; an image and its seed decide
    what becomes of it, whatever it is batched with."""
    if not names:
        return images
    changes = [AUGMENTATIONS[name]((images.shape[-2], images.shape[-1])) for name in names]
    made = []
    with torch.random.fork_rng(devices=[]):
        for image, seed in zip(images, seeds, strict=True):
            torch.manual_seed(seed)
            for change in changes:
                image = change(image)
            made.append(image)
    return torch.stack(made).contiguous(memory_format=torch.channels_last)
