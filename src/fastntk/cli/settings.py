"""What a run folder says of how its model was made: what it started from, and ``run.json``."""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from fastntk.common.errors import InputError
from fastntk.common.files import file_digest, read_json, read_tensors
from fastntk.common.formats import Format, sealed, unchanged, unsealed
from fastntk.inputs.ids import Id
from fastntk.inputs.images import Images, Preprocessing, in_memory
from fastntk.inputs.models import load_model
from fastntk.inputs.sources import load_data
from fastntk.inputs.weights import load_weights
from fastntk.memory.certificate import Removal
from fastntk.tuning.losses import loss_from
from fastntk.tuning.recipe import Recipe
from fastntk.tuning.selectors import tune
from fastntk.tuning.start import start


def _run_1(document: dict[str, Any]) -> dict[str, Any]:
    """Cross-entropy had no label smoothing."""
    loss = document["recipe"]["loss"]
    loss = {"smoothing": 0.0, **loss} if loss["name"] == "cross-entropy" else loss
    return {**document, "recipe": {**document["recipe"], "loss": loss}}


def _run_2(document: dict[str, Any]) -> dict[str, Any]:
    """Adam, with decay toward the start, of images as they are, and classes that weigh the same."""
    recipe = document["recipe"]
    loss = {"weights": [], **recipe["loss"]} if recipe["loss"]["name"] == "cross-entropy" else recipe["loss"]
    added: dict[str, Any] = {"loss": loss, "optimizer": "adam", "decay_toward": "start", "augment": []}
    return {**document, "recipe": {**recipe, **added}}


def _run_4(document: dict[str, Any]) -> dict[str, Any]:
    """Nobody said whose the samples are."""
    return {"owners": None, **document}


def _run_5(document: dict[str, Any]) -> dict[str, Any]:
    """No fit forgot exactly, and no data came later."""
    return {"core": None, "core_sum": None, "added": [], **document}


def _run_6(document: dict[str, Any]) -> dict[str, Any]:
    """Noise was Python's alone."""
    return {"removal": None, **document}


def _run_7(document: dict[str, Any]) -> dict[str, Any]:
    """Nothing was kept of the samples."""
    return {"samples": None, **document}


FORMAT = Format("run", (unchanged, _run_1, _run_2, unchanged, _run_4, _run_5, _run_6, _run_7))
"""Of ``run.json``; from version 4 on it is sealed."""

_SEALED = 4


@dataclass(frozen=True)
class Given:
    """What a fit starts from, as the user names it; with ``fitted``, the weights that somebody's fit ended with."""

    model: str
    data: str
    root: str | None
    select: Sequence[str]
    size: int | None
    weights: str | None = None
    id_column: str | None = None
    fitted: str | None = None
    head_start: str = "zero"
    owners: str | None = None
    core: str | None = None
    removal: Removal | None = None

    @property
    def pretrained(self) -> str:
        """What a model that was fitted elsewhere started from.

        Raises:
            InputError: nobody said.
        """
        if not self.weights:
            raise InputError("--fitted needs --weights, the pretrained weights that the model was fitted from.")
        return self.model if self.weights == "pretrained" else self.weights

    def open(self, device: torch.device, seed: int = 0) -> tuple[nn.Module, Images]:
        """The model with a head for the data's classes, the selection tuned, and the data as it wants them."""

        def read(preprocessing: Preprocessing) -> Images:
            return load_data(self.data, preprocessing, root=self.root, id_column=self.id_column)

        module, images = self._started(read, seed)
        return module.to(device).eval(), images

    def model_for(self, images: Images, seed: int = 0) -> nn.Module:
        """The model with a head for the classes of other images, as it was before any fit."""
        return self._started(lambda _: images, seed)[0].eval()

    def _started(self, read: Callable[[Preprocessing], Images], seed: int) -> tuple[nn.Module, Images]:
        return start(self.model, read, self.select, size=self.size, weights=self.weights, seed=seed)


@dataclass(frozen=True)
class Settings:
    """What ``run.json`` holds: as ``Given``, with other data that were ``added`` later; ``core_sum`` knows the
    core again that was fitted, ``samples`` all ids and labels of an ordinary fit until some are forgotten, and
    ``files`` are the SHA-256 of the tensors beside it."""

    model: str
    data: str
    root: str | None
    classes: list[str]
    select: list[str]
    size: int
    recipe: dict[str, Any]
    id_column: str | None
    owners: str | None = None
    core: str | None = None
    core_sum: str | None = None
    removal: Sequence[float] | None = None
    samples: str | None = None
    added: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Given, images: Images, recipe: Recipe) -> "Settings":
        """Of a fit of a model to images."""
        names = given.model, given.data, given.root
        return cls(
            *names,
            images.classes,
            list(given.select),
            images.preprocessing.size,
            asdict(recipe),
            given.id_column,
            given.owners,
            given.core,
            removal=given.removal,
            samples=None if given.core else _sum(images),
        )

    @classmethod
    def read(cls, path: Path) -> "Settings":
        """Of a ``run.json``.

        Raises:
            InputError: it is damaged, or of an unknown format.
        """
        document = read_json(path)
        needed = document.get("format") in range(_SEALED, FORMAT.version + 1)
        found = FORMAT.read(unsealed(document, path, needed), path)
        return cls(**{each.name: found[each.name] for each in fields(cls)})

    def written(self) -> dict[str, Any]:
        """As ``read`` reads it."""
        return sealed(FORMAT.stamped(asdict(self)))

    def moved(self, data: str | None, model: str | None) -> "Settings":
        """The same with data and a model that lie elsewhere now, each None where it does not; of a torchvision dataset
        it is the folder that has moved."""
        found = replace(self, model=model or self.model)
        if data is None:
            return found
        return replace(found, root=data) if self.root else replace(found, data=data)

    def source_of(self, data: str) -> str:
        """What data to be added are known by: a whole path, wherever a command runs; or as they were added before.

        Raises:
            InputError: they are the run's own.
        """
        place = Path(data).resolve()
        if place.exists() and place in (Path(self.data).resolve(), Path(self.root or self.data).resolve()):
            raise InputError(f"{data} are the run's own data. Add what is new in them by: fastntk remember.")
        known = [each for each in self.added if Path(each).resolve() == place]
        return known[0] if known else str(place) if place.exists() else data

    def joined(self, data: str) -> "Settings":
        """The same with data that were added."""
        return replace(self, added=[*(each for each in self.added if each != data), data])

    def fitting(self) -> Recipe:
        """How the model was fitted.

        Raises:
            InputError: a field is missing, or of a wrong type.
        """
        given = {each.name: self.recipe[each.name] for each in fields(Recipe)}
        try:
            return Recipe(**{**given, "loss": loss_from(given["loss"])})
        except TypeError as error:
            raise InputError(f"run.json does not describe a recipe ({error}). Restore it from a backup.") from error

    def images(self, preprocessing: Preprocessing, source: str | None = None, split: str = "train") -> Images:
        """The training data, or another source read in the same way, in the run's classes.

        Raises:
            InputError: it has other classes.
        """
        found = load_data(source or self.data, preprocessing, split=split, root=self.root, id_column=self.id_column)
        return found.under(self.classes)

    def network(self, folder: Path) -> tuple[nn.Module, Preprocessing]:
        """The fitted model of the run in a folder, on the CPU.

        Raises:
            InputError: one of the run's files is missing or damaged, or the model is another.
        """
        self.check_files(folder)
        model, preprocessing = load_model(self.model, len(self.classes), size=self.size or None)
        tune(model, *self.select)
        load_weights(model, read_tensors(folder / "model.safetensors")[0], with_head=True)
        return model, preprocessing

    def training(self, preprocessing: Preprocessing) -> Images:
        """The training data, with all that was added and is there; the latter's ids begin with the name of where they
        come from.

        Raises:
            InputError: like ``images``; they are not there any more; or two samples have the same id.
        """
        try:
            found = self.images(preprocessing)
        except InputError as error:
            if Path(self.root or self.data).exists():
                raise
            elsewhere = "If the run's data lie elsewhere now: --data (of learn, --fitted-to)."
            raise InputError(f"{error} {elsewhere}") from error
        for each in self.added:
            try:
                found = found.joined_by(self.images(preprocessing, each), each)
            except InputError:
                if _holds_files(Path(each)):
                    raise  # else they are gone, as those who were forgotten may be (``check_learned``)
        return found

    def check_samples(self, images: Images) -> None:
        """Raises ``InputError`` where the model was fitted to others: what is gone would stay in it unseen."""
        if self.samples not in (None, _sum(images)):
            raise InputError(
                "the data have other samples or labels than those that the model was fitted to, which no request could "
                "name. Put them back, or fit again."
            )

    def check_learned(self, images: Images, members: Collection[Id], holds: bool) -> None:
        """Raises ``InputError`` where data that were added are not among the images any more, and some are members;
        warns where the memory ``holds`` their rows."""
        lacking = set(members).difference(images.ids)
        for each in set(self.added) - set(images.by_source):
            if any(str(name).startswith(f"{Path(each).name}/") for name in lacking):
                told = f"images that were learned from {each} are in the memory: put them back there"
                if not holds:
                    raise InputError(f"{told}.")
                logging.getLogger(__name__).warning("%s, or nothing can be measured on them", told)

    def held_out(self, images: Images, test: str | None) -> Dataset:
        """The test images: of ``test``, or the test split of the run's own data, whose training ``images`` these are.

        Raises:
            InputError: the run's own data have no test split, so that the training images would be taken.
        """
        found = replace(self, id_column=None).images(images.preprocessing, test, split="test")
        whole = len(found) == images.parts[0][1] and torch.equal(found.labels, images.labels[: len(found)])
        if whole and torch.equal(found[0][0], images[0][0]):
            raise InputError(
                f"{test or self.data} has no test split. Give images that the model was not fitted to: --test."
            )
        return in_memory(found)

    def check_files(self, folder: Path) -> None:
        """Raises ``InputError`` that names the first of the run's files which is missing or damaged."""
        for name, expected in self.files.items():
            if file_digest(folder / name) != expected:
                raise InputError(f"{folder / name} is damaged. Restore it from a backup, or fit again.")


def _sum(images: Images) -> str:
    """By which ids and labels are known again."""
    state = sha256()
    for each, label in zip(images.ids, images.labels.tolist(), strict=True):
        state.update(f"{each}\t{label}\n".encode(errors="surrogateescape"))
    return state.hexdigest()


def _holds_files(place: Path) -> bool:
    return place.is_file() or any(each.is_file() for each in place.rglob("*"))
