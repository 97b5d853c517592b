"""Many models of every kind: can an attacker who knows both distributions tell unlearned from retrained?

    python benchmarks/shadows.py [--models 100] [--methods] [--per-class 20] [--loss cross-entropy]

Of ours the step and the exact head after it are asked; with --methods also what might hide them better (a gain, more
steps, noise), and other methods.

EfficientNet-Lite0 (batch norm and head) on MNIST digits at 48 px. Each of the models is fitted with a seed of its own
(order and head), prepared, and forgets two requests, the same for all: a random tenth, and the twentieth that the first
model has memorised most: of which leaving the image out alone, as the linear prediction has it, lowers the label's
probability most (RULI's choice, by our leave-one-out predictions and without shadow models). As many models are
retrained without each from the same seeds, and as many from others, with which all are compared; the former say what a
retrained model looks like. Log odds of the labels, log p / (1 - p), and accuracy on 200 test digits are kept in
shadows.sqlite under --out, model by model, so an interrupted run goes on; several at once share the work by --part 1/2
and --part 2/2, and the last one to end shows all of it. The last line is JSON.

klom     median and 95th percentile over the forgotten images of KL(margins || retrained margins), in nats, as
         fastntk.metrics.klom has it and as published (which is of use with a hundred models of each kind alone)
u-lira   share of models and images that the attack places rightly
shift    of an image's mean log odds from the retrained models', in their standard deviations: root mean square over
         images; and what the attack places rightly without it, the means moved onto theirs (in the JSON)

Intervals are of 95 %, by the bootstrap: of KLoM's over images, of the share over models and images. Sources:
Georgiev et al. 2024 (arXiv 2410.23232), Hayes et al. 2024 (arXiv 2403.01218), whose models differ in their training
data too, here in their seeds alone; Naderloui et al. 2025 for the choice (RULI, arXiv 2506.13009).
"""

import argparse
import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastntk.metrics import accuracy, klom, log_odds, published_klom, ulira
from pretrained import fingerprint
from rich.console import Console
from rich.table import Table
from scipy.stats import bootstrap
from torch import Tensor, nn
from torch.utils.data import Subset

import fastntk
from fastntk import methods
from fastntk.common.files import writable
from fastntk.common.machine import settle
from fastntk.common.progress import track
from fastntk.evidence.auditing import left_out
from fastntk.evidence.methods.retrain import retrained
from fastntk.evidence.requests import drawn
from fastntk.inputs.batches import Labelled, labels_of
from fastntk.inputs.packaged import digits, pretrained
from fastntk.jacobians.products import lift, pull
from fastntk.tuning.outputs import logits_of, model_at
from fastntk.tuning.parameters import tuned
from fastntk.tuning.recipe import Recipe


@dataclass(frozen=True)
class Noised:
    """``FastNTK``'s step with noise ``b = sigma (sum_R J_i'L_i n_i + sqrt(ridge) n)`` in the objective that is solved
    over R, ``L_i L_i'`` the loss's Hessian at ``theta*``: the answer's covariance is ``sigma^2 (G_R + ridge I)^-1`` to
    first order, as certified removal has it (Golatkar et al. 2020, arXiv 2003.02960; Guo et al. 2020, 1911.03030)."""

    scale: float

    def __call__(self, problem: methods.Problem) -> methods.Unlearned:
        """Answer the request with a pass over what stays, and two solves."""
        state, draw = problem.state, torch.Generator().manual_seed(problem.recipe.seed)
        network, gone = state.network, problem.positions

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=state.vector.dtype)

        batches = network.one_pass(problem.staying.tolist())
        pulled = pull(network, ((x, lift(network, x, normal(len(x), network.classes))) for x, _ in batches))
        noise = self.scale * (pulled + state.ridge**0.5 * normal(len(state.vector)))
        step = state.resolve(gone, state.displacement - noise / state.ridge, state.ridge)
        return methods.Unlearned(state.moved_by(step - state.resolve(gone[:0], state.displacement, state.ridge)))


UNLEARNING: dict[str, methods.Method] = {
    "fast_ntk": methods.FastNTK(),
    "fast_ntk_exact_head": methods.FastNTK(exact_head=True),
}
METHODS: dict[str, methods.Method] = {
    "fast_ntk, exact head, gain 1.5": methods.FastNTK(exact_head=True, gain=1.5),
    "fast_ntk, more steps": methods.Iterated(),
    **{f"fast_ntk, noise {scale}": Noised(scale) for scale in (0.03, 0.1, 0.3)},
    "golatkar": methods.Golatkar(),
    "newton": methods.Newton(),
    "head_alone": methods.HeadAlone(),
    "fine_tune": methods.FineTune(),
    "l1_sparse": methods.FineTune(sparsity=1e-4),
    "gradient_ascent": methods.GradientAscent(),
    "neg_grad_plus": methods.GradientAscent(retained_share=0.95),
    "random_label": methods.RandomLabel(rate=0.3),
    "salun": methods.RandomLabel(saliency=0.5, rate=0.3),
    "scrub": methods.Scrub(rate=0.2),
    "bad_teacher": methods.BadTeacher(rate=0.5),
    "delete": methods.Delete(),
    "fisher": methods.FisherForgetting(),
    "ssd": methods.Dampening(threshold=0.3),
}
"""Each with the settings that benchmarks/grid chose for this network, on 1,000 of these digits (first seed)."""
LOSSES = {"squared": fastntk.SquaredLoss(), "cross-entropy": fastntk.CrossEntropy()}
MEMORISED = 0.05
"""The share of the images that is taken."""
TEST_PER_CLASS = 20
DRAWS = 2000


class Kept:
    """What is known of models, by name, in one file; all of a ``keep`` is written or nothing."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        with self._open() as database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS kept (key TEXT, name TEXT, value TEXT, PRIMARY KEY (key, name))"
            )

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=60)

    def __getitem__(self, name: str) -> Any:
        """What is kept under a name, or None."""
        with self._open() as database:
            row = database.execute("SELECT value FROM kept WHERE (key, name) = (?, ?)", (self.key, name)).fetchone()
        return None if row is None else json.loads(row[0])

    def keep(self, values: dict[str, Any]) -> None:
        """All of them, or none."""
        with self._open() as database:
            rows = [(self.key, name, json.dumps(value)) for name, value in values.items()]
            database.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?, ?)", rows)


class Case:
    """The images, the requests, and the models of every seed."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        _, self.train, self.test = self.opened(0)
        key = fingerprint(len(self.train), len(self.test), vars(self.recipe(0)), arguments.size)
        self.kept = Kept(writable(arguments.out) / "shadows.sqlite", key)
        self.requests: dict[str, list] = {
            "random": drawn("random 10%", self.train, self.train)[0],
            "memorised": self.memorised(),
        }

    def opened(self, seed: int) -> tuple[nn.Module, Labelled, Labelled]:
        """A network that is not fitted yet, and the images for training and for testing."""
        model, preprocessing = pretrained(seed, size=self.arguments.size)
        fastntk.tune(model, "bn", "head")
        count = self.arguments.per_class
        return model, digits(preprocessing, 0, count), digits(preprocessing, 500 - TEST_PER_CLASS, 500)

    def recipe(self, seed: int) -> Recipe:
        """How every model is fitted."""
        return Recipe(epochs=self.arguments.epochs, seed=seed, loss=LOSSES[self.arguments.loss])

    def memory(self, seed: int) -> fastntk.Memory:
        """Of the model of a seed, fitted to all images."""
        model, train, _ = self.opened(seed)
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

    def make(self, seed: int, kinds: Sequence[str]) -> None:
        """What is known of every kind of model of a seed after each request: the log odds of the forgotten images'
        labels, and accuracy on test images. What is there already is not made again."""
        pairs = [(request, kind) for request in self.requests for kind in kinds]
        if not (missing := [pair for pair in pairs if self.kept[_name(seed, *pair)] is None]):
            return
        model = self.opened(seed)[0]
        initial = fastntk.snapshot(tuned(model))
        memory = cache(partial(self.memory, seed))  # made once, where one is asked for
        found = {}
        for request, kind in missing:
            ids = self.requests[request]
            if kind == "retrain":
                staying = sorted(set(range(len(self.train))) - set(ids))
                parameters = retrained(model, initial, Subset(self.train, staying), self.recipe(seed))[0]
            elif kind == "original":
                parameters = memory().anchor
            else:
                problem = methods.Problem(memory(), ids, self.recipe(seed))
                parameters = {**UNLEARNING, **METHODS}[kind](problem).parameters
            answer, gone = model_at(model, parameters), Subset(self.train, ids)
            found[_name(seed, request, kind)] = {
                "log_odds": log_odds(logits_of(answer, gone, "cpu"), labels_of(gone)).tolist(),
                "test": accuracy(logits_of(answer, self.test, "cpu"), labels_of(self.test)),
            }
        self.kept.keep(found)

    def stacked(self, seeds: Iterable[int], request: str, kind: str) -> tuple[Tensor, float] | None:
        """``[models, images]`` log odds, and mean accuracy; None where some models are not made yet."""
        found = [self.kept[_name(seed, request, kind)] for seed in seeds]
        if None in found:
            return None
        return torch.tensor([each["log_odds"] for each in found]), float(np.mean([each["test"] for each in found]))


def _name(seed: int, request: str, kind: str) -> str:
    return f"{seed} {request} {kind}"


def compared(ours: Tensor, retrained: Tensor, test: float) -> dict[str, float | list[float]]:
    """Both measures of a kind of model beside retrained ones, ``[models, images]`` each."""
    right, shift = 100 * ulira(ours, retrained).numpy(), ours.mean(0) - retrained.mean(0)
    return {
        **over_images("klom", klom(ours, retrained)),
        **over_images("published_klom", published_klom(ours, retrained)),
        "ulira": float(right.mean()),
        "ulira_interval": over_both(right, len(ours)),
        "shift": float((shift / retrained.std(0)).square().mean().sqrt()),
        "ulira_without_shift": 100 * float(ulira(ours - shift, retrained).mean()),
        "test": test,
    }


def over_images(name: str, values: Tensor) -> dict[str, float | list[float]]:
    """Median and 95th percentile of an image's values, each with its interval."""
    found: dict[str, float | list[float]] = {}
    for part, share in (("median", 0.5), ("95", 0.95)):
        statistic = partial(np.quantile, q=share)
        ends = bootstrap((values.numpy(),), statistic, method="percentile", rng=np.random.default_rng(0))
        found[f"{name}_{part}"] = float(statistic(values.numpy()))
        found[f"{name}_{part}_interval"] = [float(end) for end in ends.confidence_interval]
    return found


def over_both(right: np.ndarray, ours: int) -> list[float]:
    """The 95 % interval of a mean over models, the first of them ours, and images: both are drawn anew, as all images
    share the models. Where both kinds were the same it held 50 in 99 % of 200 divisions of retrained models."""
    draw, (models, images) = np.random.default_rng(0), right.shape
    means = []
    for _ in range(DRAWS):
        kinds = draw.integers(0, ours, ours), draw.integers(ours, models, models - ours)
        means.append(right[np.concatenate(kinds)][:, draw.integers(0, images, images)].mean())
    return [float(end) for end in np.percentile(means, (2.5, 97.5))]


def table(results: dict[str, dict]) -> Table:
    """For people."""
    shown = Table("models", *_COLUMNS, "test %")
    for name, found in results.items():
        figures = [
            "{:.2f} ({:.2f} to {:.2f})".format(found[each], *found[f"{each}_interval"]) for each in _COLUMNS.values()
        ]
        shown.add_row(name, *figures, f"{found['test']:.1f}")
    return shown


_COLUMNS = {
    "KLoM median": "klom_median",
    "95th percentile": "klom_95",
    "published median": "published_klom_median",
    "95th": "published_klom_95",
    "U-LiRA %": "ulira",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=16, help="of every kind")
    parser.add_argument("--methods", action="store_true", help="other methods too")
    parser.add_argument("--per-class", type=int, default=20, help="training images of each class")
    parser.add_argument("--epochs", type=int, default=12, help="of every fit")
    parser.add_argument("--size", type=int, default=48, help="side of the images in pixels")
    parser.add_argument("--loss", choices=LOSSES, default="cross-entropy")
    parser.add_argument("--part", default="1/1", help="of the models, for several processes at once")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="where it is kept")
    arguments = parser.parse_args()
    settle()
    case, count = Case(arguments), arguments.models
    kinds = ["retrain", "original", *UNLEARNING, *(METHODS if arguments.methods else ())]
    part, parts = map(int, arguments.part.split("/"))
    for seed in track(range(part - 1, count, parts), "unlearned and retrained"):
        case.make(seed, kinds)
        case.make(count + seed, ["retrain"])
    results = {}
    for request in case.requests:
        others = case.stacked(range(count, 2 * count), request, "retrain")
        for kind in kinds:
            ours = case.stacked(range(count), request, kind)
            if ours is None or others is None:
                Console().print("Another part is not made yet; the last one to end shows all of it.")
                return
            results[f"{request} {kind}"] = compared(ours[0], others[0], ours[1])
    Console(width=150).print(table(results))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
