"""What makes the exact fit (fastntk.fit_exact) more accurate: ideas side by side, each on test images.

    python benchmarks/exact_ideas.py --data cifar10.npz --many cifar100.npz [--only mobilenet_v2-20-0]

As in benchmarks/exact.py: 100 images a class, of which the core is a share; accuracy of the network in percent, of the
core alone and after the exact fit. Every idea changes one thing of the first row.

classes         how many classes of a sample rows are kept of
ridge           of the kernel's mean diagonal over the core; with the share of the others that the linear prediction has
                right when each is left out, by which a request could choose it again on what stays
core apart      the core is not in the sum: as a core of other images
linearised      the linearised network in place of the network, at the first row's weights
longer, gentler 60 or 4 epochs on the core
augmented core  40 epochs, flipped and cropped
smoothed        label smoothing 0.1 in both fits
views           flipped and cropped views of the others, two each
last block      all of the last block tuned too, of 3 classes (more would not fit into memory); and after such a core
public core     fitted to 2,000 images of CIFAR-100 (other classes), no image of CIFAR-10 in the core
public then     the core's own images, in the ordinary way or augmented

Rows are kept under --out as they come; the last line is JSON.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from exact import AUGMENTED, NAMES, RECIPE, Case, Setting
from fastntk.metrics import accuracy
from pretrained import fingerprint
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import Subset

import fastntk
from fastntk.common.files import read_json, writable, write_json
from fastntk.common.machine import settle
from fastntk.evidence.auditing import left_out
from fastntk.inputs.batches import labels_of
from fastntk.jacobians.products import tangent
from fastntk.memory.exact import FACTOR, KEPT, fit_exact
from fastntk.memory.members import Members
from fastntk.tuning.outputs import logits_of, model_at

RIDGES = 0.003, 0.01, 0.03, 0.1, 0.3
Row = dict[str, object]


class Tried:
    """A setting, and what is tried on it."""

    def __init__(self, setting: Setting, data: Path, many: Path) -> None:
        self.case, self.many = Case(setting, data, 100), many
        self.base = self.fitted(self.case.model(), RECIPE)

    def fitted(self, model: nn.Module, recipe: fastntk.Recipe) -> nn.Module:
        """To the core."""
        fastntk.fit(model, Subset(self.case.train, self.case.core), recipe)
        return model

    def exact(self, model: nn.Module, recipe: fastntk.Recipe = RECIPE, **more: Any) -> fastntk.Memory:
        """From a model that stands at the core."""
        train = self.case.named([*self.case.core, *self.case.others])
        return fit_exact(model, train, self.case.core, recipe, fitted=True, **more)

    def rows(self) -> Iterator[tuple[str, Callable[[], Row]]]:
        """Every idea and what measures it."""
        yield "as it is", lambda: self.row(self.base, self.exact(self.base))
        for classes in (3, 8, 10):
            yield f"{classes} classes", partial(self.kept, classes)
        for factor in RIDGES:
            yield f"ridge {factor}", partial(self.at_ridge, factor)
        yield "core apart", self.apart
        yield "linearised", self.linearised
        for name, epochs in (("longer", 60), ("gentler", 4)):
            yield name, partial(self.otherwise, replace(RECIPE, epochs=epochs))
        yield "augmented core", partial(self.otherwise, AUGMENTED)
        yield "smoothed", partial(self.otherwise, replace(RECIPE, loss=fastntk.CrossEntropy(smoothing=0.1)))
        yield "views", self.views
        yield "last block", partial(self.last_block, RECIPE)
        yield "augmented and last block", partial(self.last_block, AUGMENTED)
        yield "public core", partial(self.public, None)
        yield "public then own", partial(self.public, RECIPE)
        yield "public then augmented", partial(self.public, AUGMENTED)

    def row(self, model: nn.Module, memory: fastntk.Memory) -> Row:
        """Accuracies at the core and after."""
        return {
            "core_alone": self.case.accuracy(model, memory.anchor),
            "exact": self.case.accuracy(model, memory.parameters),
        }

    def kept(self, classes: int) -> Row:
        return self.row(self.base, self.exact(self.base, classes=classes))

    def at_ridge(self, factor: float) -> Row:
        """With the share of the others that are classified rightly when left out."""
        scale = self.exact(self.base).ridge / FACTOR
        memory = self.exact(self.base, ridge=factor * scale)
        positions = memory.state.members.positions(self.case.others)
        alone = left_out(memory.state, positions)
        return {**self.row(self.base, memory), "left_out": accuracy(alone, labels_of(self.case.train)[positions])}

    def apart(self) -> Row:
        core = Subset(self.case.train, self.case.core)
        others = self.case.named(self.case.others)
        return self.row(self.base, fit_exact(self.base, others, core, RECIPE, fitted=True))

    def linearised(self) -> Row:
        memory = self.exact(self.base)
        state, test = memory.state, self.case.test
        fitted = logits_of(model_at(self.base, memory.anchor), test, "cpu")
        moved = state.vector - state.layout.flatten(memory.anchor)
        network = replace(state.network, train=Members(test), keep=None)
        logits = fitted + tangent(network, list(range(len(test))), moved)
        return {"core_alone": accuracy(fitted, labels_of(test)), "exact": accuracy(logits, labels_of(test))}

    def otherwise(self, recipe: fastntk.Recipe) -> Row:
        model = self.fitted(self.case.model(), recipe)
        return self.row(model, self.exact(model, recipe))

    def views(self) -> Row:
        """The core as it is."""
        ids = [*self.case.core, *self.case.others]
        views = fastntk.Views(self.case.named(ids), ("flip", "crop"))
        core = [f"{each}/0" for each in self.case.core]
        return self.row(self.base, fit_exact(self.base, views, core, RECIPE, fitted=True))

    def last_block(self, recipe: fastntk.Recipe) -> Row:
        model, _ = self.case.make(self.case.setting.head, 10)
        fastntk.tune(model, *self.case.select, "last:1")
        self.fitted(model, recipe)
        return self.row(model, self.exact(model, classes=3))

    def public(self, own: fastntk.Recipe | None) -> Row:
        """The backbone of a fit to other classes, and then a fit to the core's own images."""
        model, images = self.case.public(self.many)
        if own:
            self.fitted(model, own)
            return self.row(model, self.exact(model))
        everybody = self.case.named([*self.case.core, *self.case.others])
        return self.row(model, fit_exact(model, everybody, images, RECIPE, fitted=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as .npz")
    parser.add_argument("--many", type=Path, required=True, help="CIFAR-100 as .npz")
    parser.add_argument("--only", help="one setting, as MODEL-SHARE-HEAD")
    parser.add_argument("--ideas", default="", help="these alone, with commas")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/exact_ideas"))
    arguments = parser.parse_args()
    settle()
    asked, rows = set(filter(None, arguments.ideas.split(","))), []
    for setting in (Setting(name, core, 0) for name in NAMES for core in (20, 50)):
        if arguments.only not in (None, str(setting)):
            continue
        path = (
            writable(arguments.out) / f"{setting}-{fingerprint(arguments.data.name, str(setting), FACTOR, KEPT)}.json"
        )
        known = read_json(path) if path.exists() else {}
        tried = Tried(setting, arguments.data, arguments.many)
        for name, measure in tried.rows():
            if name not in known and (not asked or name in asked):
                known[name] = measure()
                write_json(path, known)
        table = Table(str(setting), "core alone", "exact")
        for name, row in known.items():
            table.add_row(name, f"{row['core_alone']:.1f}", f"{row['exact']:.1f}")
            rows.append({"model": setting.model, "core": setting.core, "head": setting.head, "idea": name, **row})
        Console().print(table)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
