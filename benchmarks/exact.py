"""A fit that forgets exactly (fastntk.fit_exact): is it, what does it cost in accuracy, and what in time?

    python benchmarks/exact.py --quick --data cifar10.npz      MobileNetV2, one head, 40 images a class, in ten minutes
    python benchmarks/exact.py --data cifar10.npz [--only mobilenet_v2-50-0]

The .npz holds x_train, y_train, x_test, y_test. Batch norms and head are tuned (ViT: ten prompts and the head) on 100
images a class, for 12 epochs of cross-entropy; the core is a share of each class, the others enter by the convex
problem.

same       how far the weights after forgetting are from those of the same procedure on what stays, as a share of the
           weights' norm: after one request (a tenth of the others), after 100 in any order, after a purge and opening
           the folder again, after learning some of them again and forgetting them
accuracy   on test images: of the core alone, of the exact fit, and of an ordinary fit to everything
u-lira     the share that the attack places rightly of images that were forgotten and of models that never had them,
           with so many models a side, each of another half of the others; with a 95 % interval by the bootstrap over
           images
seconds    of one process; retrain is an ordinary fit to everything

Results are kept under --out, setting by setting; the last line is JSON.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from cross_entropy import MODELS
from fastntk.metrics import accuracy, log_odds, ulira
from pretrained import cifar, fingerprint
from rich.console import Console
from torch import Tensor
from torch.utils.data import Dataset, Subset

import fastntk
from fastntk.common.files import read_json, writable, write_json
from fastntk.common.machine import settle
from fastntk.inputs.batches import labels_of
from fastntk.memory.exact import fit_exact
from fastntk.tuning.outputs import logits_of, model_at

RECIPE = fastntk.Recipe(loss=fastntk.CrossEntropy())
NAMES = ("mobilenet_v2", "efficientnet_lite0", "vit_s14")


@dataclass(frozen=True)
class Setting:
    """A network, the core's share in percent, and a head."""

    model: str
    core: int
    head: int

    def __str__(self) -> str:
        return f"{self.model}-{self.core}-{self.head}"


class Case:
    """A setting's data and model, and fits of it."""

    def __init__(self, setting: Setting, data: Path, per_class: int) -> None:
        self.setting = setting
        self.make, self.select = MODELS[setting.model]
        _, preprocessing = self.make(setting.head, 10)
        self.train, self.test = cifar(data, preprocessing, per_class)
        labels = labels_of(self.train)
        own = [(labels == c).nonzero()[:, 0].tolist() for c in range(10)]
        self.core = sorted(place for each in own for place in each[: round(len(each) * setting.core / 100)])
        self.others = [place for place in range(len(labels)) if place not in set(self.core)]

    def model(self) -> torch.nn.Module:
        """Before any fit."""
        model, _ = self.make(self.setting.head, 10)
        fastntk.tune(model, *self.select)
        return model

    def exact(self, model: torch.nn.Module, others: Sequence[int], fitted: bool = True) -> fastntk.Memory:
        """The exact fit on the core and some others."""
        return fit_exact(model, _named(self.train, [*self.core, *others]), self.core, RECIPE, fitted=fitted)

    def accuracy(self, model: torch.nn.Module, parameters: dict[str, Tensor]) -> float:
        """On the test images."""
        return accuracy(logits_of(model_at(model, parameters), self.test, "cpu"), labels_of(self.test))


def _named(data: Dataset, places: Sequence[int]) -> Dataset:
    """Some of the samples, under the names that they have among all."""
    some = Subset(data, sorted(places))
    some.ids = sorted(places)  # type: ignore[attr-defined]
    return some


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Relative, of all weights together."""
    a, b = (torch.cat([each[name].double().flatten() for name in left]) for each in (left, right))
    return float((a - b).norm() / b.norm())


def measured(case: Case, thoroughly: bool, folder: Path, models: int) -> dict[str, object]:
    """One setting, as a record."""
    model, seconds = case.model(), {}
    started = time.perf_counter()
    fastntk.fit(model, Subset(case.train, case.core), RECIPE)
    seconds["fit"] = time.perf_counter() - started
    base = {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}
    started = time.perf_counter()
    memory = case.exact(model, case.others)
    seconds["prepare"] = time.perf_counter() - started
    whole, started = case.model(), time.perf_counter()
    fastntk.fit(whole, case.train, RECIPE)
    seconds["retrain"] = time.perf_counter() - started
    accuracies = {
        "core_alone": case.accuracy(model, base),
        "exact": case.accuracy(model, memory.parameters),
        "fine_tuned": case.accuracy(whole, {}),
    }
    record: dict[str, object] = {**asdict(case.setting), **accuracies, "ridge": memory.ridge}
    if thoroughly:
        record["same"] = sameness(case, model, memory, folder, seconds)
        record["u_lira"] = attacked(case, model, models)
    return {**record, "seconds": {name: round(each, 2) for name, each in seconds.items()}}


def sameness(
    case: Case, model: torch.nn.Module, memory: fastntk.Memory, folder: Path, seconds: dict[str, float]
) -> dict[str, float]:
    """How far from never having seen them."""
    generator = torch.Generator().manual_seed(0)
    drawn = [case.others[k] for k in torch.randperm(len(case.others), generator=generator).tolist()]
    gone, more = drawn[: len(drawn) // 10], drawn[len(drawn) // 10 : len(drawn) // 10 + 100]
    stays = [each for each in case.others if each not in set(gone)]
    never = case.exact(model, stays).parameters
    memory.save(folder)
    started = time.perf_counter()
    memory.forget(gone)
    seconds["request"] = time.perf_counter() - started
    found = {"weights": distance(memory.parameters, never)}
    for number in torch.randperm(len(more), generator=generator).tolist():
        memory.forget([more[number]])
    memory.purge()
    found["after_purge"] = distance(
        fastntk.load(folder, model, _named(case.train, [*case.core, *case.others])).parameters,
        case.exact(model, [each for each in stays if each not in set(more)]).parameters,
    )
    started = time.perf_counter()
    memory.remember(more[:50])
    seconds["learn"] = time.perf_counter() - started
    memory.remember(more[50:])
    found["after_requests"] = distance(memory.parameters, never)
    memory.remember(gone)
    memory.forget(gone)
    found["after_learning"] = distance(memory.parameters, never)
    return found


def attacked(case: Case, model: torch.nn.Module, models: int) -> dict[str, float]:
    """U-LiRA on a tenth of the others: models that forgot them against models that never had them."""
    generator = torch.Generator().manual_seed(1)
    count = len(case.others)
    drawn = torch.randperm(count, generator=generator).tolist()
    gone = sorted(case.others[k] for k in drawn[: count // 10])
    rest = [case.others[k] for k in drawn[count // 10 :]]
    images, labels = Subset(case.train, gone), labels_of(case.train)[gone]

    def odds(number: int, forgets: bool) -> Tensor:
        own = torch.Generator().manual_seed(2 * number + forgets)
        half = [rest[k] for k in torch.randperm(len(rest), generator=own)[: len(rest) // 2].tolist()]
        memory = case.exact(model, [*half, *gone] if forgets else half)
        if forgets:
            memory.forget(gone)
        return log_odds(logits_of(model_at(model, memory.parameters), images, "cpu").double(), labels)

    forgot, never = (torch.stack([odds(k, forgets) for k in range(models)]) for forgets in (True, False))
    hits = ulira(forgot, never).double().mean(0)  # by image
    boots = torch.stack([hits[torch.randint(len(hits), (len(hits),), generator=generator)].mean() for _ in range(2000)])
    low, high = boots.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"auc": float(hits.mean()), "low": low, "high": high, "models": models}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as .npz")
    parser.add_argument("--many", type=Path, help="CIFAR-100, for cores of other classes: not tried yet")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", help="one setting, as MODEL-SHARE-HEAD")
    parser.add_argument("--models", type=int, default=100, help="a side, of the attack")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/exact"))
    arguments = parser.parse_args()
    settle()
    settings = [Setting(name, core, head) for name in NAMES for core in (20, 50, 80) for head in range(3)]
    per_class, thoroughly = 100, [Setting(NAMES[0], 50, 0)]
    if arguments.quick:
        per_class, settings = 40, [Setting(NAMES[0], 50, 0)]
    wanted = [each for each in settings if arguments.only in (None, str(each))]
    rows = []
    for setting in wanted:
        key = fingerprint(arguments.data.name, str(setting), per_class, arguments.models)
        path = writable(arguments.out) / f"{setting}-{key}.json"
        if not path.exists():
            case = Case(setting, arguments.data, per_class)
            models = 20 if arguments.quick else arguments.models
            write_json(path, measured(case, setting in thoroughly, arguments.out / f"{setting}-{key}", models))
        rows.append(read_json(path))
        Console().print(rows[-1])
    whole = next((row for row in rows if "same" in row), {})
    accuracies = [
        {name: row[name] for name in ("model", "core", "head", "core_alone", "exact", "fine_tuned")} for row in rows
    ]
    print(
        json.dumps(
            {
                "same": whole.get("same"),
                "accuracy": accuracies,
                "u_lira": whole.get("u_lira"),
                "seconds": whole.get("seconds"),
            }
        )
    )


if __name__ == "__main__":
    main()
