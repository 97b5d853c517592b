"""Running what is not in the results yet: one fitted model after the other, and every request against it."""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from fastntk.common.files import writable
from fastntk.common.machine import device_name, elapsed, settle
from fastntk.common.progress import console
from fastntk.evidence.auditing import audit
from fastntk.evidence.bench.config import Config, Setting
from fastntk.evidence.bench.results import Results
from fastntk.evidence.bench.stored import Stored, fitted, stored_retraining
from fastntk.evidence.compare import compare, references
from fastntk.evidence.methods import Method, Problem
from fastntk.evidence.report import Report
from fastntk.evidence.requests import drawn
from fastntk.inputs.images import Images, Preprocessing, in_memory
from fastntk.inputs.sources import load_data
from fastntk.memory.memory import Memory, prepare
from fastntk.tuning.fitting import Fit
from fastntk.tuning.parameters import tuned
from fastntk.tuning.start import start


def run(config: Config, folder: Path, device: torch.device | str = "cpu") -> Results:
    """Every cell of the grid that is not in ``folder/results.sqlite`` yet, made with the same settings.

    Fits and the methods' answers are kept in ``folder/fits``, so that what was cut off goes on where it was. For every
    fitted model the memory is audited once, on a random tenth.

    Raises:
        InputError: the folder cannot be written, or a model or data cannot be had.
    """
    settle()
    results = Results(writable(folder) / "results.sqlite")
    for setting in config.settings():
        described = {**_described(config, setting), "methods": {n: _method(m) for n, m in config.methods.items()}}
        missing = [request for request in config.requests if not results.holds(setting, request, described)]
        if missing:
            console.print(f"{setting.data}, {setting.model}, {setting.per_class} a class, seed {setting.seed}")
            for request, facts, report in _cells(config, setting, missing, folder / "fits", device):
                results.add(setting, request, described, facts, report)
                console.print(report.table(request))
    return results


def _cells(
    config: Config, setting: Setting, requests: Iterable[str], fits: Path, device: torch.device | str
) -> Iterator[tuple[str, dict[str, object], Report]]:
    """Requests against one fitted model: each with what is known of it and its report."""
    key = _digest(_described(config, setting))
    kept = writable(fits / f"{setting.data}-{setting.model}-{setting.per_class}-{setting.seed}-{key}")
    model, train, test = opened(config, setting, device)
    fit = fitted(model, train, config.fitting(setting.seed), kept / "original.safetensors", key)
    started = time.perf_counter()
    memory = prepare(model, train, fit.initial, loss=fit.recipe.loss, shrinkage=fit.shrinkage)
    preparing = elapsed(started, memory.state.network.device)
    audit(memory, stored_retraining(model, fit, kept, key), held_out=test, seed=setting.seed + 1)
    for request in requests:
        forget, held_out = drawn(request, train, test, setting.seed, setting.seed % memory.state.network.classes)
        problem = Problem(memory, forget, fit.recipe)
        methods = {
            name: Stored(method, kept / f"{request}-{name}.safetensors", _digest([key, *_method(method)]))
            for name, method in {**references(setting.seed + 1), **config.methods}.items()
        }
        report, notes = compare(problem, held_out, methods, fit.seconds, thoroughly=True)
        yield request, {**_facts(memory, fit, problem, held_out, notes), "prepare_seconds": preparing}, report


def _described(config: Config, setting: Setting) -> dict[str, object]:
    """Everything that a fitted model and its test images depend on."""
    return {
        "data": asdict(config.data[setting.data]),
        "model": {**asdict(config.models[setting.model]), "select": list(config.models[setting.model].select)},
        "test_per_class": config.test_per_class,
        "recipe": dict(config.recipe),
        "setting": asdict(setting),
    }


def _method(method: Method) -> list[object]:
    return [type(method).__name__, asdict(method)]  # type: ignore[call-overload]


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


def _facts(memory: Memory, fit: Fit, problem: Problem, test: Dataset, notes: Mapping[str, str]) -> dict[str, object]:
    """What is known of a cell beside the methods' measures."""
    calibration = memory.calibration
    return {
        "classes": memory.state.network.classes,
        "parameters": sum(tensor.numel() for tensor in tuned(memory.model).values()),
        "images": len(memory.ids),
        "forgotten": len(problem.forget),
        "test_images": len(test),  # type: ignore[arg-type]
        "form": memory.form,
        "ridge": asdict(calibration) if calibration else memory.ridge,
        "audit": memory.audit.to_dict() if memory.audit else None,
        "notes": dict(notes),
        "fit_seconds": fit.seconds,
        "device": device_name(problem.device),
    }
