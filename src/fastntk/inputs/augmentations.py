"""Random changes of training images, by torchvision: each image its own, from a seed of its own."""

import importlib
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from fastntk.common.errors import InputError
from fastntk.inputs.batches import Labelled, labels_offered
from fastntk.inputs.ids import ids_of
from fastntk.inputs.libraries import torchvision

_Shape = tuple[int, int]


def _transforms() -> ModuleType:
    torchvision()
    return importlib.import_module("torchvision.transforms.v2")


def _flip(shape: _Shape) -> Callable[[Tensor], Tensor]:
    return _transforms().RandomHorizontalFlip()


def _crop(shape: _Shape) -> Callable[[Tensor], Tensor]:
    around = max(1, min(shape) // 8)
    return _transforms().RandomCrop(shape, padding=around, padding_mode="reflect")


AUGMENTATIONS: dict[str, Callable[[_Shape], Callable[[Tensor], Tensor]]] = {"flip": _flip, "crop": _crop}
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


class Views(Labelled):
    """A dataset with some fixed augmentations of every sample beside the sample itself, for ``prepare`` after a fit to
    random ones: view v of the sample with the id i has the id ``"i/v"``.

    A request names all views of a sample: ``memory.forget(views.of(ids))``. docs/benchmarks-cross-entropy.md has what
    it gains.

    Args:
        source: a map-style dataset of ``(image, label)``.
        names: of the augmentations.
        count: views a sample, the sample itself among them as view 0.
        seed: of the augmentations.

    Raises:
        InputError: the count is not at least 1, or there is no such augmentation.
    """

    def __init__(self, source: Dataset, names: Sequence[str], count: int = 2, seed: int = 0) -> None:
        check_augmentations(names)
        if count < 1:
            raise InputError(f"there must be at least 1 view a sample, not {count}.")
        self.source, self.names, self.count, self.seed = source, names, count, seed
        self.ids = [f"{each}/{view}" for each in ids_of(source) for view in range(count)]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = self.source[index // self.count]
        if index % self.count == 0:
            return image, label
        return augmented(image[None], self.names, [self.seed * len(self) + index])[0], label

    @property
    def labels(self) -> Int[Tensor, " views"] | None:
        """Of all views, if the source offers them."""
        known = labels_offered(self.source)
        return None if known is None else known.repeat_interleave(self.count)

    def of(self, ids: Iterable[int | str]) -> list[str]:
        """The ids of all views of some samples."""
        return [f"{each}/{view}" for each in ids for view in range(self.count)]
