"""Eight rules for choosing the ridge, each from the fitted model alone, against what is best in hindsight.

    python benchmarks/ridge.py --data cifar10.npz [--models mobilenet_v2 efficientnet_lite0 vit_s14]

mobilenet_v2 (batch norm and head, CIFAR-10 at 128 px), efficientnet_lite0 (batch norm and head, the demo's digits) and
vit_s14 (ten prompts and head, CIFAR-10 at 112 px; needs the package onnx). Fits are kept under --out. Prints a table a
model of what every ridge does, one of what every rule chooses, then one line of JSON.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from fastntk.methods import FastNTK, Problem
from memories import automatic, rows_held
from pretrained import cifar, fingerprint, mobilenet_v2, vit_s14
from rich.console import Console
from rich.table import Table
from scenarios import scenarios, stored_references
from torch import Tensor

import fastntk
from fastntk.common.files import writable
from fastntk.common.machine import settle
from fastntk.evidence.bench.stored import fitted
from fastntk.evidence.compare import compare
from fastntk.inputs.packaged import digits, pretrained
from fastntk.memory.memory import Memory
from fastntk.tuning.recipe import Recipe

FACTORS = torch.logspace(-2.5, 1, 71, dtype=torch.float64)
JUDGED = (0.01, 0.03, 0.1, 0.15, 0.2, 0.3, 0.6, 1.0)
MODELS = {
    "mobilenet_v2": (lambda: mobilenet_v2(128), ("bn", "head"), ("class", "random")),
    "efficientnet_lite0": (pretrained, ("bn", "head"), ("class", "random")),
    "vit_s14": (lambda: vit_s14(112), ("prompt:10", "head"), ("class",)),
}


@dataclass(frozen=True)
class Spectrum:
    """The linear problem in the eigenvectors of the kernel: ``K = V diag(values) V'``."""

    values: Tensor
    vectors: Tensor
    target: Tensor  # V'(r + J u)
    image: Tensor  # V'J u
    residual: Tensor  # V'r
    pull: float  # |u|^2
    classes: int

    @classmethod
    def of(cls, memory: Memory) -> "Spectrum":
        rows, u = rows_held(memory).rows, memory.state.displacement
        values, vectors = torch.linalg.eigh(rows_held(memory).optimum.kernel)
        residual, image = rows.residual.double().flatten(), rows.jacobian.matvec(u).flatten()
        target, image, residual = (vectors.T @ part for part in (residual + image, image, residual))
        return cls(values.clamp_min(0), vectors, target, image, residual, float(u @ u), rows.residual.shape[1])


def relative_optimality(s: Spectrum, ridge: float) -> float:
    """``min F / F(theta*)``: the trained parameters' objective is nearest to its least, in proportion."""
    least = ridge * (s.target.square() / (s.values + ridge)).sum()
    return float(least / (s.residual.square().sum() + ridge * s.pull))


def shortest_step(s: Spectrum, ridge: float) -> float:
    """``-|s(D)|``: the trained parameters are nearest to their own predicted optimum."""
    a = s.target / (s.values + ridge)
    return -float((a.square() * s.values).sum() - 2 * (a * s.image).sum() + s.pull)


def least_squares_stationarity(s: Spectrum, ridge: float) -> float:
    """``-|b_D - ridge u|``: the gradient at the trained parameters is nearest to zero, at ``u'b_D / u'u``."""
    best = float(s.image @ s.residual) / s.pull
    return -abs(ridge - best)


def residual_match(s: Spectrum, ridge: float) -> float:
    """The linear optimum leaves the training residual that the network has."""
    left = (ridge * s.target / (s.values + ridge)).square().sum()
    return -abs(float(left.log() - s.residual.square().sum().log()))


def leave_one_out(s: Spectrum, ridge: float) -> float:
    """PRESS: the anchored ridge's squared error on each sample left out, from the inverse's C x C blocks."""
    weighted = (s.vectors / (s.values + ridge).sqrt()).view(-1, s.classes, len(s.values))
    blocks = torch.cat([part @ part.mT for part in weighted.split(200)])
    a = (s.vectors @ (s.target / (s.values + ridge))).view(-1, s.classes, 1)
    return -float(torch.linalg.solve(blocks, a).square().sum())


def generalised_cross_validation(s: Spectrum, ridge: float) -> float:
    """The rotation-invariant form of leave-one-out."""
    return -float((s.target / (s.values + ridge)).square().sum() / (1 / (s.values + ridge)).sum() ** 2)


def evidence(s: Spectrum, ridge: float) -> float:
    """The marginal likelihood of the targets, noise level profiled out."""
    noise = (ridge * s.target.square() / (s.values + ridge)).mean()
    return -float(len(s.values) * noise.log() + torch.log1p(s.values / ridge).sum())


def closest_outputs(s: Spectrum, ridge: float) -> float:
    """The rule in use, ``-|J s(D)|``: the linear optimum's training outputs are nearest to the network's."""
    return -float((s.residual - ridge * s.target / (s.values + ridge)).square().sum())


RULES: dict[str, Callable[[Spectrum, float], float]] = {
    rule.__name__: rule
    for rule in (
        closest_outputs,
        shortest_step,
        relative_optimality,
        residual_match,
        least_squares_stationarity,
        leave_one_out,
        generalised_cross_validation,
        evidence,
    )
}


def chosen(memory: Memory) -> dict[str, float]:
    """The factor of the kernel's mean diagonal that every rule takes."""
    spectrum = Spectrum.of(memory)
    scale = float(rows_held(memory).optimum.kernel.diagonal().mean())
    return {
        name: float(FACTORS[torch.tensor([rule(spectrum, float(factor) * scale) for factor in FACTORS]).argmax()])
        for name, rule in RULES.items()
    }


def judged(name: str, arguments: argparse.Namespace) -> tuple[dict[str, float], dict[str, dict]]:
    """What the rules choose for a model, and what the ridges in ``JUDGED`` do, beside retrained models."""
    make, select, wanted = MODELS[name]
    model, preprocessing = make()
    if name == "efficientnet_lite0":
        train, test = digits(preprocessing, 0, 100), digits(preprocessing, 100, 150)
    else:
        train, test = cifar(arguments.data, preprocessing, 60, 30)
    fastntk.tune(model, *select)
    recipe, key = Recipe(loss=fastntk.SquaredLoss()), fingerprint(preprocessing, len(train) // 10, 0)
    out = writable(arguments.out / "fits" / f"{name}-{key}")
    fit = fitted(model, train, recipe, out / "original.safetensors", key)
    memory = fastntk.prepare(model, train, fit.initial, form="dual", loss=recipe.loss)
    scale, reports = memory.ridge / automatic(memory).factor, {}
    for request, forget, held_out in scenarios(train, test, forgotten_class=3 if name == "efficientnet_lite0" else 0):
        if request not in wanted:
            continue
        problem = Problem(memory, forget, recipe)
        kept = stored_references(1, out, request, key)
        ridges = {"automatic": FastNTK()} | {f"{factor:g}": FastNTK(ridge=factor * scale) for factor in JUDGED}
        report, notes = compare(problem, held_out, {**kept, **ridges})
        Console(width=120).print(report.table(f"{name}, {request}"))
        Console(width=120).print("\n".join(f"{row}: {note}" for row, note in notes.items()), "")
        reports[request] = report.rows
    return chosen(memory) | {"prepare": automatic(memory).factor}, reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 as .npz")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="where fits and results are kept")
    arguments = parser.parse_args()
    settle()
    factors = {}
    for name in arguments.models:
        factors[name], reports = judged(name, arguments)
        document = {"factors": factors[name], "reports": reports}
        (arguments.out / f"ridge-{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    table = Table("rule", *factors, title="ridge over the kernel's mean diagonal, as every rule chooses it")
    for rule in next(iter(factors.values())):
        table.add_row(rule, *(f"{factors[name][rule]:.3f}" for name in factors))
    Console().print(table)
    print(json.dumps(factors))


if __name__ == "__main__":
    main()
