"""Batches of any map-style dataset of ``(image, label)``."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from fastntk.common.errors import InputError

_DIGEST = 8  # bytes: two in 50,000 different images agree with a chance of 1e-10


_OFFERING = {
    *("ImageFolder", "ImageNet", "EuroSAT", "CIFAR10", "CIFAR100", "SVHN", "STL10"),
    *("MNIST", "FashionMNIST", "KMNIST", "EMNIST", "USPS"),
}
"""Datasets of torchvision whose items have the labels of their ``samples``, ``targets`` or ``labels``."""


class Labelled(Dataset):
    """A dataset of known length whose ``labels``, a tensor or None, are what its items have, known without these."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of its items."""


def check_mapped(dataset: Dataset) -> Sized:
    """The dataset, with a length. Raises ``InputError`` for what is no map-style one."""
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        own = " Pass its .dataset." if isinstance(dataset, DataLoader) else ""
        raise InputError(f"the data must be a map-style dataset, with a length and items, not {_kind(dataset)}.{own}")
    return dataset


def check_any(dataset: Dataset, kind: str) -> None:
    """Raises ``InputError`` for what is no map-style dataset, or, of a kind (training, validation, held-out), has no
    samples."""
    check_mapped(dataset)
    if not len(dataset):  # type: ignore[arg-type]
        raise InputError(f"there are no {kind} samples.")


def item(dataset: Dataset, index: int) -> tuple[Tensor, Tensor]:
    """An image and its label: a class, or a vector of shares.

    Raises:
        InputError: it is something else.
    """
    images, labels = _collated([dataset[index]])
    return images[0], labels[0]


def labels_of(dataset: Dataset) -> Int[Tensor, " samples"]:
    """The classes of all samples, without decoding images where the dataset offers them."""
    known, count = labels_offered(dataset), len(dataset)  # type: ignore[arg-type]
    if known is not None:
        return known
    return torch.cat([torch.empty(0, dtype=torch.long), *(hard(item(dataset, i)[1][None]) for i in range(count))])


def hard(labels: Tensor) -> Int[Tensor, " samples"]:
    """The class of every sample; of soft labels ``[samples, classes]`` the likeliest.

    Raises:
        InputError: the labels are neither whole numbers, one a sample, nor vectors of shares.
    """
    if labels.ndim == 1 and not labels.is_floating_point() and not labels.is_complex():
        return labels.long()
    if labels.ndim == 2 and labels.is_floating_point() and labels.shape[1] > 1:
        return labels.argmax(1)
    raise InputError(
        f"a label must be a whole number or a vector with a share for each class, not {labels.dtype} of shape "
        f"{list(labels.shape[1:])}. Have the dataset give the number of the class: int(label)."
    )


def labels_offered(dataset: Dataset) -> Int[Tensor, " samples"] | None:
    """All labels, if the dataset is known to offer them without decoding images. The ``targets`` or ``labels`` of a
    dataset of the user's may be other than what its items have; torchvision's are these, but with a transform of them.
    """
    if isinstance(dataset, TensorDataset) and type(dataset).__getitem__ is TensorDataset.__getitem__:
        return hard(dataset.tensors[1])
    if isinstance(dataset, Subset) and type(dataset).__getitem__ is Subset.__getitem__:
        whole = labels_offered(dataset.dataset)
        return None if whole is None else whole[list(dataset.indices)]
    if type(dataset).__module__.startswith("torchvision.datasets.") and type(dataset).__name__ in _OFFERING:
        return _of_torchvision(dataset)
    return dataset.labels if isinstance(dataset, Labelled) else None  # type: ignore[attr-defined]


def _of_torchvision(dataset: Any) -> Int[Tensor, " samples"] | None:
    """The labels of one of its own datasets; None where a transform may change them."""
    plain = dataset.transforms is None or type(dataset.transforms).__name__ == "StandardTransform"
    if not plain or dataset.target_transform is not None:
        return None
    if hasattr(dataset, "samples"):
        return torch.tensor([label for _, label in dataset.samples], dtype=torch.long)
    return torch.as_tensor(dataset.targets if hasattr(dataset, "targets") else dataset.labels).long()


class _Share(Sampler[list[int]]):
    """Every ``size``-th sample of each batch, from number ``rank`` on; where that is none, the batch's first."""

    def __init__(self, whole: BatchSampler, rank: int, size: int) -> None:
        self.whole, self.rank, self.size = whole, rank, size

    def __len__(self) -> int:
        return len(self.whole)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.whole:
            yield batch[self.rank :: self.size] or batch[:1]


def batches(
    dataset: Dataset,
    batch_size: int,
    shuffle: torch.Generator | None = None,
    workers: int = 0,
    share: tuple[int, int] = (0, 1),
) -> DataLoader:
    """Batches of ``(images, labels)``, in order, or in the order that ``shuffle`` draws.

    With ``workers`` that many processes read images ahead while others are worked on. With a ``share`` of (rank, size)
    every size-th sample of each batch; one sample where that is none.
    """
    sized = check_mapped(dataset)
    order = SequentialSampler(sized) if shuffle is None else RandomSampler(sized, generator=shuffle)
    sampler = _Share(BatchSampler(order, batch_size, drop_last=False), *share)
    return DataLoader(dataset, batch_sampler=sampler, generator=shuffle, num_workers=workers, collate_fn=_collated)


def _collated(items: Sequence[Any]) -> tuple[Float[Tensor, "batch ..."], Tensor]:
    """Items as a batch.

    Raises:
        InputError: one is not an image and a label.
    """
    for each in items:
        if not isinstance(each, tuple | list) or len(each) != 2:
            raise InputError(f"an item of the data must be an image and a label, not {_kind(each)}.")
    images = [torch.as_tensor(image) if isinstance(image, np.ndarray) else image for image, _ in items]
    for image in images:
        if not isinstance(image, Tensor) or not image.is_floating_point():
            raise InputError(
                f"an image must be a tensor of floats, as the model wants it, not {_kind(image)}. Transform it: to "
                "a tensor, then normalised."
            )
        if image.shape != images[0].shape:
            raise InputError(
                f"the images have different shapes: {list(images[0].shape)} and {list(image.shape)}. Resize them."
            )
    labels = [_label(label) for _, label in items]
    if len({each.shape for each in labels}) > 1:
        raise InputError("some labels are classes and others vectors of shares. Have the dataset give one kind.")
    stacked = torch.stack(labels)
    hard(stacked)
    return torch.stack(images), stacked


def _label(label: Any) -> Tensor:
    try:
        return torch.as_tensor(label)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"a label must be a whole number or a vector with a share for each class, not {_kind(label)}. Have the "
            "dataset give the number of the class."
        ) from error


def _kind(value: Any) -> str:
    """What a value is, for people."""
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def digests(dataset: Dataset, places: Sequence[int], batch_size: int, workers: int = 0) -> Int[Tensor, " places"]:
    """What the images at some places are known again by, whatever their labels; never 0.

    Two are the same if and only if all pixels are, after the same preprocessing on the same machine.
    """
    return digests_and_labels(dataset, places, batch_size, workers)[0]


def digests_and_labels(
    dataset: Dataset, places: Sequence[int], batch_size: int, workers: int = 0
) -> tuple[Int[Tensor, " places"], Tensor]:
    """``digests``, and the labels of the same images."""
    found, labels = list[int](), list[Tensor]()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing leaves the interpreter to the others
        for images, their in batches(Subset(dataset, places), batch_size, workers=workers) if places else ():
            found += pool.map(_digest, images.cpu())
            labels.append(their)
    return torch.tensor(found, dtype=torch.long), torch.cat(labels) if labels else torch.zeros(0, dtype=torch.long)


def _digest(image: Tensor) -> int:
    pixels = image.contiguous().flatten().view(torch.uint8).numpy().data
    return int.from_bytes(blake2b(pixels, digest_size=_DIGEST).digest(), "little", signed=True) or 1


def checked(images: Tensor) -> Tensor:
    """The batch as it is.

    Raises:
        InputError: a pixel is not finite.
    """
    if not torch.isfinite(images).all():
        raise InputError(f"an image has NaN or infinite pixels ({_place(images)}). Repair or remove it.")
    return images


def finite(logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
    """The logits as they are.

    Raises:
        InputError: one is not finite.
    """
    if not torch.isfinite(logits).all():
        raise InputError(
            f"the network's logits of an image are NaN or infinite ({_place(logits)}), so nothing can be said of it. "
            "Remove the image, or mend the network: many divide by something that is 0 for an image of one colour."
        )
    return logits


def _place(batch: Tensor) -> str:
    """Of the first that is not finite."""
    return f"number {int((~torch.isfinite(batch)).flatten(1).any(1).nonzero()[0])} of its batch"
