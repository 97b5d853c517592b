"""What a configuration says.

recipe: {epochs: 12}                # of fastntk.Recipe; loss: squared or cross-entropy
seeds: [0, 1]
per_class: [60, 100]                # training images of each class: the first ones
test_per_class: 100
data:
  cifar10: {source: cifar10.npz}    # as fastntk fit takes it
  eurosat: {source: eurosat.npz, test: rest}   # no test split: the images after the training ones
models:
  mobilenet_v2: {model: torchvision/mobilenet_v2, weights: mobilenet.pt, image_size: 128, select: [bn, head]}
requests: [class, random 10%]       # the class whose number is the seed's, modulo C; a share at random
methods:
  fast_ntk: {method: FastNTK}       # of fastntk.evidence.methods, with its fields
  scrub: {method: Scrub, share: 0.5}

``methods`` can also be the name of a file beside the configuration that holds such a table.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fastntk.common.errors import InputError
from fastntk.common.typed import check_types
from fastntk.evidence import methods
from fastntk.evidence.compare import COMPARED_WITH
from fastntk.evidence.methods import Method
from fastntk.evidence.requests import share
from fastntk.tuning.loss import loss_named
from fastntk.tuning.recipe import Recipe

T = TypeVar("T")

_POSITIVE = "share", "rate", "temperature", "ridge"  # of a method

METHODS: dict[str, type[Any]] = {
    name: kind
    for name, kind in vars(methods).items()
    if isinstance(kind, type) and is_dataclass(kind) and "__call__" in vars(kind)
}
"""By the names that a configuration calls them."""


@dataclass(frozen=True)
class Data:
    """Where images come from; ``test`` is ``split`` or ``rest``."""

    source: str
    root: str | None = None
    test: str = "split"

    def __post_init__(self) -> None:
        if self.test not in ("split", "rest"):
            raise InputError(f"test must be 'split' or 'rest', not {self.test!r}.")


@dataclass(frozen=True)
class Model:
    """What is fitted."""

    model: str
    select: Sequence[str]
    weights: str | None = None
    image_size: int | None = None


@dataclass(frozen=True)
class Setting:
    """One fitted model, by the names of the configuration."""

    data: str
    model: str
    per_class: int
    seed: int


@dataclass(frozen=True)
class Config:
    """A whole configuration."""

    data: Mapping[str, Data]
    models: Mapping[str, Model]
    methods: Mapping[str, Method]
    requests: tuple[str, ...]
    per_class: tuple[int, ...]
    test_per_class: int
    seeds: tuple[int, ...]
    recipe: Mapping[str, Any]

    def fitting(self, seed: int) -> Recipe:
        """How models are fitted with a seed."""
        return _recipe({**self.recipe, "seed": seed})

    def settings(self) -> Iterator[Setting]:
        """All combinations."""
        for parts in product(self.data, self.models, self.per_class, self.seeds):
            yield Setting(*parts)


def read_config(path: Path, methods: Path | None = None) -> Config:
    """A configuration from YAML, with the methods of another file in place of its own, if one is given.

    Raises:
        InputError: one cannot be read, or something in it is missing, unknown or out of range; says what.
    """
    document = _yaml(path)
    if isinstance(document, dict):
        if methods is None and isinstance(document.get("methods"), str):
            methods = path.parent / document["methods"]
        if methods:
            document["methods"] = _yaml(methods)
    try:
        return _config(document)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML ({error}).") from error


def _config(document: Any) -> Config:
    given = _checked(document, "the configuration", {field.name for field in fields(Config)})
    given = {"seeds": [0], "recipe": {}, "test_per_class": 100, **given}
    for field in fields(Config):
        if field.name not in given:
            raise InputError(f"it lacks {field.name!r}.")
    for kind, names in ((list, ("requests", "per_class", "seeds")), (dict, ("data", "models", "methods"))):
        for name in names:
            if not isinstance(given[name], kind) or not given[name]:
                shape = "a list" if kind is list else "a table of names and entries"
                raise InputError(f"{name} must be {shape}, with something in it.")
    lists = {name: tuple(given[name]) for name in ("requests", "per_class", "seeds")}
    for name, least in (("per_class", 1), ("seeds", 0)):
        for each in lists[name]:
            if not isinstance(each, int) or isinstance(each, bool) or each < least:
                raise InputError(f"{name} has {each!r} in it, which is no whole number from {least} on.")
    if not isinstance(given["test_per_class"], int) or given["test_per_class"] < 1:
        raise InputError(f"test_per_class must be a whole number above 0, not {given['test_per_class']!r}.")
    for request in lists["requests"]:
        share(request)
    _recipe(given["recipe"])
    return Config(
        data={name: _made(Data, entry, f"data {name}") for name, entry in given["data"].items()},
        models={name: _made(Model, entry, f"model {name}") for name, entry in given["models"].items()},
        methods={name: _method(entry, name) for name, entry in given["methods"].items()},
        test_per_class=int(given["test_per_class"]),
        recipe=given["recipe"],
        **lists,
    )


def _recipe(entry: Mapping[str, Any]) -> Recipe:
    if isinstance(entry, dict) and "loss" in entry:
        entry = {**entry, "loss": loss_named(entry["loss"])}
    return _made(Recipe, entry, "recipe")


def _method(entry: Any, name: str) -> Method:
    """A method of ``fastntk.evidence.methods`` by its class and fields."""
    if name in COMPARED_WITH:
        raise InputError(f"method {name}: this name is taken by what every method is compared with.")
    given = dict(entry) if isinstance(entry, dict) else {}
    kind = METHODS.get(str(given.pop("method", None)))
    if kind is None:
        raise InputError(f"method {name}: say which, as 'method: FastNTK'. There are {', '.join(METHODS)}.")
    made = _made(kind, given, f"method {name}")
    for field, value in vars(made).items():
        least = "above 0" if field in _POSITIVE else "not negative"
        if isinstance(value, int | float) and not (value > 0 if field in _POSITIVE else value >= 0):
            raise InputError(f"method {name}: {field} must be {least}, not {value}.")
    return made


def _made(kind: type[T], entry: Mapping[str, Any], where: str) -> T:
    """A dataclass from an entry with its fields."""
    try:
        made = kind(**_checked(entry, where, {field.name for field in fields(kind)}))  # type: ignore[arg-type]
        check_types(made)
    except (TypeError, InputError) as error:
        raise InputError(f"{where}: {str(error).rstrip('.')}.") from error
    return made


def _checked(entry: Any, where: str, known: set[str]) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise InputError(f"{where} must be a table of names and values.")
    odd = sorted(set(map(str, entry)) - known)
    if odd:
        raise InputError(f"{where} has no field {odd[0]!r}; its fields are {', '.join(sorted(known))}.")
    return entry
