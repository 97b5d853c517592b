"""What a benchmark asks a model to forget: a class, or a share of the images at random."""

from torch.utils.data import Dataset, Subset

from fastntk.common.errors import InputError
from fastntk.common.seeds import random_order
from fastntk.inputs.batches import labels_of
from fastntk.inputs.ids import Id, ids_of


def drawn(request: str, train: Dataset, test: Dataset, seed: int = 0, gone: int = 0) -> tuple[list[Id], Dataset]:
    """The ids of a request in the training set, and the test images: those of a class go with it.

    Args:
        request: ``class`` or ``random P%``.
        train: the labelled training images.
        test: the labelled test images.
        seed: of a random share.
        gone: the class.

    Raises:
        InputError: the request is neither, or none of the images.
    """
    labels, part, ids = labels_of(train), share(request), ids_of(train)
    if part is None:
        staying = (labels_of(test) != gone).nonzero()[:, 0].tolist()
        return [ids[place] for place in (labels == gone).nonzero()[:, 0].tolist()], Subset(test, staying)
    count = round(part * len(labels))
    if not count:
        raise InputError(f"{request} of {len(labels)} images is none.")
    places = random_order(len(labels), seed)[:count].sort().values
    return [ids[place] for place in places.tolist()], test


def share(request: str) -> float | None:
    """The share of samples of a request such as ``random 10%``; None for ``class``.

    Raises:
        InputError: it is neither.
    """
    if request == "class":
        return None
    word, _, percent = str(request).partition(" ")
    try:
        part = float(percent.removesuffix("%")) / 100
    except ValueError:
        part = 0.0
    if word != "random" or not 0 < part < 1:
        raise InputError(f"a request is 'class' or 'random P%', not {request!r}.")
    return part
