"""What a run is fitted to, and the memory that is prepared of it: of an ordinary fit or of one that forgets exactly."""

from collections.abc import Mapping
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


class Asked(NamedTuple):
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


def memory_of(
    settings: Settings, model: nn.Module, images: Images, initial: Mapping[str, Tensor], asked: Asked
) -> Memory:
    """The memory of a run's fitted model.

    Raises:
        InputError: like ``fastntk.prepare`` and ``fastntk.fit_exact``, which has one form alone.
    """
    recipe, data = settings.fitting(), in_memory(images)
    if settings.core is None:
        return prepare(
            model, data, initial, loss=recipe.loss, shrinkage=recipe.shrinkage(len(images)), **asked._asdict()
        )
    if asked.form not in ("auto", "convex"):
        raise InputError(f"a fit that forgets exactly has the convex form alone, not {asked.form!r}. Leave --form out.")
    return fit_exact(
        model,
        data,
        core_of(images, settings.core),
        recipe,
        fitted=True,
        ridge=asked.ridge,
        classes=asked.classes,
        checkpoint=asked.checkpoint,
        numerics=asked.numerics,
    )
