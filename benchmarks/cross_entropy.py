"""Models fitted with cross-entropy: the convex form's answers beside four retrained models, and what they cost.

    python benchmarks/cross_entropy.py --quick --data cifar10.npz         MobileNetV2, plain and smoothed, one head
    python benchmarks/cross_entropy.py --data cifar10.npz [--many cifar100.npz] [--heads 3]

The .npz hold x_train, y_train, x_test, y_test. Batch norms (ViT: ten prompts) and the head are tuned, 12 epochs of
Adam at 1e-3. A cell is a model, a loss, a head and a request: a class, a random tenth, a random hundredth. ratio is the
mean distance on the forgotten images to the four retrained models over the mean over their six pairs, in probabilities
and in logits; forget and test are accuracies, those of the retrained models means. Fits and answers are kept under
--out, so a run that was cut off goes on. Seconds are of this machine, one after the other. The last line is JSON.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean

import torch
from fastntk.metrics import accuracy, logit_distance, probability_distance
from pretrained import cifar10, fingerprint, mobilenet_v2, vit_s14
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import Dataset

import fastntk
from fastntk.common.files import read_tensors, writable, write_tensors
from fastntk.common.machine import settle
from fastntk.evidence.bench.stored import fitted
from fastntk.evidence.methods import FineTune, Golatkar, Problem, RandomLabel, Retrain
from fastntk.evidence.requests import drawn
from fastntk.inputs.batches import labels_of
from fastntk.inputs.images import Preprocessing
from fastntk.inputs.packaged import pretrained
from fastntk.tuning.fitting import Fit
from fastntk.tuning.loss import CrossEntropy
from fastntk.tuning.outputs import logits_of, model_at
from fastntk.tuning.recipe import Recipe

Make = Callable[[int], tuple[nn.Module, Preprocessing]]
MODELS: dict[str, tuple[Make, tuple[str, ...]]] = {
    "mobilenet_v2": (lambda seed: mobilenet_v2(64, seed), ("bn", "head")),
    "efficientnet_lite0": (lambda seed: pretrained(seed, size=64), ("bn", "head")),
    "vit_s14": (lambda seed: vit_s14(56, seed), ("prompt:10", "head")),
}
LOSSES = {"plain": CrossEntropy(), "smoothed": CrossEntropy(smoothing=0.1)}
REQUESTS = {"class": "class", "tenth": "random 10%", "hundredth": "random 1%"}
RETRAINED = 4


@dataclass(frozen=True)
class Case:
    """A fitted model and its memory."""

    name: str
    loss: str
    head: int
    train: Dataset
    test: Dataset
    fit: Fit
    memory: fastntk.Memory
    prepare_seconds: float
    folder: Path
    key: str


def opened(name: str, loss: str, head: int, arguments: argparse.Namespace) -> Case:
    """Fit, or take the fit from before, and prepare."""
    make, select = MODELS[name]
    model, preprocessing = make(head)
    train, test = cifar10(arguments.data, preprocessing, arguments.per_class)
    fastntk.tune(model, *select)
    recipe = Recipe(epochs=12, seed=head, loss=LOSSES[loss])
    key = fingerprint(preprocessing, select, arguments.per_class, recipe)
    folder = writable(arguments.out / "fits" / f"{name}-{loss}-{head}-{key}")
    fit = fitted(model, train, recipe, folder / "original.safetensors", key)
    started = time.perf_counter()
    memory = fastntk.prepare(model, train, fit.initial, loss=recipe.loss)
    return Case(name, loss, head, train, test, fit, memory, time.perf_counter() - started, folder, key)


def kept(case: Case, name: str, make: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], float]:
    """Parameters and seconds that were stored, or are made and stored."""
    path = case.folder / f"{name}.safetensors"
    if path.exists():
        tensors, record = read_tensors(path)
        return tensors, record["seconds"]
    started = time.perf_counter()
    tensors = make()
    seconds = time.perf_counter() - started
    write_tensors(path, tensors, {"key": case.key, "seconds": seconds})
    return tensors, seconds


def answers(case: Case, problem: Problem, request: str, others: bool) -> dict[str, tuple[dict[str, Tensor], float]]:
    """Every row but the retrained models, with seconds."""
    memory, found = case.memory, {"original": (case.memory.anchor, 0.0)}
    started = time.perf_counter()
    stepped = memory.preview(problem.forget).parameters
    found["step"] = stepped, time.perf_counter() - started
    headed = fastntk.finished(memory, stepped, exact_head=True, without=problem.forget)
    found["step and exact head"] = headed, time.perf_counter() - started
    rate = case.fit.recipe.learning_rate
    methods = (
        {"fine-tuning": FineTune(epochs=2, learning_rate=rate), "salun": RandomLabel(0.5, 2, rate)} if others else {}
    )
    for name, method in methods.items():
        found[name] = kept(case, f"{request}-{name}", lambda method=method: method(problem).parameters)
    return found


def one_step(case: Case) -> fastntk.Memory:
    """The memory of before: one Gauss-Newton step over all classes."""
    return fastntk.prepare(case.memory.model, case.train, case.fit.initial, loss=LOSSES[case.loss], form="dual")


def cells(case: Case, arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    """All rows of a fitted model."""
    old = None if arguments.quick else one_step(case)
    for request, drawing in REQUESTS.items():
        forget, held_out = drawn(drawing, case.train, case.test, case.head, gone=case.head)
        problem = Problem(case.memory, forget, case.fit.recipe)
        retrained = [
            kept(case, f"{request}-retrained-{k}", lambda k=k, problem=problem: Retrain(100 + k)(problem).parameters)
            for k in range(RETRAINED)
        ]
        found = answers(case, problem, request, not arguments.quick)
        if old:
            there = Problem(old, forget, case.fit.recipe)
            found["one step"] = old.preview(forget).parameters, 0.0
            found["golatkar, trapezium"] = Golatkar(trapezium=True)(there).parameters, 0.0
        yield from compared(case, problem, request, held_out, retrained, found)


def compared(
    case: Case,
    problem: Problem,
    request: str,
    test: Dataset,
    retrained: list[tuple[dict[str, Tensor], float]],
    found: dict[str, tuple[dict[str, Tensor], float]],
) -> Iterator[dict[str, object]]:
    """A request's rows beside the retrained models."""

    def logits(parameters: dict[str, Tensor], data: Dataset) -> Tensor:
        return logits_of(model_at(problem.model, parameters), data, "cpu")

    labels, test_labels = labels_of(problem.forgotten), labels_of(test)
    gone = [logits(parameters, problem.forgotten) for parameters, _ in retrained]
    unseen = [logits(parameters, test) for parameters, _ in retrained]
    floors = {d: mean(d(a, b) for a, b in combinations(gone, 2)) for d in (probability_distance, logit_distance)}
    seconds = mean(each for _, each in retrained)
    verdict = case.memory.preview(problem.forget).certificate.verdict
    for method, (parameters, taken) in found.items():
        ours = logits(parameters, problem.forgotten)
        ratios = {d: mean(d(ours, each) for each in gone) / floor for d, floor in floors.items()}
        yield {
            "model": case.name,
            "loss": case.loss,
            "head": case.head,
            "classes": case.memory.state.network.classes,
            "kept": case.memory.state.network.keep,
            "images": len(problem.state.positions),
            "request": request,
            "method": method,
            "forget": accuracy(ours, labels),
            "forget_retrained": mean(accuracy(each, labels) for each in gone),
            "test": accuracy(logits(parameters, test), test_labels),
            "test_retrained": mean(accuracy(each, test_labels) for each in unseen),
            "ratio_probabilities": ratios[probability_distance],
            "ratio_logits": ratios[logit_distance],
            "prepare_over_retrain": case.prepare_seconds / seconds,
            "request_over_retrain": taken / seconds,
            "ridge_factor": case.memory.calibration.factor,
            "verdict": verdict if method.startswith("step") else None,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 as .npz")
    parser.add_argument("--quick", action="store_true", help="MobileNetV2, one head, ours alone")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES))
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--per-class", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="where fits and answers are kept")
    arguments = parser.parse_args()
    settle()
    torch.set_num_threads(torch.get_num_threads())
    rows: list[dict[str, object]] = []
    columns = ("model", "loss", "head", "request", "method", "forget", "forget_retrained", "test", "test_retrained")
    figures = ("ratio_probabilities", "ratio_logits", "prepare_over_retrain", "request_over_retrain")
    for name in ["mobilenet_v2"] if arguments.quick else arguments.models:
        for loss in arguments.losses:
            for head in range(arguments.heads):
                made = list(cells(opened(name, loss, head, arguments), arguments))
                rows += made
                print(json.dumps(made), flush=True)
    table = Table(*columns, *figures, "verdict")
    for row in rows:
        numbers = [f"{row[key]:.1f}" for key in columns[5:]] + [f"{row[key]:.2f}" for key in figures]
        table.add_row(*(str(row[key]) for key in columns[:5]), *numbers, str(row["verdict"] or ""))
    Console(width=190).print(table)
    print(json.dumps({"cells": rows}))


if __name__ == "__main__":
    main()
