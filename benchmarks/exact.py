"""A fit that forgets exactly (fastntk.fit_exact): is it, what does it cost in accuracy, and what in time?

    python benchmarks/exact.py --quick --data cifar10.npz      MobileNetV2, one head, 40 images a class, in ten minutes
    python benchmarks/exact.py --data cifar10.npz --many cifar100.npz [--only mobilenet_v2-50-0] [--augmented]

The .npz holds x_train, y_train, x_test, y_test. Batch norms and head are tuned (ViT: ten prompts and the head) on 100
images a class, for 12 epochs of cross-entropy; with --augmented for 40 on images that are flipped and cropped, the
core and the ordinary fit alike. The core is a share of each class, the others enter by the convex problem. With --many
also a public core: 2,000 images of CIFAR-100's other classes, whose head is not taken.

same       how far the weights after forgetting are from those of the same procedure on what stays, as a share of the
           weights' norm: after one request (a tenth of the others), after 100 more in any order, after a purge and
           opening the folder again, after learning these 100 again, and after learning the first too and forgetting
           them; and after one request beside the procedure in another process on another number of threads
removal    with noise for certified removal of some eps, and a delta of 1e-5: test accuracy; after forgetting a tenth of
           the others what is left of the gradient, over the ridge, and whether the removal is certified
accuracy   on test images: of the core alone, of the exact fit, and of an ordinary fit to everything
u-lira     the share that the attack places rightly of images that were forgotten and of models that never had them,
           with so many models a side, each of another half of the others; with a 95 % interval by the bootstrap over
           models and images
relearning the accuracy on the forgotten, in percent, to which training on what stays leads from the weights after a
           request, from those that never saw them, and the ratio of the two
seconds    of one process each; retrain is an ordinary fit to everything, made once for a model and head, like the
           core's own fit, and kept

Results are kept under --out, setting by setting; the last line is JSON.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from fastntk.metrics import accuracy, log_odds, ulira
from fits import MODELS
from pretrained import cifar, fingerprint
from rich.console import Console
from shadows import over_both
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

import fastntk
from fastntk.common.files import read_json, read_tensors, writable, write_json, write_tensors
from fastntk.common.machine import settle
from fastntk.evidence.recovery import relearned_without
from fastntk.inputs.batches import labels_of
from fastntk.inputs.heads import take_backbone
from fastntk.memory.exact import FACTOR, KEPT, fit_exact
from fastntk.tuning.outputs import logits_of, model_at
from fastntk.tuning.parameters import snapshot, tuned

RECIPE = fastntk.Recipe(loss=fastntk.CrossEntropy())
AUGMENTED = replace(RECIPE, epochs=40, augment=("flip", "crop"))
REMOVALS, DELTA = (1.0, 0.1, 0.01), 1e-5
NAMES = ("mobilenet_v2", "efficientnet_lite0", "vit_s14")


@dataclass(frozen=True)
class Setting:
    """A network, the core's share in percent (0: a public core), and a head."""

    model: str
    core: int
    head: int

    def __str__(self) -> str:
        return f"{self.model}-{self.core}-{self.head}"


class Case:
    """A setting's data and model, and fits of it."""

    def __init__(self, setting: Setting, data: Path, per_class: int, recipe: fastntk.Recipe = RECIPE) -> None:
        self.setting, self.data, self.per_class, self.recipe = setting, data, per_class, recipe
        self.make, self.select = MODELS[setting.model]
        _, preprocessing = self.make(setting.head, 10)
        self.train, self.test = cifar(data, preprocessing, per_class)
        labels = labels_of(self.train)
        own = [(labels == c).nonzero()[:, 0].tolist() for c in range(10)]
        self.core = sorted(place for each in own for place in each[: round(len(each) * setting.core / 100)])
        self.others = [place for place in range(len(labels)) if place not in set(self.core)]

    def named(self, places: Sequence[int]) -> Dataset:
        """Some of the samples, under the names that they have among all."""
        some = Subset(self.train, sorted(places))
        some.ids = sorted(places)  # type: ignore[attr-defined]
        return some

    def model(self) -> nn.Module:
        """Before any fit."""
        model, _ = self.make(self.setting.head, 10)
        fastntk.tune(model, *self.select)
        return model

    def exact(
        self, model: nn.Module, others: Sequence[int], public: Dataset | None = None, eps: float | None = None
    ) -> fastntk.Memory:
        """The exact fit on a fitted core and some others, with noise for certified removal if an eps is given."""
        core, removal = self.core if public is None else public, None if eps is None else fastntk.Removal(eps, DELTA)
        return fit_exact(model, self.named([*self.core, *others]), core, self.recipe, fitted=True, removal=removal)

    def public(self, many: Path) -> tuple[nn.Module, Dataset]:
        """The model with the backbone of a fit to images of other classes and a head of zeros; and these."""
        other, preprocessing = self.make(self.setting.head, 100)
        images, _ = cifar(many, preprocessing, 20, 10)
        fastntk.tune(other, *self.select)
        fastntk.fit(other, images, self.recipe)
        model = self.model()
        take_backbone(model, other)
        return model, images

    def accuracy(self, model: nn.Module, parameters: dict[str, Tensor]) -> float:
        """On the test images."""
        return accuracy(logits_of(model_at(model, parameters), self.test, "cpu"), labels_of(self.test))


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Relative, of all weights together."""
    a, b = (torch.cat([each[name].double().flatten() for name in left]) for each in (left, right))
    return float((a - b).norm() / b.norm())


def measured(case: Case, thoroughly: bool, folder: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """One setting, as a record."""
    seconds: dict[str, float] = {}
    model, public = at_core(case, folder, arguments.many, seconds)
    base = snapshot(tuned(model))
    with timed(seconds, "prepare"):
        memory = case.exact(model, case.others, public)
    accuracies = {
        "core_alone": case.accuracy(model, base) if public is None else None,
        "exact": case.accuracy(model, memory.parameters),
        "fine_tuned": fine_tuned(case, folder.parent, seconds),
    }
    record: dict[str, object] = {**asdict(case.setting), **accuracies, "ridge": memory.ridge}
    if thoroughly:
        record["removal"] = [certified(case, model, eps) for eps in REMOVALS]
        record["same"], record["relearning"] = sameness(case, model, memory, folder, seconds)
        models = 20 if arguments.quick else arguments.models
        record["u_lira"] = attacked(case, model, models, folder.with_suffix(".odds.json"))
    return {**record, "seconds": {name: round(each, 2) for name, each in seconds.items()}}


def at_core(case: Case, folder: Path, many: Path | None, seconds: dict[str, float]) -> tuple[nn.Module, Dataset | None]:
    """The model fitted to the core, or as it was kept, and the images of a public one."""
    if many and not case.setting.core:
        with timed(seconds, "fit"):
            return case.public(many)
    model, kept = case.model(), folder.with_suffix(".safetensors")
    if not kept.exists():
        with timed(seconds, "fit"):
            fastntk.fit(model, Subset(case.train, case.core), case.recipe)
        write_tensors(kept, snapshot(tuned(model)), {"seconds": str(seconds["fit"])})
    tensors, told = read_tensors(kept)
    model.load_state_dict(tensors, strict=False)
    seconds["fit"] = float(told["seconds"])
    return model, None


def fine_tuned(case: Case, out: Path, seconds: dict[str, float]) -> float:
    """The accuracy of an ordinary fit to everything, which is the same whatever the core, so it is kept."""
    known = case.data.name, case.setting.model, case.setting.head, case.per_class, case.recipe
    kept = out / f"{case.setting.model}-all-{case.setting.head}-{fingerprint(*known)}.json"
    if not kept.exists():
        whole, taken = case.model(), dict[str, float]()
        with timed(taken, "retrain"):
            fastntk.fit(whole, case.train, case.recipe)
        write_json(kept, {"accuracy": case.accuracy(whole, {}), "seconds": taken})
    found = read_json(kept)
    seconds.update(found["seconds"])
    return found["accuracy"]


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """How long a block takes."""
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def sameness(
    case: Case, model: nn.Module, memory: fastntk.Memory, folder: Path, seconds: dict[str, float]
) -> tuple[dict[str, float], dict[str, float | None]]:
    """How far from never having seen them; and whether they come back sooner."""
    generator = torch.Generator().manual_seed(0)
    drawn = [case.others[k] for k in torch.randperm(len(case.others), generator=generator).tolist()]
    gone, more = drawn[: len(drawn) // 10], drawn[len(drawn) // 10 : len(drawn) // 10 + 100]
    stays = [each for each in case.others if each not in set(gone)]
    never = case.exact(model, stays).parameters
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off
    memory.save(folder)
    back = relearning(fastntk.methods.Problem(memory, gone, RECIPE), memory.preview(gone).parameters, never)
    with timed(seconds, "request"):
        memory.forget(gone)
    found = {"weights": distance(memory.parameters, never)}
    found["other_process"] = distance(memory.parameters, elsewhere(case, model.state_dict(), memory.anchor, stays))
    for number in torch.randperm(len(more), generator=generator).tolist():
        memory.forget([more[number]])
    fewer = case.exact(model, [each for each in stays if each not in set(more)]).parameters
    found["after_requests"] = distance(memory.parameters, fewer)
    memory.purge()
    opened = fastntk.load(folder, model, case.named([*case.core, *case.others]))
    found["after_purge"] = distance(opened.parameters, fewer)
    with timed(seconds, "learn"):
        memory.remember(more[:50])
    memory.remember(more[50:])
    found["after_learning"] = distance(memory.parameters, never)
    memory.remember(gone)
    memory.forget(gone)
    found["after_learning_and_forgetting"] = distance(memory.parameters, never)
    return found, back


def elsewhere(case: Case, state: dict[str, Tensor], anchor: dict[str, Tensor], others: list[int]) -> dict[str, Tensor]:
    """The same fit in another process, on 2 threads where this one has 1, and on 1 where it has more."""
    threads = 2 if torch.get_num_threads() == 1 else 1
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        given = case.setting, case.data, case.per_class, {**state, **anchor}, others, threads
        return pool.submit(_solved, *given).result()


def _solved(
    setting: Setting, data: Path, per_class: int, state: dict[str, Tensor], others: list[int], threads: int
) -> dict[str, Tensor]:
    torch.set_num_threads(threads)
    settle()
    case = Case(setting, data, per_class)
    model = case.model()
    model.load_state_dict(state)
    return case.exact(model, others).parameters


def certified(case: Case, model: nn.Module, eps: float) -> dict[str, float | bool]:
    """An exact fit with noise, and its answer for a tenth of the others."""
    memory = case.exact(model, case.others, eps=eps)
    accurate = case.accuracy(model, memory.parameters)
    certificate = memory.forget(case.others[::10]).certificate
    if certificate.gradient is None:
        raise TypeError("this is no exact fit's")
    left = certificate.gradient / memory.ridge
    return {"eps": eps, "accuracy": accurate, "left": left, "certified": certificate.certified}


def relearning(problem: fastntk.methods.Problem, *models: dict[str, Tensor]) -> dict[str, float | None]:
    """Of our weights and of those that never saw them."""
    ours, never = (relearned_without(problem, each) for each in models)
    return {"ours": ours, "never": never, "ratio": ours / never if never else None}


def attacked(case: Case, model: nn.Module, models: int, kept: Path) -> dict[str, float]:
    """U-LiRA on a tenth of the others: models that forgot them against models that never had them. What they say of
    these is kept as it comes."""
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

    known: dict[str, list[list[float]]] = read_json(kept) if kept.exists() else {"forgot": [], "never": []}
    for number in range(models):
        for side, forgets in (("forgot", True), ("never", False)):
            if len(known[side]) <= number:
                known[side].append(odds(number, forgets).tolist())
                write_json(kept, known)
    forgot, never = (torch.tensor(known[side][:models], dtype=torch.float64) for side in ("forgot", "never"))
    hits = ulira(forgot, never).double().numpy()
    low, high = over_both(hits, models)
    return {"auc": float(hits.mean()), "low": low, "high": high, "models": models}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as .npz")
    parser.add_argument("--many", type=Path, help="CIFAR-100 as .npz, for a public core")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--augmented", action="store_true", help="a longer fit, on augmented images")
    parser.add_argument("--only", help="one setting, as MODEL-SHARE-HEAD")
    parser.add_argument("--models", type=int, default=100, help="a side, of the attack")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/exact"))
    arguments = parser.parse_args()
    settle()
    cores = (20, 50, 80, 0) if arguments.many else (20, 50, 80)
    settings = [Setting(name, core, head) for name in NAMES for core in cores for head in range(3)]
    per_class, thoroughly = 100, [Setting(NAMES[0], 50, 0)]
    if arguments.quick:
        per_class, settings = 40, [Setting(NAMES[0], 50, 0)]
    recipe = AUGMENTED if arguments.augmented else RECIPE
    wanted = [each for each in settings if arguments.only in (None, str(each))]
    rows = []
    for setting in wanted:
        known = arguments.data.name, str(setting), per_class, arguments.models, FACTOR, KEPT
        key = fingerprint(*known, *([recipe] if arguments.augmented else []))
        path = writable(arguments.out) / f"{setting}-{key}.json"
        if not path.exists():
            case = Case(setting, arguments.data, per_class, recipe)
            whole = setting in thoroughly and not arguments.augmented
            write_json(path, measured(case, whole, arguments.out / f"{setting}-{key}", arguments))
        rows.append(read_json(path))
        Console().print(rows[-1])
    thorough = next((row for row in rows if "same" in row), {})
    named = "model", "core", "head", "core_alone", "exact", "fine_tuned"
    shown: dict[str, object] = {"accuracy": [{name: row[name] for name in named} for row in rows]}
    for name in ("same", "removal", "u_lira", "relearning", "seconds"):
        shown[name] = thorough.get(name)
    print(json.dumps(shown))


if __name__ == "__main__":
    main()
