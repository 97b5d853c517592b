"""Ways to answer under cross-entropy, without a retrained model: to mend a random tenth, which is removed somewhat too
little; every ridge; and memories that were prepared from less than is known.

    python benchmarks/ways.py --data cifar10.npz [--only mobilenet_v2-plain] [--request class] [--ridges] [--starts]

On the fits of cross_entropy.py (kept under --out; made where they are missing), beside its four retrained models: the
ratio in probabilities, the accuracy on the forgotten images and on test images, and the mean probability of the label.

step              as it is; "head": with the exact head
gain, left out    multiplied so that members left out one by one are as sure of their labels as test images
ridge X           of the kernel's mean diagonal (--ridges)
chord             solved once more with the network's own outputs where the step led, and the Jacobians of before: what
                  the curvature along the step adds, to all orders
head's ridge      the head pulled at c times as strongly as the rest
asked             solved once more, with the forgotten asked to have what the linear prediction foresaw for them

--starts: prepared from a start that is rebuilt, with the head at zero or where it is now; without regard to weight
decay toward zero; and with two views of each image, flipped and cropped.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import mean

import torch
from cross_entropy import SETTINGS
from fastntk.metrics import accuracy, label_probability, probability_distance
from fits import Case, opened
from memories import rows_held
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset

import fastntk
from fastntk.common.machine import settle
from fastntk.evidence.auditing import left_out
from fastntk.inputs.batches import labels_of
from fastntk.jacobians.rows import Point
from fastntk.memory.finish import multiplied
from fastntk.memory.members import Members
from fastntk.memory.memory import Memory
from fastntk.solve.convex import Convex
from fastntk.solve.head import convex_shortfall
from fastntk.solve.newton import DualProblem, NewtonMethod
from fastntk.tuning.loss import contrasts, kept_of
from fastntk.tuning.outputs import logits_of, model_at
from fastntk.tuning.rebuilding import rebuilt_start

FACTORS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
HEADS = (0.1, 10.0)


def at_ridge(memory: Memory, ridge: float) -> Memory:
    """The same memory under another ridge."""
    state, known = memory.state, rows_held(memory)
    solution = replace(known.ready(), ridge=ridge).anew(state.network)
    center = state.layout.head_of(state.center)
    short = convex_shortfall(state.network, state.positions.tolist(), center, ridge)
    return Memory(replace(state, solution=solution, head_shortfall=short))


class Ways:
    """A request, and every way to answer it."""

    def __init__(self, case: Case, request: str, ridges: bool, starts: bool) -> None:
        self.case, self.memory, self.request = case, case.prepared(), request
        self.ridges, self.starts = ridges, starts
        self.ids, self.test = next((ids, test) for name, ids, test in case.requests() if name == request)
        self.gone = self.memory.state.members.positions(self.ids)
        self.labels = labels_of(Members(case.train, self.ids))
        self.models = case.retrained(request, self.ids)

    def logits(self, parameters: dict[str, Tensor], data: Dataset) -> Tensor:
        return logits_of(model_at(self.case.model, parameters), data, "cpu")

    def row(self, name: str, parameters: dict[str, Tensor]) -> dict[str, object]:
        """An answer beside the retrained models."""
        forgotten, test_labels = Members(self.case.train, self.ids), labels_of(self.test)
        theirs, ours = [self.logits(each, forgotten) for each in self.models], self.logits(parameters, forgotten)
        floor = mean(probability_distance(a, b) for a, b in combinations(theirs, 2))
        return {
            "case": str(self.case.setting),
            "request": self.request,
            "way": name,
            "forget": accuracy(ours, self.labels),
            "forget_retrained": mean(accuracy(each, self.labels) for each in theirs),
            "sure": label_probability(ours, self.labels),
            "sure_retrained": mean(label_probability(each, self.labels) for each in theirs),
            "test": accuracy(self.logits(parameters, self.test), test_labels),
            "ratio": mean(probability_distance(ours, each) for each in theirs) / floor,
        }

    def rows(self) -> Iterator[dict[str, object]]:
        """All ways, the best of them with the exact head too."""
        memory = self.memory
        step = memory.preview(self.ids).parameters
        yield self.row("original", memory.anchor)
        yield from self.with_head("step", memory, step)
        gain = fastntk.left_out_gain(memory, self.test)
        yield from self.with_head(f"gain, left out: {gain:.2f}", memory, multiplied(memory.state, step, gain))
        if self.ridges:
            yield from self.of_ridges()
        if self.starts:
            yield from self.of_starts()
        yield from self.with_head("chord", memory, self.again(step, asked=False))
        yield from self.with_head("asked", memory, self.again(step, asked=True))
        for c in HEADS:
            yield from self.with_head(f"head's ridge times {c:g}", memory, self.other_head(c))

    def of_ridges(self) -> Iterator[dict[str, object]]:
        """What every ridge does."""
        scale = float(rows_held(self.memory).optimum.kernel.diagonal().mean())
        gaps = {}
        for factor in FACTORS:
            other = at_ridge(self.memory, factor * scale)
            gaps[factor] = abs(self.gap_of_left_out(other))
            yield from self.with_head(f"ridge {factor:g}", other, other.preview(self.ids).parameters)
        print(f"left out, the ridge is {min(gaps, key=gaps.__getitem__):g}")

    def of_starts(self) -> Iterator[dict[str, object]]:
        """What memories answer that were prepared otherwise."""
        case, fit = self.case, self.case.fit
        pretrained = {**case.model.state_dict(), **fit.initial}
        views = fastntk.Views(case.train, ["flip", "crop"], 2)
        ways = {
            "head from zero": (case.train, rebuilt_start(case.model, pretrained).initial, fit.shrinkage),
            "head as fitted": (case.train, rebuilt_start(case.model, pretrained, head="fitted").initial, fit.shrinkage),
            "no shrinkage": (case.train, fit.initial, 1.0),
            "two views": (views, fit.initial, fit.shrinkage),
        }
        for name, (data, initial, left) in ways.items():
            memory = fastntk.prepare(case.model, data, initial, loss=fit.recipe.loss, shrinkage=left)
            ids = views.of(self.ids) if data is views else self.ids
            yield self.row(name, memory.preview(ids).parameters)
            headed = fastntk.finished(memory, memory.preview(ids).parameters, exact_head=True, without=ids)
            yield self.row(f"{name}, head", headed)

    def with_head(self, name: str, memory: Memory, parameters: dict[str, Tensor]) -> Iterator[dict[str, object]]:
        yield self.row(name, parameters)
        headed = fastntk.finished(memory, parameters, exact_head=True, without=self.ids)
        yield self.row(f"{name}, head", headed)

    def gap_of_left_out(self, memory: Memory) -> float:
        """How much surer of their labels members left out one by one are than test images."""
        state = memory.state
        known = label_probability(left_out(state, state.positions), labels_of(self.case.train))
        return known - label_probability(self.logits(memory.anchor, self.test), labels_of(self.test))

    def again(self, step: dict[str, Tensor], asked: bool) -> dict[str, Tensor]:
        """Solved once more at the outputs that the step led to, with the Jacobians of before."""
        state, solution = self.memory.state, rows_held(self.memory)
        rows, loss, classes = solution.rows, solution.loss, solution.rows.jacobian.kept
        if classes is None:
            raise TypeError("this is for a loss that curves, by some classes")
        before, after = (self.logits(each, self.case.train).double() for each in (state.anchor, step))
        change = state.layout.flatten(step) - state.layout.flatten(state.anchor)
        foreseen = rows.jacobian.matvec(change) @ contrasts(classes.shape[1]).T
        moved = after.clone().scatter(1, classes, after.gather(1, classes) - foreseen)
        labels = torch.nn.functional.one_hot(labels_of(self.case.train), before.shape[1]).double()
        if asked:
            predicted = before.scatter_add(1, classes, foreseen).softmax(1)
            labels[self.gone] = predicted[self.gone]
        kept = kept_of(loss, moved, labels, classes)
        z = moved.gather(1, classes) @ contrasts(classes.shape[1])
        there = replace(rows, point=Point(z, kept))
        present = torch.ones(len(rows), dtype=torch.bool)
        present[self.gone] = asked
        start = z - there.jacobian.matvec(solution.displacement)
        problem = DualProblem(loss, kept, start, solution.optimum.kernel, solution.ridge, present)
        a, _ = NewtonMethod().minimise(problem, solution.optimum.coefficients, solution.tolerance)
        found = rows.jacobian.rmatvec(a.view_as(rows.residual)) - solution.displacement
        return state.moved_by(found - solution.step)

    def other_head(self, c: float) -> dict[str, Tensor]:
        """With the head pulled at ``c`` times as strongly: as if its inputs were ``c^-1/2`` as large."""
        state, known = self.memory.state, rows_held(self.memory)
        size, s = known.rows.jacobian.rest.shape[2], c**-0.5
        scaled = replace(known.rows.jacobian, features=known.rows.jacobian.features * s)
        rows, u = replace(known.rows, jacobian=scaled), known.displacement.clone()
        u[size:] /= s
        solution = Convex(rows, known.loss, u, known.ridge, known.over)
        change = solution.update(state.network, self.gone, -1).change
        change[size:] *= s
        return state.moved_by(change)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 as .npz")
    parser.add_argument("--only", default="mobilenet_v2-plain-10x100", help="settings whose name has this in it")
    parser.add_argument("--request", default="tenth", choices=["class", "tenth", "hundredth"])
    parser.add_argument("--ridges", action="store_true", help="and what every ridge does")
    parser.add_argument("--starts", action="store_true", help="and memories prepared from less")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="where fits are kept")
    arguments = parser.parse_args()
    arguments.requests = arguments.request
    settle()
    found: list[dict[str, object]] = []
    for setting in SETTINGS:
        if arguments.only in str(setting) and setting.classes == 10:
            columns = ("way", "forget", "retrained", "sure", "retrained", "test", "ratio")
            table = Table(*columns, title=f"{setting}, {arguments.request}")
            asked = arguments.request, arguments.ridges, arguments.starts
            for row in Ways(opened(setting, arguments), *asked).rows():
                found.append(row)
                numbers = [f"{row[key]:.1f}" for key in ("forget", "forget_retrained")]
                numbers += [f"{row[key]:.2f}" for key in ("sure", "sure_retrained")]
                table.add_row(str(row["way"]), *numbers, f"{row['test']:.1f}", f"{row['ratio']:.3f}")
            Console(width=120).print(table)
    print(json.dumps({"rows": found}))


if __name__ == "__main__":
    main()
