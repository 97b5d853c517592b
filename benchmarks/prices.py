"""What preparing a memory costs beside one retraining, in every cell of the grid: each in a process of its own.

    python benchmarks/inputs.py --cifar10 cifar10.npz --eurosat eurosat.npz     once
    python benchmarks/prices.py [--only TEXT]

A cell is a model of benchmarks/grid with its data and a loss; it is fitted as the grid says, with the first seed.
Seconds over those of twelve epochs of that fit: *ratio*, of preparing; *first*, of what the first request then waits
for beside its own time; *ten*, *tenth*, of requests for ten images and for a tenth of them. GiB: what preparing takes
at its peak beyond what the process holds. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from memories import automatic
from rich.console import Console
from rich.table import Table
from timing import in_own_process

import fastntk
from fastntk.common.machine import peak_memory, settle
from fastntk.evidence.bench.config import Config, Setting, read_config
from fastntk.evidence.bench.grid import opened

GRID = Path(__file__).parent / "grid"
CONFIGURATIONS = ("cifar10", "eurosat", "mnist", "prompts")
EPOCHS = 12  # of the retraining that is compared with


def cells() -> Iterator[tuple[str, Config, Setting]]:
    """Every fitted model of the grid with its first seed."""
    for name in CONFIGURATIONS:
        config = read_config(GRID / f"{name}.yaml")
        for setting in config.settings():
            if setting.seed == config.seeds[0]:
                yield f"{setting.data}, {setting.model}, {setting.per_class}, {setting.loss}", config, setting


def one(config: Config, setting: Setting) -> dict[str, Any]:
    """Fit, prepare and ask, in this process."""
    settle()
    model, train, _ = opened(config, setting, "cpu")
    recipe = config.fitting(setting)
    fit = fastntk.fit(model, train, recipe=recipe)
    retraining = fit.seconds * EPOCHS / recipe.epochs
    started = time.perf_counter()
    with peak_memory(torch.device("cpu")) as peak:
        memory = fastntk.prepare(model, train, fit.initial, loss=recipe.loss, shrinkage=fit.shrinkage)
    prepared = time.perf_counter() - started
    first = memory.ready()
    requests = {"ten": memory.ids[5:15], "tenth": memory.ids[::10]}
    seconds = {name: memory.preview(ids).seconds for name, ids in requests.items()}
    return {
        "form": memory.form,
        "prepare": prepared,
        "retrain": retraining,
        "ratio": prepared / retraining,
        "first": first / retraining,
        **{name: each / retraining for name, each in seconds.items()},
        "gib": peak.bytes / 2**30,
        "ridge_factor": automatic(memory).factor,
        "inexactness": memory.state.solution.inexactness(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cells whose name has this in it")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    known = {name: (config, setting) for name, config, setting in cells()}
    if arguments.one:
        print(json.dumps(one(*known[arguments.one])))
        return
    rows: list[dict[str, Any]] = []
    table = Table(
        "cell", "form", "prepare s", "retrain s", "ratio", "first", "ten", "tenth", "GiB", "ridge", "inexactness"
    )
    for name in (each for each in known if arguments.only in each):
        rows.append({"cell": name, **in_own_process(__file__, "--one", name)})
        print(json.dumps(rows[-1]), flush=True)
        table.add_row(*(each if isinstance(each, str) else f"{each:.3g}" for each in rows[-1].values()))
    Console(width=140).print(table)
    ratios = [row["ratio"] for row in rows]
    print(json.dumps({"cells": rows, "median": statistics.median(ratios), "largest": max(ratios)}))


if __name__ == "__main__":
    main()
