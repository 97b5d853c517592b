"""Models fitted to CIFAR-10 or CIFAR-100 for a benchmark, with those retrained for its requests: made once, and kept.

Which networks, with what tuned, and by which recipes: ``MODELS`` and ``RECIPES``.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pretrained import cifar, fingerprint, mobilenet_v2, vit_s14
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from widened import vit_b32

import fastntk
from fastntk.common.files import read_tensors, writable, write_tensors
from fastntk.evidence.bench.stored import fitted
from fastntk.evidence.methods.retrain import retrained
from fastntk.evidence.requests import drawn
from fastntk.inputs.batches import Labelled
from fastntk.inputs.ids import ids_of
from fastntk.inputs.images import Preprocessing
from fastntk.inputs.packaged import pretrained
from fastntk.memory.members import Members
from fastntk.tuning.fitting import Fit
from fastntk.tuning.recipe import Recipe

Make = Callable[[int, int], tuple[nn.Module, Preprocessing]]
MODELS: dict[str, tuple[Make, tuple[str, ...]]] = {
    "mobilenet_v2": (lambda seed, classes: mobilenet_v2(64, seed, classes), ("bn", "head")),
    "mobilenet_v2_all": (lambda seed, classes: mobilenet_v2(64, seed, classes), ("all",)),
    "efficientnet_lite0": (lambda seed, classes: pretrained(seed, size=64), ("bn", "head")),
    "vit_s14": (lambda seed, classes: vit_s14(56, seed), ("prompt:10", "head")),
    "vit_b32": (lambda seed, classes: vit_b32(64, seed), ("prompt:10", "head")),
    "vit_s14_lora": (lambda seed, classes: vit_s14(56, seed), ("lora:8", "head")),
}
RECIPES = {
    "plain": Recipe(loss=fastntk.CrossEntropy()),
    "gentle": Recipe(loss=fastntk.CrossEntropy(), learning_rate=1e-4),  # where everything is tuned
    "smoothed": Recipe(loss=fastntk.CrossEntropy(smoothing=0.1)),
    "adamw": Recipe(
        loss=fastntk.CrossEntropy(), optimizer="adamw", weight_decay=0.05, decay_toward="zero", augment=("flip", "crop")
    ),
}
REQUESTS = {"class": "class", "tenth": "random 10%", "hundredth": "random 1%"}
RETRAINED = 4


@dataclass(frozen=True)
class Setting:
    """What is fitted."""

    model: str
    recipe: str
    classes: int
    per_class: int
    head: int

    def __str__(self) -> str:
        return f"{self.model}-{self.recipe}-{self.classes}x{self.per_class}-{self.head}"


@dataclass(frozen=True)
class Case:
    """A fitted model, its data, and where what comes of it is kept."""

    setting: Setting
    model: nn.Module
    train: Labelled | TensorDataset
    test: Labelled | TensorDataset
    fit: Fit
    folder: Path
    key: str
    asked: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return next(self.model.parameters()).device

    def kept(self, name: str, make: Callable[[], dict[str, Tensor]], *settings: object) -> dict[str, Tensor]:
        """Parameters that were stored with the same settings, or are made and stored."""
        path, key = self.folder / f"{name}.safetensors", fingerprint(self.key, *settings) if settings else self.key
        if not path.exists() or read_tensors(path, names=[])[1]["key"] != key:
            write_tensors(path, make(), {"key": key})
        return {each: tensor.to(self.device) for each, tensor in read_tensors(path)[0].items()}

    def requests(self) -> Iterator[tuple[str, list, Dataset]]:
        """Every request: its name, the ids, and the test images that it leaves."""
        for request in self.asked:
            yield request, *drawn(REQUESTS[request], self.train, self.test, self.setting.head, gone=self.setting.head)

    def retrained(self, request: str, ids: list, count: int = RETRAINED) -> list[dict[str, Tensor]]:
        """The first of the four models."""
        gone = set(ids)
        retain = Members(self.train, [each for each in ids_of(self.train) if each not in gone])

        def make(seed: int) -> dict[str, Tensor]:
            return retrained(self.model, self.fit.initial, retain, self.recipe(seed))[0]

        return [self.kept(f"{request}-retrained-{k}", partial(make, 100 + k)) for k in range(count)]

    def recipe(self, seed: int) -> Recipe:
        """How it was fitted, in another order."""
        return replace(self.fit.recipe, seed=seed)

    def prepared(self, **options: Any) -> fastntk.Memory:
        """Its memory."""
        fit = self.fit
        return fastntk.prepare(
            self.model, self.train, fit.initial, loss=fit.recipe.loss, shrinkage=fit.shrinkage, **options
        )


def opened(setting: Setting, arguments: argparse.Namespace) -> Case:
    """Fit, or take the fit from before."""
    make, select = MODELS[setting.model]
    model, preprocessing = make(setting.head, setting.classes)
    source = arguments.data if setting.classes == 10 else arguments.many
    train, test = cifar(source, preprocessing, setting.per_class, 100 if setting.classes == 10 else 10)
    fastntk.tune(model, *select)
    recipe = replace(RECIPES[setting.recipe], seed=setting.head)
    key = fingerprint(setting, preprocessing, select, recipe)
    folder = writable(arguments.out / "cross_entropy" / f"{setting}-{key}")
    fit = fitted(model, train, recipe, folder / "original.safetensors", key)
    return Case(setting, model, train, test, fit, folder, key, tuple(arguments.requests.split(",")))
