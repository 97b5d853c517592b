"""A run folder: what the command line leaves on disk between its commands, enough to replay each of them.

run.json               model, data, selection and recipe, as given
initial.safetensors    the tuned parameters before fitting
model.safetensors      the whole model as fitted
partial/               sums of a preparation that was cut off, until it is complete
memory/                the memory, see ``fastntk.memory.disk.folder``; samples that were forgotten are gone from it
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastntk.common import distributed
from fastntk.common.errors import InputError
from fastntk.common.files import file_digest, read_json, read_tensors, writable, write_json, write_tensors
from fastntk.evidence.auditing import audit
from fastntk.evidence.compare import compare, references
from fastntk.evidence.gain import amplified
from fastntk.evidence.methods import Method, Problem, Unlearned
from fastntk.evidence.report import Report
from fastntk.inputs.images import Images, in_memory, load_data
from fastntk.inputs.models import Preprocessing, load_model
from fastntk.inputs.weights import load_weights
from fastntk.memory.certificate import Audit
from fastntk.memory.disk.folder import Store
from fastntk.memory.members import Id
from fastntk.memory.memory import Memory, load
from fastntk.memory.plan import Plan, plan
from fastntk.memory.prepare import prepare, refresh
from fastntk.solve.collect import clear
from fastntk.solve.head import exact_head
from fastntk.tuning.fitting import Fit, Recipe, fit
from fastntk.tuning.loss import loss_from
from fastntk.tuning.selectors import tune


@dataclass(frozen=True)
class Settings:
    """What ``run.json`` holds; ``files`` are the SHA-256 of the tensors beside it."""

    model: str
    data: str
    root: str | None
    classes: list[str]
    select: list[str]
    size: int
    recipe: dict[str, Any]
    id_column: str | None = None
    files: dict[str, str] = field(default_factory=dict)

    def data_source(self, preprocessing: Preprocessing, source: str | None = None, split: str = "train") -> Images:
        """The training data, or another source read in the same way."""
        return load_data(source or self.data, preprocessing, split=split, root=self.root, id_column=self.id_column)


def parse_device(name: str) -> torch.device:
    """A device that is there.

    Raises:
        InputError: it is not.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} is not there ({str(error).splitlines()[0]}). Use 'cpu'.") from error
    return device


@dataclass(frozen=True)
class Start:
    """What a fit starts from, as the user names it."""

    model: str
    data: str
    root: str | None
    select: Sequence[str]
    size: int | None
    weights: str | None = None
    id_column: str | None = None

    def open(self, device: torch.device, seed: int = 0) -> tuple[nn.Module, Images]:
        """The model with a head for the data's classes, the selection tuned, and the data as it wants them."""
        _, preprocessing = load_model(self.model, 2, size=self.size)
        images = load_data(self.data, preprocessing, root=self.root, id_column=self.id_column)
        size = preprocessing.size or None
        module, _ = load_model(self.model, len(images.classes), weights=self.weights, size=size, seed=seed)
        tune(module, *self.select)
        return module.to(device).eval(), images


class Run:
    """One run folder, open on one device."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.folder, self.device = folder, parse_device(device)

    def _model(self, settings: Settings, file: str) -> tuple[nn.Module, Preprocessing]:
        model, preprocessing = load_model(settings.model, len(settings.classes), size=settings.size or None)
        tune(model, *settings.select)
        load_weights(model, read_tensors(self.folder / file)[0], with_head=True)
        return model.to(self.device), preprocessing

    def settings(self) -> Settings:
        """What the run was made with.

        Raises:
            InputError: the folder holds no run.
        """
        if not (self.folder / "run.json").is_file():
            raise InputError(
                f"{self.folder} holds no run. Make one with: fastntk fit {self.folder} --model ... --data ..."
            )
        try:
            return Settings(**read_json(self.folder / "run.json"))
        except TypeError as error:
            raise InputError(f"{self.folder / 'run.json'} does not describe a run ({error}).") from error

    def recipe(self, settings: Settings) -> Recipe:
        """How the model was fitted."""
        fields: dict[str, Any] = dict(settings.recipe)
        return Recipe(**{**fields, "loss": loss_from(fields["loss"])})

    def fit(self, start: Start, recipe: Recipe) -> Fit:
        """Fit a model and write the run.

        Raises:
            InputError: the folder cannot be written, or holds a run whose memory has answered requests.
        """
        writable(self.folder)
        Store(self.folder / "memory").check_unused()
        module, images = start.open(self.device, recipe.seed)
        settings = Settings(
            start.model,
            start.data,
            start.root,
            images.classes,
            list(start.select),
            images.preprocessing.size,
            asdict(recipe),
            start.id_column,
        )
        done = fit(module, in_memory(images), recipe)
        if distributed.rank():
            return done
        shutil.rmtree(self.folder / "memory", ignore_errors=True)
        clear(self.folder / "partial")
        write_tensors(self.folder / "initial.safetensors", done.initial)
        write_tensors(self.folder / "model.safetensors", module.state_dict())
        self._seal(settings)
        return done

    def _seal(self, settings: Settings) -> None:
        """Write ``run.json`` for the tensors that are there now."""
        files = {name: file_digest(self.folder / name) for name in ("initial.safetensors", "model.safetensors")}
        write_json(self.folder / "run.json", asdict(replace(settings, files=files)))

    def _opened(self) -> tuple[Settings, nn.Module, Images]:
        """Settings, the fitted model and its training data, of which no image is read."""
        settings = self.settings()
        model, preprocessing = self._model(settings, "model.safetensors")
        images = settings.data_source(preprocessing)
        if images.classes != settings.classes:
            raise InputError(f"{settings.data} now has other classes than when the run was made: {images.classes}.")
        return settings, model, images

    def memory(self) -> tuple[Memory, Images]:
        """The memory, over the training data; only the images that are asked for are read."""
        _, model, images = self._opened()
        return load(self.folder / "memory", model, images), images

    def _initial(self) -> dict[str, Tensor]:
        tensors, _ = read_tensors(self.folder / "initial.safetensors")
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def prepare(self, ridge: float | str, form: str, seed: int = 0, **options: Any) -> Memory:
        """Prepare the memory and write it; ``options`` are further ones of ``fastntk.prepare``.

        Raises:
            InputError: the folder cannot be written, or its memory has answered requests.
        """
        writable(self.folder)
        Store(self.folder / "memory").check_unused()
        settings, model, images = self._opened()
        given = {"ridge": ridge, "form": form, "loss": self.recipe(settings).loss, "seed": seed, **options}
        memory = prepare(model, in_memory(images), self._initial(), checkpoint=self.folder / "partial", **given)
        if distributed.rank() == 0:
            memory.save(self.folder / "memory")
            clear(self.folder / "partial")  # of an earlier attempt in another form
        return memory

    def plan(self, form: str, **options: Any) -> Plan:
        """What preparing would take; ``options`` are further ones of ``fastntk.plan``."""
        settings, model, images = self._opened()
        return plan(model, images, form=form, loss=self.recipe(settings).loss, **options)

    def refresh(self) -> tuple[float, Memory]:
        """Re-anchor the memory at the current weights, which become the run's model; the seconds, and the memory."""
        settings, model, images = self._opened()
        memory = load(self.folder / "memory", model, in_memory(images))
        seconds = refresh(memory, self.folder / "partial")
        write_tensors(self.folder / "model.safetensors", {**model.state_dict(), **memory.parameters})
        self._seal(settings)
        return seconds, memory

    def audit(self, fraction: float, class_name: str | None, test: str | None, seed: int) -> Audit:
        """Audit the memory, with the run's own recipe."""
        settings, model, images = self._opened()
        memory = load(self.folder / "memory", model, in_memory(images))
        ids = None if class_name is None else of_class(images, class_name, memory)
        held_out = _held_out(settings, images, test) if test else None
        return audit(memory, self.recipe(settings), fraction=fraction, ids=ids, held_out=held_out, seed=seed)

    def verify(self) -> Memory:
        """The memory, if every file of the run is what was written.

        Raises:
            InputError: one is missing or damaged, or they do not belong together.
        """
        for name, expected in self.settings().files.items():
            if file_digest(self.folder / name) != expected:
                raise InputError(f"{self.folder / name} is damaged. Restore it from a backup.")
        return self.memory()[0]

    def export(self, out: Path, with_exact_head: bool = False, with_gain: bool = False) -> None:
        """Write the whole model after all requests, a plain state dict; if asked, ``fastntk.amplified``, and its head
        from ``fastntk.exact_head``.

        Raises:
            InputError: the memory has no audit or exact head, its gain is below 1 and no head follows, or the data lack
                one of its members.
        """
        memory, _ = self.memory()
        if with_gain and not with_exact_head and memory.audit and memory.audit.gain < 1:
            raise InputError(
                f"the audit's gain is {memory.audit.gain:.2f}, and one below 1 draws the answer back towards what was "
                "forgotten. Export with --exact-head too, or without --gain."
            )
        parameters = amplified(memory, least=0.0) if with_gain else memory.parameters
        parameters = exact_head(memory, parameters) if with_exact_head else parameters
        write_tensors(out, {**memory.model.state_dict(), **parameters})

    def evaluate(self, test: str | None, retrain: bool, seed: int | None = None) -> Report:
        """The fitted and the unlearned model beside two that are retrained without what was forgotten."""
        settings, model, images = self._opened()
        train = in_memory(images)
        memory = load(self.folder / "memory", model, train)
        held_out = _held_out(settings, images, test)
        known = set(memory.ids)
        forget = torch.tensor([place for place, each in enumerate(images.ids) if each not in known], dtype=torch.long)
        if not len(forget):
            raise InputError("nothing has been forgotten in this run yet. Use: fastntk forget RUN --ids ...")
        problem = Problem(model, self._initial(), train, forget, self.recipe(settings), memory)
        other = problem.recipe.seed + 1 if seed is None else seed
        methods: dict[str, Method] = references(other) if retrain else {}
        answers, stepped = {"fastntk": memory.parameters}, {"fastntk": memory.parameters}
        if memory.audit:
            answers["fastntk_gain"], stepped["fastntk_gain"] = amplified(memory), amplified(memory, least=0.0)
        if memory.short_of_head is not None:
            answers |= {f"{name}_exact_head": exact_head(memory, step) for name, step in stepped.items()}
        ours = {name: _answered(answer) for name, answer in answers.items()}
        return compare(problem, held_out, {**methods, **ours})[0]


def _answered(parameters: Mapping[str, Tensor]) -> Method:
    """What has been answered already, as a method."""
    return lambda problem: Unlearned(dict(parameters), None)


def _held_out(settings: Settings, images: Images, test: str | None) -> Dataset:
    """The test images: of ``test``, or the test split of the run's own data.

    Raises:
        InputError: the run's own data have no test split, so that the training images would be taken.
    """
    held_out = settings.data_source(images.preprocessing, test, split="test")
    if test is None and torch.equal(held_out.labels, images.labels) and torch.equal(held_out[0][0], images[0][0]):
        raise InputError(f"{settings.data} has no test split. Give images that the model was not fitted to: --test.")
    return in_memory(held_out)


def of_class(images: Images, class_name: str, memory: Memory) -> list[Id]:
    """The ids of a class's samples that are in the memory.

    Raises:
        InputError: there is no such class, or none of its samples is left.
    """
    if class_name not in images.classes:
        raise InputError(f"there is no class {class_name!r}. The classes are: {', '.join(images.classes)}.")
    members = (images.labels == images.classes.index(class_name)).nonzero()[:, 0].tolist()
    known = set(memory.ids)
    ids = [images.ids[index] for index in members if images.ids[index] in known]
    if not ids:
        raise InputError(f"no sample of class {class_name!r} is in the memory: it was forgotten already.")
    return ids


def read_ids(text: str, images: Images) -> list[Id]:
    """The ids that a text names: separated by commas or lines, or, if they are numbers, by spaces too.

    What is no id of ``images`` stays as it is, for the memory to refuse.
    """
    known = {str(each): each for each in images.ids}
    words = [word.strip() for word in text.replace(",", "\n").splitlines()]
    if all(part.isdecimal() for word in words for part in word.split()):
        words = [part for word in words for part in word.split()]
    return [known.get(word, int(word) if word.isdecimal() else word) for word in words if word]
