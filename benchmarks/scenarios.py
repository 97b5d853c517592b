"""The two requests that benchmarks on real images make: a whole class, and a random tenth."""

from collections.abc import Iterator
from pathlib import Path

from fastntk.methods import Method
from torch.utils.data import Dataset

from fastntk.evidence.bench.stored import StoredAnswer
from fastntk.evidence.compare import references
from fastntk.evidence.requests import drawn
from fastntk.inputs.ids import Id


def scenarios(
    train: Dataset, test: Dataset, seed: int = 0, forgotten_class: int = 0
) -> Iterator[tuple[str, list[Id], Dataset]]:
    """Name, the ids of the samples to forget, and the test images: those of the class are left out with it."""
    yield "class", *drawn("class", train, test, gone=forgotten_class)
    yield "random", *drawn("random 10%", train, test, seed)


def stored_references(seed: int, folder: Path, scenario: str, key: str) -> dict[str, Method]:
    """The two retrained models, kept in ``folder``."""
    files = {row: folder / f"{scenario}-{row}.safetensors" for row in references(seed)}
    return {row: StoredAnswer(method, files[row], key) for row, method in references(seed).items()}
