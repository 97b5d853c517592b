"""Labelled images with ids, preprocessed as a model wants them, as map-style datasets."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from fastntk.common.errors import InputError
from fastntk.common.progress import track
from fastntk.inputs.batches import Labelled
from fastntk.inputs.libraries import torchvision


@dataclass(frozen=True)
class Preprocessing:
    """What turns an image into the model's input: side in pixels, then ``(x / 255 - mean) / std`` per channel."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3 or not all(each > 0 for each in self.std):
            raise InputError(f"mean and std are of three channels, and std above 0, not {self.mean} and {self.std}.")


_TOLD = 20  # classes that are named
_OF_16_BITS = "PNG", "PPM"  # formats that have no more a channel, whatever PIL reads them into


class Images(Labelled):
    """``(image, label)`` pairs as the model wants them.

    Args:
        source: indexable; each item an image (PIL of 8 or 16 bits, or uint8 array ``[H, W]`` or ``[H, W, 3]``).
        labels: the class of each item.
        classes: the names of the classes.
        preprocessing: the model's.
        ids: what names each sample for good, whatever else is removed; by default its index.

    Attributes:
        parts: the sources that they were joined from, in order, with how many images; the first is the data's own, "".
    """

    def __init__(
        self,
        source: Any,
        labels: Sequence[int],
        classes: list[str],
        preprocessing: Preprocessing,
        ids: Sequence[int | str] | None = None,
    ) -> None:
        self.source, self.classes, self.preprocessing = source, classes, preprocessing
        self.ids: Sequence[int | str] = range(len(labels)) if ids is None else ids
        outside = [label for label in labels if not 0 <= label < len(classes)]
        if outside:
            raise InputError(f"label {outside[0]} is outside the {len(classes)} classes 0 .. {len(classes) - 1}.")
        self.labels = torch.as_tensor(labels, dtype=torch.long)
        self.parts = [("", len(labels))]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._tensor(self.source[index]), int(self.labels[index])

    def __str__(self) -> str:
        """How many there are of each class."""
        counts = torch.bincount(self.labels, minlength=len(self.classes)).tolist()
        told = [f"{name} {count:,}" for name, count in zip(self.classes, counts, strict=True)]
        more = [f"and {len(told) - _TOLD} more"] if len(told) > _TOLD else []
        empty = f"; {counts.count(0)} classes have none" if 0 in counts else ""
        return f"{len(self):,} images in {len(told)} classes: {', '.join([*told[:_TOLD], *more])}{empty}"

    def under(self, classes: Sequence[str]) -> "Images":
        """The same with the classes that a model knows, of which some may have no image left.

        Raises:
            InputError: there are classes that the model does not know.
        """
        unknown = sorted(set(self.classes) - set(classes))
        if unknown:
            raise InputError(
                f"the data have classes that the model does not know: {', '.join(unknown)}. Its classes are: "
                f"{', '.join(classes)}."
            )
        places = torch.tensor([classes.index(name) for name in self.classes], dtype=torch.long)
        return Images(self.source, places[self.labels].tolist(), list(classes), self.preprocessing, self.ids)

    def joined_by(self, others: "Images", source: str) -> "Images":
        """With the images of another source at the end, of the same classes, whose ids begin with its name.

        Raises:
            InputError: an id is there already.
        """
        name = Path(source).name
        ids = [*self.ids, *(f"{name}/{each}" for each in others.ids)]
        if len(set(ids)) < len(ids):
            raise InputError(f"images of {name!r} have ids that are there already. Call the new data otherwise.")
        labels = [*self.labels.tolist(), *others.labels.tolist()]
        joined = Images(_Joined(self, others), labels, self.classes, self.preprocessing, ids)
        joined.parts = [*self.parts, (source, len(others))]
        return joined

    @property
    def by_source(self) -> dict[str, Sequence[int | str]]:
        """The ids of every source's images."""
        ends = accumulate(count for _, count in self.parts)
        return {each: self.ids[end - count : end] for (each, count), end in zip(self.parts, ends, strict=True)}

    def part(self, first: int, last: int) -> "Images":
        """Images ``first`` to ``last`` of each class, in the order in which they all are.

        Raises:
            InputError: a class has fewer.
        """
        places = [(self.labels == c).nonzero()[first:last, 0] for c in range(len(self.classes))]
        for name, found in zip(self.classes, places, strict=True):
            if len(found) < last - first:
                raise InputError(f"class {name} has no images {first} to {last}. Ask for fewer of each class.")
        chosen = torch.cat(places).sort().values
        ids = [self.ids[place] for place in chosen.tolist()]
        return Images(
            Subset(self.source, chosen.tolist()), self.labels[chosen].tolist(), self.classes, self.preprocessing, ids
        )

    def _tensor(self, image: Any) -> Tensor:
        transforms = torchvision().transforms.functional
        pixels = transforms.to_tensor(rgb(image))
        size, wanted = self.preprocessing.size, pixels.shape[-2:] != (self.preprocessing.size,) * 2
        if wanted:
            pixels = transforms.center_crop(transforms.resize(pixels, [size], antialias=True), [size])
        return transforms.normalize(pixels, self.preprocessing.mean, self.preprocessing.std)


def rgb(image: Any) -> Any:
    """A PIL image of three channels of 8 bits, from one of any mode or from an array of 8 bits.

    Raises:
        InputError: it is something else, or its values have no known range.
    """
    from PIL import Image

    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            raise InputError(
                f"an array is an image if it is uint8 [H, W] or [H, W, 3], not {image.dtype} {list(image.shape)}."
            )
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise InputError(f"an image must be one of PIL's or an array, not a {type(image).__name__}.")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _OF_16_BITS):  # convert cuts off at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InputError(f"values of mode {image.mode!r} have no known range. Save the images with 8 or 16 bits.")
    return image.convert("RGB")


class _Joined:
    """Two sources' images, one after the other."""

    def __init__(self, first: Images, second: Images) -> None:
        self.first, self.second = first, second

    def __getitem__(self, index: int) -> Any:
        count = len(self.first)
        return self.first.source[index] if index < count else self.second.source[index - count]


def in_memory(data: Images, limit: int = 2_000_000_000) -> Labelled:
    """``data`` preprocessed once and kept as tensors if that takes at most ``limit`` bytes, else ``data`` itself."""
    if len(data) * 3 * data.preprocessing.size**2 * 4 > limit:
        return data
    images = torch.stack([data[i][0] for i in track(range(len(data)), "reading images")])
    return _Read(images.contiguous(memory_format=torch.channels_last), data.labels, data.ids)


class _Read(TensorDataset, Labelled):
    """Images in memory, with their ids."""

    def __init__(self, images: Tensor, labels: Tensor, ids: Sequence[int | str]) -> None:
        super().__init__(images, labels)
        self.labels = labels
        self.ids = ids
