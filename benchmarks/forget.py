"""Deletion requests against a memory in a folder: seconds until durable, beside retraining and beside a fresh pass.

    python benchmarks/forget.py [--samples 2000] [--epochs 12] [--requests 100]
    python benchmarks/forget.py --growth [--samples 500 5000]

ResNet-18 with random weights at 64 px, 10 classes, batch norm and head tuned (p = 14,730), random images. The model is
fitted, the memory prepared and saved to a folder on disk; a request is timed by the wall from the call until the new
weights are synced to disk, its certificate included; the file system is the one that holds the temporary folder.

seconds_1, _10, _100  medians of requests for so many samples
purge_seconds         rewriting the folder without a trace of them, median
over_retrain          fitting anew without the ten samples, the same recipe, over seconds_10
over_recompute        preparing anew on the retained data, at the same ridge, and taking the step, over seconds_10
relative_error        after the ``--requests`` requests, to a float64 solve from the stored sums: of the step
order_error           between two random orders of the same requests: of the parameters' change
requests_growth       median of the last ten of these requests over that of the first ten
samples_growth        with --growth: seconds_10 of the largest memory over that of the smallest, which take turns

The last line is JSON.
"""

import argparse
import copy
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from networks import moved, randomise
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import Subset, TensorDataset

import fastntk
from fastntk.inputs.libraries import torchvision
from fastntk.memory.memory import Memory
from fastntk.tuning.selectors import tune

LOSS = fastntk.SquaredLoss()

CLASSES, SIDE = 10, 64


def problem(samples: int) -> tuple[nn.Module, TensorDataset]:
    """The network before fitting, and its images."""
    torch.manual_seed(0)
    model = torchvision().models.resnet18(num_classes=CLASSES).eval()
    randomise(model)
    tune(model, "bn", "head")
    return model, TensorDataset(torch.randn(samples, 3, SIDE, SIDE), torch.arange(samples) % CLASSES)


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def answered(memory: Memory, requests: Iterable[list[int]]) -> list[float]:
    """Seconds until each answer was durable, as it says itself."""
    return [memory.forget(ids).seconds for ids in requests]


def requests(memory: Memory, count: int, folder: Path) -> dict[str, float]:
    """Requests of one, ten and a hundred samples to the memory, kept in a folder, and the first in another order."""
    samples = len(memory.ids)
    ids = torch.randperm(samples, generator=torch.Generator().manual_seed(1)).tolist()
    memory.save(folder)
    copied = shutil.copytree(folder, folder.with_name(f"{folder.name}-other"))
    other = fastntk.load(copied, memory.model, memory.state.members.source)
    ones = [[i] for i in ids[:count]]
    each = answered(memory, ones)
    purges, error = [memory.purge()], memory.state.error()
    answered(other, [ones[k] for k in torch.randperm(count).tolist()])
    vectors = [m.state.vector for m in (memory, other)]  # in float64
    order = float((vectors[0] - vectors[1]).norm() / (vectors[0] - memory.state.layout.flatten(memory.anchor)).norm())
    tens = answered(memory, [ids[count + 10 * k : count + 10 * k + 10] for k in range(5)])
    purges.append(memory.purge())
    hundreds = answered(memory, [ids[count + 50 + 100 * k : count + 150 + 100 * k] for k in range(3)])
    purges.append(memory.purge())
    return {
        "seconds_1": statistics.median(each),
        "seconds_10": statistics.median(tens),
        "seconds_100": statistics.median(hundreds),
        "purge_seconds": statistics.median(purges),
        "relative_error": error,
        "order_error": order,
        "requests_growth": statistics.median(each[-10:]) / statistics.median(each[:10]),
    }


def main_figures(samples: int, epochs: int, count: int, folder: Path) -> dict[str, float]:
    """Everything but the growth with the number of samples."""
    model, train = problem(samples)
    start = copy.deepcopy(model.state_dict())
    fitted = fastntk.fit(model, train, epochs=epochs, loss=LOSS)
    started = time.perf_counter()
    memory = fastntk.prepare(model, train, fitted.initial, form="primal", loss=LOSS)
    prepared = time.perf_counter() - started
    ridge = memory.ridge
    figures = requests(memory, count, folder)
    keep = Subset(train, range(10, samples))
    again = timed(lambda: fastntk.prepare(model, keep, fitted.initial, form="primal", ridge=ridge, loss=LOSS))
    model.load_state_dict(start)
    retrained = timed(lambda: fastntk.fit(model, keep, epochs=epochs, loss=LOSS))
    return {
        **figures,
        "over_retrain": retrained / figures["seconds_10"],
        "over_recompute": again / figures["seconds_10"],
        "prepare_seconds": prepared,
        "retrain_seconds": retrained,
        "recompute_seconds": again,
        "folder_bytes": sum(path.stat().st_size for path in folder.iterdir()),
    }


def growth(sizes: list[int], folder: Path) -> dict[str, float]:
    """The same requests to memories of few and of many samples, in turn."""
    memories = []
    for samples in sizes:
        model, train = problem(samples)
        initial = moved(model)
        memories.append(fastntk.prepare(model, train, initial, form="primal", loss=LOSS))
        memories[-1].save(folder / str(samples))
    for memory in memories:
        memory.forget([0])
    times = [answered(memory, [list(range(start, start + 10))]) for start in range(1, 71, 10) for memory in memories]
    each = {size: [t[0] for t in times[place :: len(sizes)]] for place, size in enumerate(sizes)}
    ratios = [last / first for first, last in zip(each[sizes[0]], each[sizes[-1]], strict=True)]
    return {
        "samples_growth": statistics.median(ratios),
        **{f"seconds_10_of_{size}": statistics.median(each[size]) for size in sizes},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--growth", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if arguments.growth:
            figures = growth(arguments.samples or [500, 5000], Path(name))
        else:
            samples = (arguments.samples or [2000])[0]
            figures = main_figures(samples, arguments.epochs, arguments.requests, Path(name))
    table = Table("figure", "value")
    for key, value in figures.items():
        table.add_row(key, f"{value:.3g}")
    Console().print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
