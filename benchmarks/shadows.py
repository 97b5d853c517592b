"""Many models of every kind: can an attacker who knows both distributions tell unlearned from retrained?

    python benchmarks/shadows.py [--models 100] [--per-class 20] [--loss cross-entropy] [--out runs/benchmarks]

EfficientNet-Lite0 (batch norm and head) on MNIST digits at 48 px. Each of the models is fitted with a seed of its own
(order and head), prepared, and forgets two requests, the same for all: a random tenth, and the twentieth that the first
model has memorised most: of which leaving the image out alone, as the linear prediction has it, lowers the label's
probability most (RULI's choice, by our leave-one-out predictions and without shadow models). As many models are
retrained without each from the same seeds, and as many from others, with which all are compared; the former say what a
retrained model looks like. Log odds of the labels, log p / (1 - p), are kept in shadows.sqlite under --out, model by
model, so an interrupted run goes on; several at once share the work by --part 1/2 and --part 2/2, and the last one
to end shows all of it. The last line is JSON.

klom     median and 95th percentile over the forgotten images of KL(margins || retrained margins), in nats, as
         fastntk.metrics.klom has it and as published (which is of use with a hundred models of each kind alone)
u-lira   share of models and images that the attack places rightly

Intervals are of 95 %, of the median and the share, by the bootstrap over images. Sources: Georgiev et al. 2024
(arXiv 2410.23232), Hayes et al. 2024 (arXiv 2403.01218), Naderloui et al. 2025 for the choice (RULI, arXiv 2506.13009).
"""

import argparse
import json
import sqlite3
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from fastntk.methods import FastNTK, Problem
from fastntk.metrics import klom, log_odds, published_klom, ulira
from pretrained import fingerprint
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

import fastntk
from fastntk.common.files import writable
from fastntk.common.machine import settle
from fastntk.common.progress import track
from fastntk.evidence.auditing import left_out
from fastntk.evidence.bench.summary import interval
from fastntk.evidence.methods.retrain import retrained
from fastntk.evidence.requests import drawn
from fastntk.inputs.batches import labels_of
from fastntk.inputs.packaged import digits, pretrained
from fastntk.tuning.outputs import logits_of, model_at
from fastntk.tuning.parameters import tuned
from fastntk.tuning.recipe import Recipe

UNLEARNING = {"fast_ntk": FastNTK(), "fast_ntk_exact_head": FastNTK(exact_head=True)}
LOSSES = {"squared": fastntk.SquaredLoss(), "cross-entropy": fastntk.CrossEntropy()}
MEMORISED = 0.05
"""The share of the images that is taken."""


class Kept:
    """Lists of numbers by name, in one file; any of them is written whole or not at all."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        with self._open() as database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS kept (key TEXT, name TEXT, value TEXT, PRIMARY KEY (key, name))"
            )

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=60)

    def __getitem__(self, name: str) -> list | None:
        """What is kept under a name, or None."""
        with self._open() as database:
            row = database.execute("SELECT value FROM kept WHERE (key, name) = (?, ?)", (self.key, name)).fetchone()
        return None if row is None else json.loads(row[0])

    def keep(self, values: dict[str, list]) -> None:
        """All of them, or none."""
        with self._open() as database:
            rows = [(self.key, name, json.dumps(value)) for name, value in values.items()]
            database.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?, ?)", rows)


class Case:
    """The images, the requests, and the models of every seed."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.train = self.opened(0)[1]
        key = fingerprint(len(self.train), vars(self.recipe(0)), arguments.size)
        self.kept = Kept(writable(arguments.out) / "shadows.sqlite", key)
        self.requests = {"random": drawn("random 10%", self.train, self.train)[0], "memorised": self.memorised()}

    def opened(self, seed: int) -> tuple[nn.Module, Dataset]:
        """A network that is not fitted yet, and the images."""
        model, preprocessing = pretrained(seed, size=self.arguments.size)
        fastntk.tune(model, "bn", "head")
        return model, digits(preprocessing, 0, self.arguments.per_class)

    def recipe(self, seed: int) -> Recipe:
        """How every model is fitted."""
        return Recipe(epochs=self.arguments.epochs, seed=seed, loss=LOSSES[self.arguments.loss])

    def memory(self, seed: int) -> fastntk.Memory:
        """Of the model of a seed, fitted to all images."""
        model, train = self.opened(seed)
        fitted = fastntk.fit(model, train, self.recipe(seed))
        return fastntk.prepare(model, train, fitted.initial, loss=fitted.recipe.loss)

    def memorised(self) -> list[int]:
        """The ids of images whose label's probability falls most where it alone is left out of the first model."""
        if (known := self.kept["memorised"]) is not None:
            return known
        memory, labels = self.memory(0), labels_of(self.train)
        alone = left_out(memory.state, memory.state.positions).cpu()
        fitted = logits_of(model_at(memory.model, memory.anchor), self.train, "cpu")
        falls = [each.double().softmax(1).gather(1, labels[:, None])[:, 0] for each in (fitted, alone)]
        most = (falls[0] - falls[1]).topk(round(MEMORISED * len(labels))).indices.sort().values.tolist()
        self.kept.keep({"memorised": most})
        return most

    def names(self, seed: int, unlearned: bool) -> dict[str, str]:
        """What a seed's numbers are kept under, by request and kind of model."""
        kinds = ("retrain", "original", *UNLEARNING) if unlearned else ("retrain",)
        return {f"{request} {kind}": f"{seed} {request} {kind}" for request in self.requests for kind in kinds}

    def make(self, seed: int, unlearned: bool) -> None:
        """The log odds of the forgotten images' labels by every kind of model of a seed, if they are not there."""
        names = self.names(seed, unlearned)
        if all(self.kept[name] is not None for name in names.values()):
            return
        model, train = self.opened(seed)
        initial, memory, found = fastntk.snapshot(tuned(model)), self.memory(seed) if unlearned else None, {}
        for request, ids in self.requests.items():
            staying = sorted(set(range(len(train))) - set(ids))
            answers = {"retrain": retrained(model, initial, Subset(train, staying), self.recipe(seed))[0]}
            if memory:
                problem = Problem(memory, ids, self.recipe(seed))
                answers |= {name: method(problem).parameters for name, method in UNLEARNING.items()}
                answers["original"] = memory.anchor
            gone = Subset(train, ids)
            for kind, parameters in answers.items():
                odds = log_odds(logits_of(model_at(model, parameters), gone, "cpu"), labels_of(gone))
                found[names[f"{request} {kind}"]] = odds.tolist()
        self.kept.keep(found)

    def stacked(self, seeds: Iterable[int], unlearned: bool) -> dict[str, Tensor] | None:
        """``[models, images]`` by request and kind; None where some are not made yet."""
        found: dict[str, list[list[float]]] = {}
        for seed in seeds:
            for label, name in self.names(seed, unlearned).items():
                if (values := self.kept[name]) is None:
                    return None
                found.setdefault(label, []).append(values)
        return {label: torch.tensor(values) for label, values in found.items()}


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


def table(results: dict[str, dict]) -> Table:
    """For people."""
    shown = Table("models", "KLoM median", "95 % interval", "95th percentile", "published", "U-LiRA %", "95 % interval")
    for name, found in results.items():
        ranges = ["–" if found[each] is None else "{:.2f} to {:.2f}".format(*found[each]) for each in _INTERVALS]
        published = f"{found['published_klom_median']:.2f}, {found['published_klom_95']:.2f}"
        klom_figures = f"{found['klom_median']:.2f}", ranges[0], f"{found['klom_95']:.2f}"
        shown.add_row(name, *klom_figures, published, f"{found['ulira']:.1f}", ranges[1])
    return shown


_INTERVALS = "klom_interval", "ulira_interval"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=16, help="of every kind")
    parser.add_argument("--per-class", type=int, default=20, help="training images of each class")
    parser.add_argument("--epochs", type=int, default=12, help="of every fit")
    parser.add_argument("--size", type=int, default=48, help="side of the images in pixels")
    parser.add_argument("--loss", choices=LOSSES, default="cross-entropy")
    parser.add_argument("--part", default="1/1", help="of the models, for several processes at once")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="where log odds are kept")
    arguments = parser.parse_args()
    settle()
    case, count = Case(arguments), arguments.models
    part, parts = map(int, arguments.part.split("/"))
    for seed in track(range(part - 1, count, parts), "unlearned and retrained"):
        case.make(seed, True)
        case.make(count + seed, False)
    ours, others = case.stacked(range(count), True), case.stacked(range(count, 2 * count), False)
    if ours is None or others is None:
        Console().print("Another part is not made yet; the last one to end shows all of it.")
        return
    results = {label: compared(values, others[f"{label.split()[0]} retrain"]) for label, values in ours.items()}
    Console(width=140).print(table(results))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
