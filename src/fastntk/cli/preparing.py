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
from fastntk.inputs.heads import head_parameters
from fastntk.inputs.images import Images, in_memory
from fastntk.inputs.weights import load_weights
from fastntk.jacobians.numerics import Numerics
from fastntk.memory.exact import fit_exact
from fastntk.memory.memory import Memory, prepare
from fastntk.tuning.fitting import Fit, fit
from fastntk.tuning.parameters import snapshot, tuned
from fastntk.tuning.recipe import Recipe


class Preparation(NamedTuple):
    """How to prepare; as of ``fastntk.prepare``."""

    ridge: float | str
    form: str
    classes: int | str
    seed: int
    checkpoint: Path
    numerics: Numerics


def fitted_to_core(module: nn.Module, images: Images, given: Given, recipe: Recipe, held_out: Dataset | None) -> Fit:
    """Fit to the core of ``images`` alone, or to all of them where none was given; raises like ``core_of``."""
    core = images if given.core is None else core_of(images, given.core)
    if isinstance(core, Images) and core.classes != images.classes:
        if held_out is not None:
            raise InputError("the core has classes of its own, which --validation does not measure. Leave it out.")
        return _fitted_but_for_the_head(module, core, given, recipe)
    data = in_memory(core if isinstance(core, Images) else images)
    if not isinstance(core, Images):
        place = {each: index for index, each in enumerate(images.ids)}
        data = Subset(data, [place[each] for each in core])
    return fit(module, data, recipe, validation=held_out)


def _fitted_but_for_the_head(module: nn.Module, core: Images, given: Given, recipe: Recipe) -> Fit:
    """Fit to images of other classes with a head for these; ``module`` takes the rest of it, and a head of zeros: one
    that was drawn answers worse (docs/exact.md)."""
    initial, device = snapshot(tuned(module)), next(module.parameters()).device
    other = given.model_for(core, recipe.seed).to(device)
    done, heads = fit(other, in_memory(core), recipe), set(head_parameters(other))
    load_weights(module, {name: each for name, each in other.state_dict().items() if name not in heads})
    with torch.no_grad():
        for name in head_parameters(module):
            module.get_parameter(name).zero_()
    return replace(done, initial=initial)


def core_sum(images: Images, core: str | None) -> str | None:
    """By which a core is known again, whatever its file, folder or pattern names by then."""
    if core is None:
        return None
    found = core_of(images, core)
    ids = found.ids if isinstance(found, Images) else found
    return sha256("\n".join(sorted(map(str, ids))).encode(errors="surrogateescape")).hexdigest()


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
    if core_sum(images, settings.core) != settings.core_sum:
        raise InputError(f"the core {settings.core!r} names other samples than when it was fitted. Fit again.")
    return fit_exact(
        model,
        data,
        core_of(images, settings.core),
        recipe,
        fitted=True,
        ridge=how.ridge,
        classes=how.classes,
        checkpoint=how.checkpoint,
        numerics=how.numerics,
    )
