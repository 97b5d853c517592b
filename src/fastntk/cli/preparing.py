"""What a run is fitted to, and the memory that is prepared of it: of an ordinary fit or of one that forgets exactly."""

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from fastntk.cli.asked import core_of
from fastntk.cli.settings import Settings
from fastntk.common.errors import InputError
from fastntk.inputs.images import Images, in_memory
from fastntk.jacobians.numerics import Numerics
from fastntk.memory.exact import fit_exact
from fastntk.memory.memory import Memory, prepare


class Preparation(NamedTuple):
    """How to prepare; as of ``fastntk.prepare``."""

    ridge: float | str
    form: str
    classes: int | str
    seed: int
    checkpoint: Path
    numerics: Numerics


def fitted_to(images: Images, core: str | None) -> Dataset:
    """What is fitted in the ordinary way: all images, or those of a core."""
    if core is None:
        return in_memory(images)
    place = {each: index for index, each in enumerate(images.ids)}
    ids = core_of(images, core)
    if unknown := [each for each in ids if each not in place]:
        raise InputError(f"the core names {unknown[0]!r}, which is not in the data ({len(unknown)} such).")
    return Subset(in_memory(images), [place[each] for each in ids])


def core_sum(images: Images, core: str | None) -> str | None:
    """By which a core is known again, whatever its file or pattern names by then."""
    if core is None:
        return None
    return sha256("\n".join(sorted(map(str, core_of(images, core)))).encode(errors="surrogateescape")).hexdigest()


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
