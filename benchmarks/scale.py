"""Preparing a memory for more and more images: its memory must not grow, its time only in proportion.

    python benchmarks/scale.py [--full] [--samples 500 1000 2000] [--repeats 3]
    python benchmarks/scale.py --case vit_b_32 --samples 50 200 --repeats 1 --planned 5000 50000

ResNet-18, batch norm tuned (p = 9,600), images of 64 px; or ViT-B/32 (88M parameters), ten prompts and head tuned
(p = 15,370), images of 224 px. Random weights, random images enlarged from CIFAR's size, 10 classes, primal form. Every
number of images runs in a process of its own. ``--full`` goes on to 5,000 and 50,000 images, once each; 50,000 take
most of an hour. ``--planned`` says what fastntk.plan expects of so many, without doing it.

memory_growth  peak resident memory of the process at the largest number of images over that at the smallest
time_growth    time of the pass (Jacobians and sums) per image, at the largest over the smallest
time_estimate  what fastntk.plan said of the time of everything, over what was then measured
memory_estimate the same of the peak memory, beyond what the process held before it planned

Medians over the repeats. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from networks import moved, randomise
from rich.console import Console
from rich.table import Table
from timing import in_own_process, peak_bytes
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastntk import SquaredLoss, plan, prepare
from fastntk.inputs.libraries import torchvision
from fastntk.solve import primal
from fastntk.solve.collect import collect_sums
from fastntk.tuning.selectors import tune

CLASSES, LOSS = 10, SquaredLoss()
CASES = {"resnet18": (("bn",), 64), "vit_b_32": (("prompt:10", "head"), 224)}
"""What is tuned, and the side of the images."""


class Images(Dataset):
    """Random images, each made when it is asked for."""

    def __init__(self, count: int, side: int, classes: int = CLASSES) -> None:
        self.count, self.side, self.classes = count, side, classes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(index))
        return F.interpolate(pixels, size=self.side, mode="bilinear")[0], index % self.classes


def _timed(work: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        started = time.perf_counter()
        result = work(*arguments)
        seconds.append(time.perf_counter() - started)
        return result

    return run


def problem(case: str, samples: int) -> tuple[nn.Module, Images]:
    """The network, away from trivial values, and its images."""
    torch.manual_seed(0)
    select, side = CASES[case]
    model = getattr(torchvision().models, case)(num_classes=CLASSES).eval()
    randomise(model)
    tune(model, *select)
    return model, Images(samples, side)


def one(case: str, samples: int) -> dict[str, float]:
    """Plan and prepare, in this process."""
    model, train = problem(case, samples)
    initial = moved(model)
    before = psutil.Process().memory_info().rss
    planned = plan(model, train, form="primal", loss=LOSS)
    passes: list[float] = []
    primal.collect_sums = _timed(collect_sums, passes)  # type: ignore[attr-defined]
    started = time.perf_counter()
    prepare(model, train, initial, form="primal", loss=LOSS)
    seconds = time.perf_counter() - started
    peak = peak_bytes()
    return {
        "samples": samples,
        "seconds": seconds,
        "pass_seconds": passes[0],
        "peak_bytes": peak,
        "time_estimate": planned.total_seconds / seconds,
        "memory_estimate": planned.bytes / (peak - before),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[500, 1000, 2000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--case", choices=list(CASES), default="resnet18")
    parser.add_argument("--planned", type=int, nargs="*", default=[])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.case, arguments.one)))
        return
    jobs = [samples for _ in range(arguments.repeats) for samples in arguments.samples]
    runs: dict[int, list[dict[str, float]]] = {}
    for samples in jobs + ([5000, 50000] if arguments.full else []):
        runs.setdefault(samples, []).append(in_own_process(__file__, "--case", arguments.case, "--one", samples))
        print(json.dumps(runs[samples][-1]), flush=True)
    rows = [{key: statistics.median(run[key] for run in each) for key in each[0]} for each in runs.values()]
    table = Table("images", "seconds", "of it the pass", "peak GB", "plan / time", "plan / memory")
    for row in rows:
        figures = row["seconds"], row["pass_seconds"], row["peak_bytes"] / 1e9
        estimates = row["time_estimate"], row["memory_estimate"]
        table.add_row(f"{row['samples']:,.0f}", *(f"{each:.2f}" for each in (*figures, *estimates)))
    Console(width=100).print(table)
    expected = {
        samples: plan(*problem(arguments.case, samples), form="primal", loss=LOSS) for samples in arguments.planned
    }
    for planned in expected.values():
        Console(width=100).print(planned.text())
    first, last = rows[0], rows[-1]
    result = {
        "memory_growth": last["peak_bytes"] / first["peak_bytes"],
        "time_growth": last["pass_seconds"] / last["samples"] / (first["pass_seconds"] / first["samples"]),
        "time_estimate": [row["time_estimate"] for row in rows],
        "memory_estimate": [row["memory_estimate"] for row in rows],
        "seconds": {f"{row['samples']:.0f}": row["seconds"] for row in rows},
        "planned_seconds": {samples: planned.total_seconds for samples, planned in expected.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
