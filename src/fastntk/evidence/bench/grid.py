"""Running what is not in the results yet: one fitted model after the other, and every request against it."""

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from fastntk.common.files import writable
from fastntk.common.machine import device_name, elapsed, settle
from fastntk.common.progress import console
from fastntk.evidence.auditing import audit
from fastntk.evidence.bench.choosing import Choice, Trial, choose
from fastntk.evidence.bench.config import CHOSEN, Config, Entry, Setting
from fastntk.evidence.bench.results import Measured, Results
from fastntk.evidence.bench.stored import StoredAnswer, StoredRetraining, fitted
from fastntk.evidence.compare import compare, references
from fastntk.evidence.methods import Method, Problem
from fastntk.evidence.report import ORIGINAL, Report
from fastntk.evidence.requests import drawn
from fastntk.inputs.images import Images, Preprocessing, in_memory
from fastntk.inputs.sources import load_data
from fastntk.memory.memory import Memory, prepare
from fastntk.tuning.fitting import Fit
from fastntk.tuning.parameters import tuned
from fastntk.tuning.start import start

log = logging.getLogger(__name__)


def run(config: Config, path: Path, device: torch.device | str = "cpu") -> Results:
    """Every cell of the grid that is not in the results at ``path`` yet, made with the same settings.

    Fits and the methods' answers are kept in the folder ``fits`` beside it, so that what was cut off goes on where it
    was; of a cell with other methods or settings, what was measured or scored already is not measured or scored again.
    For every fitted model the memory is audited once, on a random tenth, and settings are chosen once.

    Raises:
        InputError: the folder cannot be written, or a model or data cannot be had.
    """
    settle()
    results = Results(writable(path.parent) / path.name)
    for setting in config.settings():
        described = {**_described(config, setting), **_compared(config)}
        missing = [request for request in config.requests if not results.holds(setting, request, described)]
        if missing:
            console.print(
                f"{setting.data}, {setting.model}, {setting.per_class} a class, seed {setting.seed}, {setting.loss}"
            )
            before = {request: results.measured(setting, request) for request in config.requests}
            known = {key: each for some in before.values() for key, each in some.scores.items()}
            bench = _Bench(config, setting, path.parent / "fits", device, known)
            for request in missing:
                facts, report = bench.cell(request, before[request])
                results.add(setting, request, described, facts, report)
                console.print(report.table(request))
    wanted = {(setting, request) for setting in config.settings() for request in config.requests}
    if others := [each for each in results.cells() if (each.setting, each.request) not in wanted]:
        log.warning("%s has %d requests that this configuration does not name; they are shown too", path, len(others))
    return results


class _Bench:
    """One fitted model with its memory, audited, and the settings that were chosen for it."""

    def __init__(
        self,
        config: Config,
        setting: Setting,
        fits: Path,
        device: torch.device | str,
        known: Mapping[str, tuple[float, float]],
    ) -> None:
        self.config, self.setting = config, setting
        self.key = _digest(_described(config, setting))
        names = setting.data, setting.model, setting.per_class, setting.seed, setting.loss, self.key
        self.folder = writable(fits / "-".join(map(str, names)))
        model, self.train, self.test = opened(config, setting, device)
        recipe = config.fitting(setting)
        self.fit = fitted(model, self.train, recipe, self.folder / "original.safetensors", self.key)
        self.memory, self.preparing = _prepared(model, self.train, self.fit)
        retraining = StoredRetraining(model, self.fit, self.folder, self.key)
        audited = audit(self.memory, retraining, held_out=self.test, seed=setting.seed + 2)
        self.audit = {**audited.to_dict(), "seconds": retraining.seconds}
        select = config.select
        self.trials = [self._trial(request, select.retrained) for request in select.requests] if select else []
        tried = {name: [each.default, *each.others] for name, each in config.methods.items() if each.others}
        self.choices = choose(tried, self.trials, self._tried, known) if self.trials else {}

    def cell(self, request: str, before: Measured) -> tuple[dict[str, object], Report]:
        """What is known of a request and its report: every method as it is by default, and as it was chosen. What was
        measured ``before`` is taken from there."""
        problem, test = self._problem(request, self.setting.seed)
        defaults = {name: each.default for name, each in self.config.methods.items()}
        chosen = {name: each.method for name, each in self.choices.items() if each.method != defaults[name]}
        methods = {
            **references(self.setting.seed + 1, self.config.retrained),
            **defaults,
            **{f"{name}{CHOSEN}": method for name, method in chosen.items()},
        }
        kept = {name: self._kept(request, name, method) for name, method in methods.items()}
        answers = {ORIGINAL: self.key, **{name: each.key for name, each in kept.items()}}
        known = before.of(answers)
        report, notes = compare(problem, test, kept, self.fit.seconds, thoroughly=True, known=known)
        for name in (each for each in self.choices if each not in chosen):
            report = report.repeated(name, f"{name}{CHOSEN}")
            notes |= {f"{name}{CHOSEN}": notes[name]} if name in notes else {}
        return {**self._facts(problem, test, notes), "answers": answers}, report

    def _problem(self, request: str, seed: int) -> tuple[Problem, Dataset]:
        """A request, the same for the same seed, and its test images."""
        classes = self.memory.state.network.classes
        forget, test = drawn(request, self.train, self.test, seed, seed % classes)
        return Problem(self.memory, forget, self.fit.recipe), test

    def _trial(self, request: str, retrained: int) -> Trial:
        """A request that nobody asks for: that of another seed."""
        problem, test = self._problem(request, self.setting.seed + 1)
        models = references(self.setting.seed + 1, retrained)

        def kept(name: str, method: Method) -> Method:
            return self._kept(f"trial {request}", name, method)

        return Trial(problem, test, {name: kept(name, method)(problem) for name, method in models.items()}, kept)

    def _tried(self, method: Method) -> str:
        """What the score of settings depends on."""
        return _digest([self.key, _compared(self.config)["select"], *_described_method(method)])

    def _kept(self, request: str, name: str, method: Method) -> StoredAnswer:
        """The method, with answers that are kept."""
        digest = _digest([self.key, *_described_method(method)])
        return StoredAnswer(method, self.folder / f"{request}-{name}-{digest}.safetensors", digest)

    def _facts(self, problem: Problem, test: Dataset, notes: Mapping[str, str]) -> dict[str, object]:
        """What is known of a cell beside the methods' measures."""
        memory, calibration = self.memory, self.memory.calibration
        methods = self.config.methods
        return {
            "classes": memory.state.network.classes,
            "parameters": sum(tensor.numel() for tensor in tuned(memory.model).values()),
            "images": len(memory.ids),
            "forgotten": len(problem.forget),
            "test_images": len(test),  # type: ignore[arg-type]
            "unit": memory.state.network.loss.unit,
            "form": memory.form,
            "ridge": asdict(calibration) if calibration else memory.ridge,
            "audit": self.audit,
            "notes": dict(notes),
            "fit_seconds": self.fit.seconds,
            "prepare_seconds": self.preparing,
            "prepared": [name for name, each in methods.items() if getattr(each.default, "prepared", False)],
            "audited": [name for name, each in methods.items() if _audited(each)],
            "chosen": {name: self._chosen(choice) for name, choice in self.choices.items()},
            "scores": {key: each for choice in self.choices.values() for key, each in choice.scores.items()},
            "device": device_name(problem.device),
        }

    def _chosen(self, choice: Choice) -> dict[str, object]:
        """What is said of a choice; its seconds are with those of retraining."""
        retraining = sum(each.seconds or 0.0 for trial in self.trials for each in trial.retrained.values())
        method, seconds = _described_method(choice.method), choice.seconds + retraining
        return {"method": method, "score": choice.score, "tried": choice.tried, "seconds": seconds}


def _prepared(model: nn.Module, train: Dataset, done: Fit) -> tuple[Memory, float]:
    """The memory of a fitted model, and the seconds that it took, with all that its first request would wait for."""
    started = time.perf_counter()
    memory = prepare(model, train, done.initial, loss=done.recipe.loss, shrinkage=done.shrinkage)
    memory.ready()
    return memory, elapsed(started, memory.state.network.device)


def _audited(entry: Entry) -> bool:
    """Whether a method may take the gain of an audit."""
    return any(getattr(each, "gain", False) is True for each in (entry.default, *entry.others))


def _described(config: Config, setting: Setting) -> dict[str, object]:
    """Everything that a fitted model and its test images depend on."""
    return {
        "data": asdict(config.data[setting.data]),
        "model": {**asdict(config.models[setting.model]), "select": list(config.models[setting.model].select)},
        "test_per_class": config.test_per_class,
        "recipe": dict(config.recipe),
        "setting": asdict(setting),
    }


def _compared(config: Config) -> dict[str, object]:
    """Everything else that a cell depends on."""
    return {
        "methods": {
            name: [_described_method(method) for method in (each.default, *each.others)]
            for name, each in config.methods.items()
        },
        "retrained": config.retrained,
        "select": asdict(config.select) if config.select else None,
    }


def _described_method(method: Method) -> list[object]:
    """Its name and settings, and its version, where that is not the first."""
    version = getattr(method, "version", 1)
    return [type(method).__name__, asdict(method), *([version] if version > 1 else [])]  # type: ignore[call-overload]


def _digest(document: object) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]


def opened(config: Config, setting: Setting, device: torch.device | str) -> tuple[nn.Module, Dataset, Dataset]:
    """The model, tuned and not fitted, and its training and test images: the first of each class for training, and
    those of the test split, or the ones after them, for testing."""
    entry, data, count = config.models[setting.model], config.data[setting.data], config.test_per_class

    def read(preprocessing: Preprocessing, split: str = "train") -> Images:
        return load_data(data.source, preprocessing, split=split, root=data.root)

    model, whole = start(
        entry.model, read, entry.select, size=entry.image_size, weights=entry.weights, seed=setting.seed
    )
    train = whole.part(0, setting.per_class)
    if data.test == "rest":
        test = whole.part(setting.per_class, setting.per_class + count)
    else:
        test = read(whole.preprocessing, "test").part(0, count)
    return model.to(device), in_memory(train), in_memory(test)
