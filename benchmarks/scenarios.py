"""The two requests that benchmarks on real images make: a whole class, and a random tenth."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from fastntk.bench.stored import Stored
from fastntk.comparison import references
from fastntk.data import labels_of
from fastntk.methods import Method


def scenarios(
    train: Dataset, test: Dataset, seed: int = 0, forgotten_class: int = 0
) -> Iterator[tuple[str, Tensor, Dataset]]:
    """Name, the samples to forget, and the test images: those of the class are left out with it."""
    labels = labels_of(train)
    staying = (labels_of(test) != forgotten_class).nonzero()[:, 0].tolist()
    yield "class", (labels == forgotten_class).nonzero()[:, 0], Subset(test, staying)
    tenth = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[: len(labels) // 10]
    yield "random", tenth.sort().values, test


def stored_references(seed: int, folder: Path, scenario: str, key: str) -> dict[str, Method]:
    """The two retrained models, kept in ``folder``."""
    return {
        row: Stored(method, folder / f"{scenario}-{row}.safetensors", key) for row, method in references(seed).items()
    }
