"""Values of the types that a dataclass says of its fields."""

import types
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from fastntk.common.errors import InputError

_SAID = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def check_types(instance: Any) -> None:
    """Raises ``InputError`` for a field of a dataclass whose value is not of the type that it says: numbers, texts,
    sequences of these, classes, and alternatives are told apart; nothing else is looked at."""
    hints = get_type_hints(type(instance))
    for field in fields(instance):
        value, hint = getattr(instance, field.name), hints[field.name]
        if not _is(value, hint):
            wanted = _SAID.get(hint) or getattr(hint, "__name__", str(hint))
            raise InputError(f"{field.name} must be {wanted}, not {value!r}.")


def _is(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_is(value, each) for each in get_args(hint))
    if origin in (Sequence, list, tuple):
        inner = get_args(hint)[0]
        return isinstance(value, list | tuple) and all(_is(each, inner) for each in value)
    if hint in (int, float):
        numbers = (int,) if hint is int else (int, float)
        return isinstance(value, numbers) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) and origin is None else True
