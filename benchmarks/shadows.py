"""Many models of every kind: can an attacker who knows both distributions tell unlearned from retrained?

    python benchmarks/shadows.py [--models 16] [--per-class 20] [--out runs/benchmarks]

EfficientNet-Lite0 (batch norm and head) on MNIST digits at 48 px. Each of the models is fitted with a seed of its own
(order and head), prepared, and forgets the same random tenth; as many are retrained without it from the same seeds, and
as many from others, which are the floor. Their log odds of the labels, log p / (1 - p), are kept under --out, so an
interrupted run goes on. The last line is JSON.

klom     median and 95th percentile over the forgotten images of KL(margins || retrained margins), in nats, as
         fastntk.metrics.klom has it and as published (which is of use with a hundred models of each kind alone)
u-lira   share of models and images that the attack places rightly

Intervals are of 95 %, of the median and the share, by the bootstrap over images.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from fastntk.methods import FastNTK, Problem
from fastntk.metrics import klom, log_odds, published_klom, ulira
from pretrained import fingerprint
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import Subset

import fastntk
from fastntk.common.files import read_tensors, writable, write_tensors
from fastntk.common.machine import settle
from fastntk.common.progress import track
from fastntk.evidence.bench.summary import interval
from fastntk.evidence.methods.retrain import retrained
from fastntk.evidence.requests import drawn
from fastntk.inputs.batches import labels_of
from fastntk.inputs.packaged import digits, pretrained
from fastntk.tuning.outputs import logits_of, model_at
from fastntk.tuning.parameters import tuned
from fastntk.tuning.recipe import Recipe

UNLEARNING = {"fast_ntk": FastNTK(), "fast_ntk_exact_head": FastNTK(exact_head=True)}


def of_seed(seed: int, unlearned: bool, arguments: argparse.Namespace) -> dict[str, Tensor]:
    """The log odds of the forgotten images' labels, by kind of model."""
    model, preprocessing = pretrained(seed)
    train = digits(preprocessing, 0, arguments.per_class)
    fastntk.tune(model, "bn", "head")
    recipe = Recipe(epochs=arguments.epochs, seed=seed, loss=fastntk.SquaredLoss())
    key = fingerprint("log odds", preprocessing, arguments.per_class, recipe, unlearned)
    path = writable(arguments.out / "shadows") / f"{key}.safetensors"
    if path.exists():
        return read_tensors(path)[0]
    count = len(train)
    forget, _ = drawn("random 10%", train, train)
    staying = torch.arange(count)[~torch.isin(torch.arange(count), torch.tensor(forget))]
    initial, gone = fastntk.snapshot(tuned(model)), Subset(train, forget)
    answers = {"retrain": retrained(model, initial, Subset(train, staying.tolist()), recipe)[0]}
    if unlearned:
        fastntk.fit(model, train, recipe)
        memory = fastntk.prepare(model, train, initial, loss=recipe.loss)
        problem = Problem(memory, forget, recipe)
        answers |= {name: method(problem).parameters for name, method in UNLEARNING.items()}
        answers["original"] = memory.anchor
    found = {
        name: log_odds(logits_of(model_at(model, parameters), gone, "cpu"), labels_of(gone))
        for name, parameters in answers.items()
    }
    write_tensors(path, found)
    return found


def compared(ours: Tensor, retrained: Tensor) -> dict[str, float | list[float] | None]:
    """Both measures of a kind of model beside retrained ones, ``[models, images]`` each."""
    divergence, right = klom(ours, retrained), 100 * ulira(ours, retrained).mean(0)
    published = published_klom(ours, retrained)
    return {
        "klom_median": float(np.median(divergence)),
        "klom_interval": interval(divergence.tolist(), np.median),
        "klom_95": float(divergence.quantile(0.95)),
        "published_klom_median": float(published.median()),
        "published_klom_95": float(published.quantile(0.95)),
        "ulira": float(right.mean()),
        "ulira_interval": interval(right.tolist(), np.mean),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=16, help="of every kind")
    parser.add_argument("--per-class", type=int, default=20, help="training images of each class")
    parser.add_argument("--epochs", type=int, default=12, help="of every fit")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="where margins are kept")
    arguments = parser.parse_args()
    settle()
    count = arguments.models
    ours = [of_seed(seed, True, arguments) for seed in track(range(count), "unlearned")]
    others = [of_seed(seed, False, arguments) for seed in track(range(count, 2 * count), "retrained")]
    reference = torch.stack([each["retrain"] for each in others])
    results = {name: compared(torch.stack([each[name] for each in ours]), reference) for name in ours[0]}
    table = Table("models", "KLoM median, nats", "95 % interval", "95th percentile", "U-LiRA %", "95 % interval")
    for name, found in results.items():
        klom_range = "{:.2f} to {:.2f}".format(*found["klom_interval"])
        ulira_range = "{:.1f} to {:.1f}".format(*found["ulira_interval"])
        klom_figures = f"{found['klom_median']:.2f}", klom_range, f"{found['klom_95']:.2f}"
        table.add_row(name, *klom_figures, f"{found['ulira']:.1f}", ulira_range)
    Console().print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
