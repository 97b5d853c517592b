"""What fitting starts from: a model with a head for the data's classes, and the data as it wants them."""

from collections.abc import Callable, Sequence

from torch import nn

from fastntk.inputs.images import Images, Preprocessing
from fastntk.inputs.models import load_model
from fastntk.tuning.selectors import tune


def start(
    name: str,
    read: Callable[[Preprocessing], Images],
    select: Sequence[str],
    *,
    size: int | None = None,
    weights: str | None = None,
    seed: int = 0,
) -> tuple[nn.Module, Images]:
    """The model, tuned and not fitted, and its training images.

    Args:
        name: of the model, as for ``load_model``.
        read: the images, preprocessed as the model wants them.
        select: what to tune, as for ``tune``.
        size: the side of the images in pixels; by default the model's own.
        weights: a local state dict, or ``"pretrained"``.
        seed: of the head.

    Raises:
        InputError: like ``load_model``, ``tune`` and ``read``.
    """
    _, preprocessing = load_model(name, 2, size=size)
    images = read(preprocessing)
    model, _ = load_model(name, len(images.classes), weights=weights, size=preprocessing.size, seed=seed)
    tune(model, *select)
    return model, images
