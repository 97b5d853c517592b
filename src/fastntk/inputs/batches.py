"""Batches of any map-style dataset of ``(image, label)``."""

from collections.abc import Iterator

import torch
from jaxtyping import Int
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


def labels_of(dataset: Dataset) -> Int[Tensor, " samples"]:
    """The classes of all samples, without decoding images where the dataset offers them."""
    known, count = labels_offered(dataset), len(dataset)  # type: ignore[arg-type]
    if known is not None:
        return known
    return torch.cat([hard(torch.as_tensor(dataset[i][1])[None]) for i in range(count)])


def hard(labels: Tensor) -> Int[Tensor, " samples"]:
    """The class of every sample; of soft labels ``[samples, classes]`` the likeliest."""
    return labels.argmax(1) if labels.ndim == 2 else labels.long()


def labels_offered(dataset: Dataset) -> Int[Tensor, " samples"] | None:
    """All labels, if the dataset is known to offer them without decoding images: as ``labels``, a tensor of whole
    numbers. What a dataset of the user's makes of its ``targets`` may be something else.
    """
    if isinstance(dataset, TensorDataset):
        return hard(dataset.tensors[1])
    if isinstance(dataset, Subset):
        whole = labels_offered(dataset.dataset)
        return None if whole is None else whole[list(dataset.indices)]
    known = getattr(dataset, "labels", None)
    if not isinstance(known, Tensor) or known.ndim != 1 or known.is_floating_point():
        return None
    return known.long()


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
    order = SequentialSampler(dataset) if shuffle is None else RandomSampler(dataset, generator=shuffle)  # type: ignore[arg-type]
    sampler = _Share(BatchSampler(order, batch_size, drop_last=False), *share)
    return DataLoader(dataset, batch_sampler=sampler, generator=shuffle, num_workers=workers)


def checked(images: Tensor) -> Tensor:
    """The batch as it is.

    Raises:
        InputError: a pixel is not finite.
    """
    if not torch.isfinite(images).all():
        place = int((~torch.isfinite(images)).flatten(1).any(1).nonzero()[0])
        raise InputError(f"an image has NaN or infinite pixels (number {place} of its batch). Repair or remove it.")
    return images
