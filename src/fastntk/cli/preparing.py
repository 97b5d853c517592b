"""What a run is fitted to, and the memory that is prepared of it: of an ordinary fit or of one that forgets exactly."""

from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from fastntk.cli.asked import core_of
from fastntk.cli.settings import Given, Settings
from fastntk.common.errors import InputError
from fastntk.inputs.batches import digests
from fastntk.inputs.heads import head_parameters, take_backbone
from fastntk.inputs.ids import Id
from fastntk.inputs.images import Images, in_memory
from fastntk.inputs.sources import load_data
from fastntk.inputs.weights import load_weights, read_weights
from fastntk.jacobians.numerics import Numerics
from fastntk.memory.certificate import Removal
from fastntk.memory.exact import BATCH, KEPT, digests_apart, fit_exact
from fastntk.memory.members import Members
from fastntk.memory.memory import Memory, prepare
from fastntk.tuning.fitting import Fit, fit
from fastntk.tuning.parameters import snapshot, tuned
from fastntk.tuning.rebuilding import rebuilt_start
from fastntk.tuning.recipe import Recipe


class Preparation(NamedTuple):
    """How to prepare; as of ``fastntk.prepare``."""

    ridge: float | str
    form: str
    classes: int | str
    seed: int
    checkpoint: Path
    numerics: Numerics


Core = list[Id] | Images | None
"""Ids of a run's images, or other images; None in an ordinary fit."""


def held_out_of(images: Images, validation: str | None, root: str | None) -> Dataset | None:
    """The images that the accuracy is measured on after every epoch, if some were named."""
    if validation is None:
        return None
    found = load_data(validation, images.preprocessing, split="test", root=root)
    return in_memory(found.under(images.classes))


def form_and_classes(settings: Settings, form: str, classes: int | str) -> tuple[str, int | str]:
    """The form and classes that a plan is of; of a fit that forgets exactly those it takes at least."""
    if settings.core is None or form != "auto":
        return form, classes
    return "convex", min(KEPT[0], len(settings.classes)) if classes == "auto" else classes


def fitted(
    module: nn.Module, images: Images, core: Core, given: Given, recipe: Recipe, held_out: Dataset | None
) -> Fit:
    """The fit of a run: one that was done elsewhere, or one that is done now. Raises like these."""
    if given.fitted:
        return _taken_over(module, core, given, recipe)
    return _first_fit(module, images, core, given, recipe, held_out)


def _taken_over(module: nn.Module, core: Core, given: Given, recipe: Recipe) -> Fit:
    """A fit that was done elsewhere, to the core if there is one, whose start is of no account then; else the start is
    rebuilt from the pretrained weights.

    Raises:
        InputError: the weights do not fit, or nobody said what the pretrained ones are.
    """
    load_weights(module, read_weights(Path(str(given.fitted))), with_head=True)
    if core is not None:
        return Fit(snapshot(tuned(module)), [], recipe, 0.0, assumed=["the weights were fitted to the core alone"])
    begun = rebuilt_start(module, given.pretrained, head=given.head_start)
    return Fit(begun.initial, [], recipe, 0.0, assumed=begun.assumed)


def _first_fit(
    module: nn.Module, images: Images, core: Core, given: Given, recipe: Recipe, held_out: Dataset | None
) -> Fit:
    """Fit to the core alone, or to all images if there is none.

    Raises:
        InputError: like ``fit``; the core has classes of its own, and held-out images of ``module``'s classes would be
            measured by a model of the core's, or the head is not tuned.
    """
    if isinstance(core, Images) and core.classes != images.classes:
        if held_out is not None:
            raise InputError("the core has classes of its own, which --validation does not measure. Leave it out.")
        return _fitted_but_for_the_head(module, core, given, recipe)
    data: Dataset = in_memory(core if isinstance(core, Images) else images)
    if isinstance(core, list):
        place = {each: index for index, each in enumerate(images.ids)}
        data = Subset(data, [place[each] for each in core])
    return fit(module, data, recipe, validation=held_out)


def _fitted_but_for_the_head(module: nn.Module, core: Images, given: Given, recipe: Recipe) -> Fit:
    """Fit to images of other classes with a head for these; ``module`` takes the rest of it."""
    initial = snapshot(tuned(module))
    if not set(head_parameters(module)) <= set(initial):
        raise InputError("a core of other classes leaves a new head to be solved for: --select must have head in it.")
    other = given.model_for(core, recipe.seed).to(next(module.parameters()).device)
    done = fit(other, in_memory(core), recipe)
    take_backbone(module, other)
    return replace(done, initial=initial)


def core_sum(core: Core, samples: Images | None = None) -> str | None:
    """By which a core is known again, whatever its file, folder or pattern names by then: its ids, or its images.

    Raises:
        InputError: some of the ``samples`` that are not of the core show the same as images of the core.
    """
    if core is None:
        return None
    if isinstance(core, list):
        if samples is not None:
            digests_apart(samples, Members(samples).positions(core))
        return sha256("\n".join(sorted(map(str, core))).encode(errors="surrogateescape")).hexdigest()
    pixels = digests(core, range(len(core)), BATCH) if samples is None else digests_apart(samples, core)
    return sha256(torch.stack([pixels, core.labels]).numpy().tobytes()).hexdigest()


def memory_of(
    settings: Settings, model: nn.Module, images: Images, initial: Mapping[str, Tensor], how: Preparation
) -> Memory:
    """The memory of a run's fitted model.

    Raises:
        InputError: like ``fastntk.prepare`` and ``fastntk.fit_exact``, which has one form alone; or the core is not
            the one that was fitted, and others would be promised to be forgotten exactly.
    """
    recipe, data = settings.fitting(), in_memory(images)
    if settings.core is None:
        return prepare(model, data, initial, loss=recipe.loss, shrinkage=recipe.shrinkage(len(images)), **how._asdict())
    if how.form not in ("auto", "convex"):
        raise InputError(f"a fit that forgets exactly has the convex form alone, not {how.form!r}. Leave --form out.")
    core = core_of(images, settings.core)
    if core_sum(core) != settings.core_sum:
        raise InputError(f"the core {settings.core!r} names other samples than when it was fitted. Fit again.")
    return fit_exact(
        model,
        data,
        core,
        recipe,
        fitted=True,
        ridge=how.ridge,
        classes=how.classes,
        removal=Removal(*settings.removal) if settings.removal else None,
        checkpoint=how.checkpoint,
        numerics=how.numerics,
    )
