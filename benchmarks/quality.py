"""MobileNetV2 (ImageNet backbone) on CIFAR-10, batch norm and head tuned: every ridge, beside retrained models.

    python benchmarks/quality.py --quick --data cifar10.npz      60 images a class at 128 px, one seed
    python benchmarks/quality.py --data cifar10.npz              100 images a class at 128 px, three seeds

The .npz holds x_train, y_train, x_test, y_test. Fits are stored under --out and taken from there when the command is
given again, so an interrupted run goes on. Prints a table, then one line of JSON.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from fastntk.methods import FastNTK, Golatkar, Method, Problem, Unlearned
from memories import automatic
from pretrained import cifar, fingerprint, mobilenet_v2
from rich.console import Console
from scenarios import scenarios, stored_references

import fastntk
from fastntk.common.files import writable
from fastntk.common.machine import settle
from fastntk.evidence.bench.stored import fitted
from fastntk.evidence.compare import compare, references
from fastntk.tuning.recipe import Recipe

FACTORS = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)


@dataclass(frozen=True)
class RetainStepAlone:
    """``theta* + s(R)`` without taking off ``s(D)``."""

    ridge: float

    def __call__(self, problem: Problem) -> Unlearned:
        step = problem.state.resolve(problem.positions, problem.state.displacement, self.ridge)
        return Unlearned(problem.state.moved_by(step))


def methods(scale: float, samples: int) -> dict[str, Method]:
    """Every row but the references; ridges as multiples of the kernel's mean diagonal ``scale``."""
    rows: dict[str, Method] = {"fastntk (automatic ridge)": FastNTK()}
    rows |= {f"fastntk {factor:g}": FastNTK(ridge=factor * scale) for factor in FACTORS}
    for factor in (1e-3, 1e-2, 1e-1):
        decay = factor * scale / samples
        rows[f"golatkar {factor:g}"] = Golatkar(decay)
        rows[f"golatkar_step {factor:g}"] = Golatkar(decay, trapezium=False)
    return rows | {"retain step alone 0.1": RetainStepAlone(0.1 * scale)}


def one_seed(arguments: argparse.Namespace, per_class: int, seed: int) -> dict[str, dict]:
    """Both requests under one seed; prints their tables."""
    model, preprocessing = mobilenet_v2(arguments.size, seed)
    train, test = cifar(arguments.data, preprocessing, per_class)
    key = fingerprint(preprocessing, per_class, seed)
    fits = writable(arguments.out / "fits" / f"mobilenet_v2-{key}")
    fastntk.tune(model, "bn", "head")
    recipe = Recipe(seed=seed, loss=fastntk.SquaredLoss())
    fit = fitted(model, train, recipe, fits / "original.safetensors", key)
    memory = fastntk.prepare(model, train, fit.initial, loss=recipe.loss)
    scale = memory.ridge / automatic(memory).factor
    results = {}
    for name, forget, held_out in scenarios(train, test, seed):
        problem = Problem(memory, forget, recipe)
        stored = stored_references(seed + 1, fits, name, key)
        report, notes = compare(problem, held_out, {**stored, **methods(scale, len(train))}, fit.seconds)
        Console().print(report.table(f"{name}, seed {seed}"))
        Console().print(f"ridge {memory.calibration}\n{notes['fastntk (automatic ridge)']}\n")
        results[name] = {"rows": report.rows, "ridge_factor": automatic(memory).factor, "notes": notes}
    return results


def summary(results: dict[str, dict]) -> dict[str, dict]:
    """The automatic ridge against the best fixed one, and against the retrained models."""
    figures = {}
    for name, result in results.items():
        rows = result["rows"]
        automatic = rows["fastntk (automatic ridge)"]
        best = min(rows[f"fastntk {factor:g}"]["forget_distance"] for factor in FACTORS)
        retrained = [rows[row]["forget_accuracy"] for row in references(1)]
        figures[name] = {
            "ridge_factor": result["ridge_factor"],
            "distance_over_best_fixed": automatic["forget_distance"] / best,
            "forget_accuracy_gap": automatic["forget_accuracy"] - sum(retrained) / len(retrained),
            "distance_over_floor": automatic["forget_distance"] / rows["retrain_2"]["forget_distance"],
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 as .npz")
    parser.add_argument("--quick", action="store_true", help="60 images a class and one seed")
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="where fits and results are kept")
    arguments = parser.parse_args()
    settle()
    target = writable(arguments.out) / f"quality-{'quick' if arguments.quick else 'full'}.json"
    per_class, seeds = (60, 1) if arguments.quick else (100, 3)
    document = {}
    for seed in range(seeds):
        results = one_seed(arguments, per_class, seed)
        document[f"seed {seed}"] = {"scenarios": results, "summary": summary(results)}
        target.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps({seed: entry["summary"] for seed, entry in document.items()}))


if __name__ == "__main__":
    main()
