"""A run folder: what the command line leaves on disk between its commands, enough to replay each of them.

run.json               model, data, selection and recipe, as given
initial.safetensors    the tuned parameters before fitting
model.safetensors      the whole model as fitted
partial/               sums of a preparation that was cut off, until it is complete
memory/                the memory, see ``fastntk.memory.disk``; samples that were forgotten are gone from it
lock, underway         held while the fit's files are replaced, in one step; there while a refresh is not complete

Whatever a command that was killed has left is gone on with, or undone, when the run is next opened.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from fastntk.cli import preparing
from fastntk.cli.asked import core_of, forgotten, of_class, owners_said, warn_of_heads, warn_of_outputs
from fastntk.cli.options import check_out
from fastntk.cli.settings import Given, Settings
from fastntk.common import distributed
from fastntk.common.errors import InputError
from fastntk.common.files import (
    DECIDED,
    check_writable,
    complete,
    digest,
    file_digest,
    held,
    lock_of,
    read_tensors,
    settled,
    switching,
    underway,
    writable,
    write_json,
    write_tensors,
)
from fastntk.common.machine import parse_device
from fastntk.evidence.auditing import Sameness, audit, audit_exact, left_out_gain
from fastntk.evidence.card import card
from fastntk.evidence.compare import compare, references
from fastntk.evidence.methods import Problem
from fastntk.evidence.report import Report
from fastntk.inputs.called import state_at
from fastntk.inputs.hub import check_hub, write_hub
from fastntk.inputs.ids import Id
from fastntk.inputs.images import Images, in_memory
from fastntk.inputs.owners import owners_of
from fastntk.inputs.weights import check_state_file, write_state
from fastntk.jacobians.numerics import Numerics
from fastntk.memory.audit import Audit
from fastntk.memory.certificate import Answer
from fastntk.memory.disk.folder import Folder
from fastntk.memory.finish import audited_gain, check_gain, every_way, finished, refresh
from fastntk.memory.memory import Memory, load
from fastntk.memory.plan import Plan, plan
from fastntk.solve.collect import clear
from fastntk.tuning.fitting import Fit
from fastntk.tuning.lora import merged
from fastntk.tuning.parameters import snapshot, tuned
from fastntk.tuning.recipe import Recipe

log = logging.getLogger(__name__)

_RUN, _TENSORS = "run.json", ("initial.safetensors", "model.safetensors")


class Run:
    """One run folder, open on one device."""

    def __init__(self, folder: Path, device: str = "cpu", data: str | None = None, model: str | None = None) -> None:
        """``data`` and ``model`` say where the training data and the model lie now; None where they did."""
        self.folder, self.device, self._moved = folder, parse_device(device), (data, model)

    @property
    def here(self) -> Settings:
        """The settings, with where data and model lie now."""
        return self.settings().moved(*self._moved)

    def settings(self) -> Settings:
        """What the run was made with.

        Raises:
            InputError: the folder holds no run, or one of an unknown format.
        """
        if (self.folder / DECIDED).is_dir():
            with self._locked():
                pass  # whoever takes the lock completes what was decided
        if not (self.folder / _RUN).is_file():
            raise InputError(f"{self.folder} holds no run. Make one: fastntk fit {self.folder} --model ... --data ...")
        return Settings.read(self.folder / _RUN)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """No other process replaces the run's files meanwhile."""
        with held(lock_of(self.folder), self.folder):
            complete(self.folder)
            yield

    def fit(self, given: Given, recipe: Recipe, validation: str | None = None) -> Fit:
        """Fit a model, or take one that was fitted, and write the run; ``validation`` names data to measure the
        accuracy on after every epoch.

        Raises:
            InputError: the folder cannot be written, or holds a run whose memory has answered requests, at last
                while this was fitted.
        """
        self.check_free()
        module, images = given.open(self.device, recipe.seed)
        log.info("%s", images)
        if given.owners:
            log.info("of %d owners", len(set(owners_of(given.owners, given.data, images).values())))
        held_out = preparing.held_out_of(images, validation, given.root)
        core = None if given.core is None else core_of(images, given.core)
        core_sum = preparing.core_sum(core, images)
        done = preparing.fitted(module, images, core, given, recipe, held_out)
        settings = replace(Settings.of(given, images, recipe), core_sum=core_sum)
        if distributed.rank() == 0:
            self.write(settings, done.initial, module)
        distributed.wait()  # for what the next step opens
        return done

    def write(self, settings: Settings, initial: Mapping[str, Tensor], model: nn.Module) -> None:
        """The run of a fitted model, in place of what is in the folder.

        Args:
            settings: how it was fitted.
            initial: its tuned parameters before.
            model: fitted.

        Raises:
            InputError: like ``check_free``.
        """
        tensors = dict(zip(_TENSORS, (initial, model.state_dict()), strict=True))
        writable(self.folder)
        with self._locked(), Folder(self.folder / "memory").unused():
            self._replace(settings, tensors, gone=("memory", "partial"))

    def check_free(self) -> None:
        """Raises ``InputError`` if the folder cannot be written, holds somebody else's files, or a run whose memory has
        answered requests."""
        check_writable(self.folder)
        others = [name for name in (*_TENSORS, "ledger.sqlite") if (self.folder / name).exists()]
        if others and not (self.folder / _RUN).exists() and not (self.folder / DECIDED).is_dir():
            raise InputError(f"{self.folder} holds no run, but {others[0]}. Choose a folder that is empty or new.")
        Folder(self.folder / "memory").check_unused()

    def _replace(self, settings: Settings, tensors: Mapping[str, Mapping[str, Tensor]], gone: Sequence[str]) -> None:
        """Other tensors, with a ``run.json`` that says so, in one step; the lock must be held."""
        with switching(self.folder, gone) as staged:
            for name, each in tensors.items():
                write_tensors(staged / name, each)
            sums = {**settings.files, **{name: file_digest(staged / name) for name in tensors}}
            write_json(staged / _RUN, replace(settings, files=sums).written())

    def _opened(self) -> tuple[Settings, nn.Module, Images]:
        """Settings, the fitted model and its training data, of which no image is read."""
        settings = self.settings()
        here = settings.moved(*self._moved)
        model, preprocessing = here.network(self.folder)
        return settings, model.to(self.device), here.training(preprocessing)

    def memory(self, all_images: bool = False) -> tuple[Memory, Images]:
        """The memory, over the training data; only the images that are asked for are read, or all at once.

        Raises:
            InputError: a file is missing or damaged, or they do not belong together.
        """
        settings, model, images = self._opened()
        return self._loaded(settings, model, images, all_images), images

    def _loaded(self, settings: Settings, model: nn.Module, images: Images, all_images: bool = False) -> Memory:
        """The memory; the run's model is its anchor, which a refresh that was cut off has not made it yet.

        Raises:
            InputError: they do not belong together, or what was learned is gone while it is in the memory.
        """
        fitted = snapshot(tuned(model))
        memory = load(self.folder / "memory", model, in_memory(images) if all_images else images)
        settings.check_learned(images, memory.ids, memory.state.solution.holds)
        if digest(fitted) != digest(memory.anchor):
            if not any(each.kind == "refresh" for each in memory.requests()):
                raise InputError(f"the memory in {self.folder} was prepared for another fit. Prepare again.")
            self._change(lambda settings: settings, state_at(memory.model, memory.anchor))
        settled(self.folder)
        return memory

    def _change(self, change: Callable[[Settings], Settings], model: Mapping[str, Tensor] | None = None) -> None:
        """The settings as they are by then, and the model if there is another."""
        with self._locked():
            self._replace(change(self.settings()), {_TENSORS[1]: model} if model else {}, gone=())

    def prepare(
        self, ridge: float | str, form: str, classes: int | str, seed: int, numerics: Numerics, ready: bool = False
    ) -> Memory:
        """Prepare the memory, make it ready if asked to, and write it; arguments as of ``fastntk.prepare``.

        Raises:
            InputError: the folder cannot be written, or its memory has answered requests.
        """
        check_writable(self.folder)
        Folder(self.folder / "memory").check_unused()
        if self.settings().added:  # by a command that was interrupted before it had learned them
            self._change(partial(replace, added=[]))
        settings, model, images = self._opened()
        settings.check_samples(images)
        tensors, _ = read_tensors(self.folder / "initial.safetensors")
        initial = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        how = preparing.Preparation(ridge, form, classes, seed, self.folder / "partial", numerics)
        memory = preparing.memory_of(settings, model, images, initial, how)
        if distributed.rank() == 0:
            if ready:
                memory.ready()
            with self._locked():
                if self.settings() != settings:
                    raise InputError(f"{self.folder} was fitted anew meanwhile. Prepare again.")
                memory.save(self.folder / "memory")
            clear(self.folder / "partial")  # of an earlier attempt in another form
        return memory

    def learn(self, data: str, full: bool = False) -> tuple[Memory, Answer]:
        """Add all images of other data to the memory, and to the run's data; exact as a request is.

        Raises:
            InputError: they are there already, of other classes, or cannot be read.
        """
        data = self.here.source_of(data)
        settings, model, images = self._opened()
        if data not in images.by_source:
            images = images.joined_by(settings.images(images.preprocessing, data), data)
        memory, wanted = self._loaded(settings, model, images), images.by_source[data]
        if set(wanted) & set(memory.ids):
            raise InputError(f"{data} was learned already. Name other images, or use: fastntk remember.")
        if settings.owners:
            try:
                owners_said(self.here, images)  # says of how many nobody is the owner
            except InputError as error:
                log.warning("whose they are is not known: %s", error)
        with self._locked():  # nobody else learns the same meanwhile
            before = self.settings()
            self._replace(before.joined(data), {}, gone=())
            try:
                return memory, memory.remember(wanted, full=full)
            except InputError:
                self._replace(before, {}, gone=())
                raise

    def plan(self, form: str, classes: int | str, numerics: Numerics) -> Plan:
        """What preparing would take."""
        settings, model, images = self._opened()
        form, classes = preparing.form_and_classes(settings, form, classes)
        recipe = settings.fitting()
        return plan(
            model,
            images,
            form=form,
            classes=classes,
            loss=recipe.loss,
            epochs=recipe.epochs,
            checkpoint=self.folder / "partial",
            numerics=numerics,
        )

    def purge(self, memory: Memory) -> float:
        """Remove every trace of who has left, with partial sums and the digest of all ids; the seconds."""
        clear(self.folder / "partial")
        if self.settings().samples:
            self._change(partial(replace, samples=None))
        seconds = memory.purge()
        warn_of_outputs(self.folder, memory)
        return seconds

    def refresh(self, exact_head: bool | None = None, gain: bool = False) -> tuple[float, Memory]:
        """Re-anchor the memory at its answer, which becomes the run's model; the seconds, and the memory."""
        memory, _ = self.memory(all_images=True)
        warn_of_heads(memory, exact_head is not False)
        if memory.audit and not gain:
            log.warning("the audit, whose gain (%.2f) is not taken (--gain), is gone with a refresh", memory.audit.gain)
        with underway(self.folder):
            seconds = refresh(memory, self.folder / "partial", gain=gain, exact_head=exact_head)
            self._change(lambda settings: settings, state_at(memory.model, memory.anchor))
        warn_of_outputs(self.folder, memory)
        return seconds, memory

    def audit(self, fraction: float, class_name: str | None, test: str | None, seed: int) -> Audit | Sameness:
        """Audit the memory, with the run's own recipe; a fit that forgets exactly, by that fit."""
        memory, images = self.memory(all_images=True)
        ids = None if class_name is None else of_class(images, class_name, memory)
        if memory.state.core is not None and not test:
            return audit_exact(memory, fraction=fraction, ids=ids, seed=seed)
        held_out = self.here.held_out(images, test) if test else None
        return audit(memory, self.settings().fitting(), fraction=fraction, ids=ids, held_out=held_out, seed=seed)

    def export(
        self, out: Path, exact_head: bool = False, gain: bool = False, held_out: str | None = None, hub: bool = False
    ) -> tuple[float | None, str]:
        """Write the whole model after all requests, a plain state dict or (``hub``) a folder that timm or transformers
        load; if asked, finished (``fastntk.memory.finish``) by the audit's gain or by the one that held-out data set.

        Returns:
            The gain, and what loads the folder.

        Raises:
            InputError: the memory has no audit or exact head, the gain is below 1 and no head follows, the data lack
                one of its members, or the architecture is not the library's own any more.
        """
        if hub:
            check_hub(self.here.model, out)
        else:
            check_state_file(out)
        memory, images = self.memory()
        check_out(None if hub else out, self.folder)
        if gain or held_out is not None or exact_head:
            memory.state.check_anchored("a gain or another head would make them others")
        taken = audited_gain(memory.state) if gain else None
        if held_out is not None:
            taken = left_out_gain(memory, self.here.held_out(images, held_out))
        check_gain(taken, exact_head)
        warn_of_heads(memory, exact_head)
        parameters = finished(memory, gain=taken or False, exact_head=exact_head)
        if not hub:
            write_state(out, state_at(memory.model, parameters))
            return taken, ""
        model, told = merged(memory.model, parameters), card(memory, taken, exact_head)
        return taken, write_hub(self.here.model, model, images.preprocessing, images.classes, told, out)

    def evaluate(
        self, test: str | None, retrained: int, seed: int | None = None, ids: Callable[[Images], list[Id]] | None = None
    ) -> Report:
        """The fitted and the unlearned model beside some that are retrained without what was forgotten, which ``ids``
        may name among the images."""
        memory, images = self.memory(all_images=True)
        forget = forgotten(images, memory, ids(images) if ids else None)
        if any(each.kind == "refresh" for each in memory.requests()):
            log.warning("'original' is the answer that the latest refresh began from, and relearning is beside it")
        problem = Problem(memory, forget, self.settings().fitting())
        count = retrained if memory.state.core is None else min(retrained, 1)  # of exact fits all are the same
        methods = references(problem.recipe.seed + 1 if seed is None else seed, count, problem.recipe.seed)
        return compare(problem, self.here.held_out(images, test), methods, answered=every_way(memory))[0]
