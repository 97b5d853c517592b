"""What names a sample."""

import operator
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, Subset

from fastntk.common.errors import InputError

Id = int | str
"""What names a sample: its index, or what the data source's ``ids`` has for it, such as a path."""


def ids_of(source: Dataset) -> Sequence[Id]:
    """What names each sample of a source: its ``ids``, in a ``Subset`` those of what it is of, or their indices.

    Raises:
        InputError: they are not one a sample, each its own, whole numbers or text.
    """
    count = len(source)  # type: ignore[arg-type]
    ids = _given(source)
    if ids is None:
        return range(count)
    if isinstance(ids, range):
        found: Sequence[Id] = ids
    else:
        found = _once(ids, "stands twice among the data source's ids. Give each sample its own.")
    if len(found) != count:
        raise InputError(f"the data source has {len(found)} ids for {count} samples. Give each sample one.")
    return found


def _given(source: Dataset) -> Any:
    """A source's own ids, or those of what it is a part of."""
    if hasattr(source, "ids") or not isinstance(source, Subset):
        return getattr(source, "ids", None)
    known = _given(source.dataset)
    return None if known is None else [known[index] for index in source.indices]


def composed(text: str) -> str:
    """With letters and their accents in one: names of files have both."""
    return unicodedata.normalize("NFC", text)


def by_name(ids: Iterable[Id]) -> dict[str, Id]:
    """The ids by what they are written as, and by that composed."""
    ids = list(ids)
    return {composed(str(each)): each for each in ids} | {str(each): each for each in ids}


def once(ids: Iterable[Id]) -> list[Id]:
    """The ids of a request, checked.

    Raises:
        InputError: one stands twice, or is neither a whole number nor text.
    """
    return _once(ids, "stands twice in the request. Name each sample once.")


def _once(ids: Any, twice: str) -> list[Id]:
    if isinstance(ids, Tensor | np.ndarray):
        ids = ids.tolist()
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise InputError(f"ids must be a list, not {ids!r} alone. Put it into one: [{ids!r}].")
    found: dict[Id, None] = {}
    for each in map(_id, ids):
        if each in found:
            raise InputError(f"id {each!r} {twice}")
        found[each] = None
    return list(found)


def _id(value: Any) -> Id:
    """A whole number of whatever library, or text."""
    if isinstance(value, str):
        return str(value)
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError("neither")
        return operator.index(value)
    except TypeError as error:
        raise InputError(f"an id is a whole number or text, not {value!r}, a {type(value).__name__}.") from error
