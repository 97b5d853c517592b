"""What was tried to come nearer to retraining than the one step does, on the fits that families.py leaves.

    python benchmarks/nearer.py --data cifar10.npz --family mobilenet_v2-bn [--out runs/benchmarks]

Distances on what is forgotten are means over the two retrained models, over the distance between these. Variants:

ridge x gain   the step at multiples of the automatic ridge, and multiplied by a gain
metric         |W (theta - theta_0)|^2 in place of |theta - theta_0|^2, at its own automatic ridge: "adam" has W^2 the
               root of the Gauss-Newton diagonal, "moved" the inverse mean square displacement of each tensor
simulated      Adam with the recipe's batches in the linearised model, on R and on D; the difference of the two
exact head     the step, then the head solved anew (fastntk.exact_head), at several ridges of the step
fine-tuned     the step, then an epoch or three over the retained images
damped         after the step with the exact head, Gauss-Newton steps on the anchored objective, each the best of a line
               search with the exact head at every point
shrunk         the step with the exact head, drawn back toward the parameters before fitting, then an epoch
origin         the step with the targets that the network had left to learn at its start, t - f(theta_0), for r + J u
left-out       what the linearised model predicts of images left out one by one, beside what the network does on unseen
               ones: accuracy in percent and root mean square residual
"""

import argparse
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from families import FAMILIES, opened
from fastntk.metrics import accuracy, logit_distance
from rich.console import Console
from rich.table import Table
from scenarios import scenarios, stored_references
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

import fastntk
from fastntk.common.machine import settle
from fastntk.inputs.batches import Labelled, labels_of
from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.per_sample import PerSampleJacobian
from fastntk.jacobians.products import pull
from fastntk.jacobians.rows import rows_of
from fastntk.tuning.fitting import Fit
from fastntk.tuning.outputs import logits_of, model_at
from fastntk.tuning.parameters import snapshot, tuned

FACTORS = torch.logspace(-4, 2, 121, dtype=torch.float64)


@dataclass
class Problem:
    """The linearised model's rows, and what is asked of it."""

    model: nn.Module
    fit: Fit
    linearised: Linearised
    memory: fastntk.Memory
    train: Labelled
    requests: dict[str, tuple[Tensor, Dataset, list[Tensor]]]

    def __post_init__(self) -> None:
        self.rows = self.linearised.rows(range(len(self.train)))
        layout = self.linearised.layout
        self.anchor = layout.flatten(self.linearised.jacobian.parameters)
        self.u = self.anchor - layout.flatten(self.fit.initial)
        self.classes = self.linearised.classes
        self.jacobian = self.rows.jacobian.dense().flatten(0, 1)

    def places(self, forget: Tensor) -> Tensor:
        """The rows of samples."""
        return rows_of(forget, self.classes)

    def judged(self, request: str, vector: Tensor) -> list[str]:
        """Distance over floor on what is forgotten, and accuracies there and on the test images."""
        forget, held_out, references = self.requests[request]
        sets = Subset(self.train, forget.tolist()), held_out
        models = [
            model_at(self.model, self.linearised.layout.unflatten(each, self.fit.initial))
            for each in (vector, *references)
        ]
        gone, one, other = (logits_of(each, sets[0], "cpu") for each in models)
        ratio = (logit_distance(gone, one) + logit_distance(gone, other)) / 2 / logit_distance(one, other)
        test = accuracy(logits_of(models[0], sets[1], "cpu"), labels_of(sets[1]))
        return [f"{ratio:.2f}", f"{accuracy(gone, labels_of(sets[0])):.1f}", f"{test:.1f}"]


@dataclass
class Step:
    """The linear problem with ``|W (theta - theta_0)|^2`` for a penalty, ``inverse`` the diagonal of ``W^-2``."""

    problem: Problem
    inverse: Tensor

    def __post_init__(self) -> None:
        scaled = self.problem.jacobian * self.inverse.sqrt().float()
        kernel = (scaled @ scaled.T).double()
        self.mean = kernel.diagonal().mean()
        self.moved = self.problem.jacobian @ self.problem.u.float()
        self.target = self.problem.rows.residual.double().flatten() + self.moved.double()
        self.values, self.vectors = torch.linalg.eigh(kernel)
        self.rotated = self.vectors.T @ self.target

    def automatic(self) -> float:
        """The factor whose optimum has the outputs nearest to the network's."""

        def miss(factor: Tensor) -> float:
            outputs = self.vectors @ (self.values * self.rotated / (self.values + factor * self.mean))
            return float((outputs - self.moved).norm())

        return float(min(FACTORS, key=miss))

    def solved(self, factor: float) -> tuple[Tensor, Tensor]:
        """``(K + ridge I)^-1`` and it times the target."""
        inverse = (self.vectors / (self.values + factor * self.mean)) @ self.vectors.T
        return inverse, inverse @ self.target

    def change(self, factor: float, forget: Tensor) -> Tensor:
        """``s(R) - s(D)``."""
        inverse, coefficients = self.solved(factor)
        gone = self.problem.places(forget)
        core = torch.linalg.solve(inverse[gone][:, gone], coefficients[gone])
        return self.inverse * (self.problem.jacobian.T @ (-inverse[:, gone] @ core).float()).double()

    def left_out(self, factor: float) -> tuple[float, float]:
        """Accuracy and root mean square residual on every image, by the step that forgets it alone."""
        inverse, coefficients = self.solved(factor)
        blocks = torch.stack([inverse[g][:, g] for g in torch.arange(len(inverse)).split(self.problem.classes)])
        per_image = coefficients.view(len(blocks), -1, 1)
        error = torch.linalg.solve(blocks, per_image)[..., 0] - factor * self.mean * per_image[..., 0]
        residual, labels = self.problem.rows.residual.double(), labels_of(self.problem.train)
        targets = self.problem.linearised.loss.targets(labels, self.problem.classes).double()
        left = residual + error
        return accuracy(targets - left, labels), float(left.square().sum(1).mean().sqrt())


def variants(problem: Problem) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """A name, and the parameters it arrives at for each request."""
    yield "original", dict.fromkeys(problem.requests, problem.anchor)
    ones = torch.ones_like(problem.u)
    plain = Step(problem, ones)
    automatic = plain.automatic()
    for times in (1 / 3, 1, 3):
        for gain in (1.0, 1.2, 1.4, 1.7):
            answers = {
                request: problem.anchor + gain * plain.change(times * automatic, forget)
                for request, (forget, *_) in problem.requests.items()
            }
            yield f"ridge {times * automatic:.3f} x {gain}", answers
    for name, inverse in metrics(problem).items():
        step = Step(problem, inverse)
        factor = step.automatic()
        answers = {r: problem.anchor + step.change(factor, forget) for r, (forget, *_) in problem.requests.items()}
        yield f"metric {name}, ridge {factor:.3f}", answers
    yield from with_head(problem, plain, automatic)
    yield "origin", from_origin(problem, ones)
    whole = simulated(problem, torch.arange(len(problem.train)))
    retained = {request: staying(problem, forget) for request, (forget, *_) in problem.requests.items()}
    yield "simulated", {r: problem.anchor + simulated(problem, keep) - whole for r, keep in retained.items()}
    stepped = {r: problem.anchor + plain.change(automatic, forget) for r, (forget, *_) in problem.requests.items()}
    for rate, epochs in ((1e-4, 1), (3e-4, 1), (1e-3, 1), (1e-3, 3)):
        answers = {r: fine_tuned(problem, each, retained[r], rate, epochs) for r, each in stepped.items()}
        yield f"fine-tuned {epochs} x {rate:g}", answers


def with_head(problem: Problem, plain: Step, automatic: float) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The exact head after the step, and an epoch after that."""
    for times in (1.0, 3.0):
        yield f"exact head, ridge {times * automatic:.3f}", heads_at(problem, plain, times * automatic)
    headed = heads_at(problem, plain, automatic)
    start = problem.anchor - problem.u
    retained = {request: staying(problem, forget) for request, (forget, *_) in problem.requests.items()}
    for share, rate in ((1.0, 3e-4), (0.7, 1e-3)):
        moved = {r: start + share * (each - start) for r, each in headed.items()}
        yield (
            f"exact head, shrunk {share}, fine-tuned 1 x {rate:g}",
            {r: fine_tuned(problem, each, retained[r], rate, 1) for r, each in moved.items()},
        )
    for number in (1, 2, 3):
        headed = {r: damped(problem, each, problem.requests[r][0], retained[r]) for r, each in headed.items()}
        yield f"exact head, damped {number}", headed


def damped(problem: Problem, vector: Tensor, forget: Tensor, keep: Tensor) -> Tensor:
    """One step on ``F_R(theta) - grad F_D(theta*) . theta``, of which ``theta*`` is the optimum with R = D."""
    memory, linearised, layout = problem.memory, problem.linearised, problem.linearised.layout
    start, ridge, everyone = problem.anchor - problem.u, problem.memory.ridge, range(len(problem.train))
    correction = ridge * problem.u - pull(linearised, linearised.residual(everyone))
    loss, labels = linearised.loss, labels_of(problem.train)[keep]

    def objective(theta: Tensor) -> float:
        model = model_at(problem.model, layout.unflatten(theta, problem.fit.initial))
        residual = loss.residual(logits_of(model, Subset(problem.train, keep.tolist()), "cpu"), labels).double()
        pulled = ridge / 2 * (theta - start).square().sum() - correction @ theta
        return float(residual.square().sum() / 2 + pulled)

    parameters = layout.unflatten(vector, problem.fit.initial)
    here = replace(linearised, jacobian=PerSampleJacobian(problem.model, parameters, layout))
    downhill = pull(here, here.residual(keep.tolist())) - ridge * (vector - start) + correction
    # resolve takes a displacement v to (G_R + ridge I)^-1 (b_R - ridge v)
    direction = memory.state.resolve(forget, torch.zeros_like(start), ridge) - memory.state.resolve(
        forget, downhill / ridge, ridge
    )
    trials = [vector]
    for size in (0.05, 0.1, 0.2, 0.4, 0.8):
        moved = layout.unflatten(vector + size * direction, problem.fit.initial)
        trials.append(layout.flatten(fastntk.finished(memory, moved, exact_head=True, without=forget.tolist())))
    return min(trials, key=objective)


def heads_at(problem: Problem, plain: Step, factor: float) -> dict[str, Tensor]:
    """The step at a ridge, then the exact head at the memory's."""
    layout, answers = problem.linearised.layout, {}
    for request, (forget, *_) in problem.requests.items():
        stepped = layout.unflatten(problem.anchor + plain.change(factor, forget), problem.fit.initial)
        exact = fastntk.finished(problem.memory, stepped, exact_head=True, without=forget.tolist())
        answers[request] = layout.flatten(exact)
    return answers


def from_origin(problem: Problem, ones: Tensor) -> dict[str, Tensor]:
    """The step from the outputs that the network really had before fitting."""
    layout, labels = problem.linearised.layout, labels_of(problem.train)
    before = layout.unflatten(problem.anchor - problem.u, problem.fit.initial)
    outputs = logits_of(model_at(problem.model, before), problem.train, "cpu")
    step = Step(problem, ones)
    step.target = (problem.linearised.loss.targets(labels, problem.classes) - outputs).double().flatten()
    step.rotated = step.vectors.T @ step.target
    factor = step.automatic()
    return {r: problem.anchor + step.change(factor, forget) for r, (forget, *_) in problem.requests.items()}


def metrics(problem: Problem) -> dict[str, Tensor]:
    """The diagonals of ``W^-2``, of mean 1."""
    diagonal = problem.jacobian.double().square().sum(0)
    adam = (diagonal / diagonal.mean()).sqrt().clamp_min(1e-3).reciprocal()
    layout = problem.linearised.layout
    moved = {
        name: torch.full_like(tensor, float(tensor.square().mean()))
        for name, tensor in layout.unflatten(problem.u, problem.fit.initial).items()
    }
    return {name: each / each.mean() for name, each in {"adam": adam, "moved": layout.flatten(moved)}.items()}


def staying(problem: Problem, forget: Tensor) -> Tensor:
    everyone = torch.arange(len(problem.train))
    return everyone[~torch.isin(everyone, forget)]


def simulated(problem: Problem, keep: Tensor) -> Tensor:
    """The recipe's Adam on the samples ``keep``, in the linearised model, from the parameters before fitting."""
    recipe, classes = problem.fit.recipe, problem.classes
    start = (problem.anchor - problem.u).float()
    theta, anchor = nn.Parameter(start.clone()), problem.anchor.float()
    optimiser = torch.optim.Adam([theta], lr=recipe.learning_rate)
    generator = torch.Generator().manual_seed(recipe.seed)
    steps = math.ceil(len(keep) / recipe.batch_size) * recipe.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda done: (1 + math.cos(math.pi * done / steps)) / 2)
    blocks = problem.jacobian.view(len(problem.train), classes, -1)
    for _ in range(recipe.epochs):
        for batch in keep[torch.randperm(len(keep), generator=generator)].split(recipe.batch_size):
            residual = problem.rows.residual[batch] + blocks[batch] @ (anchor - theta.detach())
            gradient = -(blocks[batch].flatten(0, 1).T @ residual.flatten()) / len(batch)
            theta.grad = gradient + recipe.weight_decay * (theta.detach() - start)
            optimiser.step()
            schedule.step()
    return theta.detach().double()


def fine_tuned(problem: Problem, vector: Tensor, keep: Tensor, rate: float, epochs: int) -> Tensor:
    layout, model = problem.linearised.layout, copy.deepcopy(problem.model)
    model.load_state_dict(layout.unflatten(vector, problem.fit.initial), strict=False)
    recipe = replace(problem.fit.recipe, learning_rate=rate, epochs=epochs)
    fastntk.fit(model, Subset(problem.train, keep.tolist()), recipe)
    return layout.flatten(snapshot(tuned(model)))


def posed(name: str, arguments: argparse.Namespace) -> tuple[Problem, Dataset]:
    """The linear problem of a family's fits, as families.py left them (or made now), and the test images."""
    model, train, test, fit, folder, key = opened(name, arguments)
    linearised = Linearised(PerSampleJacobian(model, snapshot(tuned(model))), train)
    memory = fastntk.prepare(model, train, fit.initial, loss=fit.recipe.loss)
    requests = {}
    for scenario, forget, held_out in scenarios(train, test):
        asked = fastntk.methods.Problem(memory, forget, fit.recipe)
        found = [method(asked).parameters for method in stored_references(1, folder, scenario, key).values()]
        requests[scenario] = torch.tensor(forget), held_out, [linearised.layout.flatten(each) for each in found]
    return Problem(model, fit, linearised, memory, train, requests), test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 as .npz")
    parser.add_argument("--family", choices=list(FAMILIES), default="mobilenet_v2-bn")
    parser.add_argument("--per-class", type=int, default=60, help="training images of each class")
    parser.add_argument("--epochs", type=int, default=12, help="of every fit")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="where families.py kept its fits")
    arguments = parser.parse_args()
    settle()
    problem, test = posed(arguments.family, arguments)
    console = Console(width=120)
    table = Table(
        "variant", *(f"{request}: {title}" for request in problem.requests for title in ("ratio", "forget %", "test %"))
    )
    for name, answers in variants(problem):
        cells = [cell for request, vector in answers.items() for cell in problem.judged(request, vector)]
        console.print(name, *cells)
        table.add_row(name, *cells)
    console.print(table)
    labels = labels_of(test)
    logits = logits_of(model_at(problem.model, problem.linearised.jacobian.parameters), test, "cpu")
    residual = problem.linearised.loss.residual(logits, labels).square().sum(1).mean().sqrt()
    console.print(f"unseen images: accuracy {accuracy(logits, labels):.1f} %, residual {float(residual):.2f}")
    step = Step(problem, torch.ones_like(problem.u))
    for times in (0.3, 0.6, 1, 2, 3):
        factor = times * step.automatic()
        console.print(
            "left out at ridge {:.3f}: accuracy {:.1f} %, residual {:.2f}".format(factor, *step.left_out(factor))
        )


if __name__ == "__main__":
    main()
