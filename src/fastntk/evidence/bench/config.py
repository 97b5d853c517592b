"""What a configuration says.

recipe: {epochs: 12}                # of fastntk.Recipe, but for its loss
losses: [squared, cross-entropy, smoothed]   # the last is cross-entropy with labels smoothed by 0.1
seeds: [0, 1]
per_class: [60, 100]                # training images of each class: the first ones
test_per_class: 100
data:
  cifar10: {source: cifar10.npz}    # as fastntk fit takes it
  eurosat: {source: eurosat.npz, test: rest}   # no test split: the images after the training ones
models:
  mobilenet_v2: {model: torchvision/mobilenet_v2, weights: mobilenet.pt, image_size: 128, select: [bn, head]}
requests: [class, random 10%]       # the class whose number is the seed's, modulo C; a share at random
retrained: 4                        # models, for every request
methods:
  fast_ntk: {method: FastNTK, choose: {exact_head: [false, true], gain: [false, 1.5]}}   # of fastntk.evidence.methods
  scrub: {method: Scrub, share: 0.5, choose: [{rate: [0.2, 1.0]}, {teaching: [0.001], fitting: [0.99]}]}
select: {requests: [class, random 10%], retrained: 2}   # others than those, see choosing.py

What is to ``choose`` from are the method's own settings and all combinations of the values named, in a table or in each
of a list of tables. ``methods`` can also be the name of a file beside the configuration that holds such a table.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fastntk.common.errors import InputError
from fastntk.common.plugins import Registry
from fastntk.common.typed import check_types
from fastntk.evidence import methods
from fastntk.evidence.methods import Method
from fastntk.evidence.report import ORIGINAL, is_retrained
from fastntk.evidence.requests import share
from fastntk.tuning.loss import Loss
from fastntk.tuning.losses import LOSSES, CrossEntropy, loss_named
from fastntk.tuning.recipe import Recipe

T = TypeVar("T")

_POSITIVE = "share", "rate", "temperature", "ridge"  # of a method
_LISTS = "requests", "losses", "per_class", "seeds"
_DEFAULTS = {
    "losses": ["cross-entropy"],
    "seeds": [0],
    "recipe": {},
    "test_per_class": 100,
    "retrained": 4,
    "select": None,
}

_SMOOTHED = {"smoothed": CrossEntropy(smoothing=0.1)}  # beside those that have names of their own

CHOSEN = ", chosen"
"""What follows a method's name in the row with the settings that were chosen for it."""


def _is_method(made: Any) -> bool:
    return isinstance(made, type) and is_dataclass(made) and "__call__" in vars(made)


METHODS: Registry[type[Any]] = Registry(
    "methods",
    {name: kind for name, kind in vars(methods).items() if _is_method(kind)},
    _is_method,
    "a dataclass that is called with a fastntk.methods.Problem",
)
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
    loss: str


@dataclass(frozen=True)
class Select:
    """By what settings are chosen: requests that nobody asks for, and models retrained for each."""

    requests: Sequence[str]
    retrained: int = 2

    def __post_init__(self) -> None:
        _check_requests(self.requests, "select")
        if self.retrained < 2:
            raise InputError(
                "retrained must be 2 at least: how far apart they lie is what distances are compared with."
            )


@dataclass(frozen=True)
class Entry:
    """A method with its settings, and other settings of it to choose from."""

    default: Method
    others: tuple[Method, ...] = ()


@dataclass(frozen=True)
class Config:
    """A whole configuration."""

    data: Mapping[str, Data]
    models: Mapping[str, Model]
    methods: Mapping[str, Entry]
    requests: tuple[str, ...]
    losses: tuple[str, ...]
    per_class: tuple[int, ...]
    test_per_class: int
    seeds: tuple[int, ...]
    recipe: Mapping[str, Any]
    retrained: int
    select: Select | None

    def fitting(self, setting: Setting) -> Recipe:
        """How a model is fitted."""
        return replace(_recipe(self.recipe), seed=setting.seed, loss=_loss(setting.loss))

    def settings(self) -> Iterator[Setting]:
        """All combinations."""
        for parts in product(self.data, self.models, self.per_class, self.seeds, self.losses):
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
    given = {**_DEFAULTS, **given}
    for field in fields(Config):
        if field.name not in given:
            raise InputError(f"it lacks {field.name!r}.")
    for kind, names in ((list, _LISTS), (dict, ("data", "models", "methods"))):
        for name in names:
            if not isinstance(given[name], kind) or not given[name]:
                shape = "a list" if kind is list else "a table of names and entries"
                raise InputError(f"{name} must be {shape}, with something in it.")
    lists = {name: tuple(given[name]) for name in _LISTS}
    for name, least in (("per_class", 1), ("seeds", 0)):
        for each in lists[name]:
            if not isinstance(each, int) or isinstance(each, bool) or each < least:
                raise InputError(f"{name} has {each!r} in it, which is no whole number from {least} on.")
    for name, least in (("test_per_class", 1), ("retrained", 2)):
        if not isinstance(given[name], int) or given[name] < least:
            raise InputError(f"{name} must be a whole number from {least} on, not {given[name]!r}.")
    _check_requests(lists["requests"], "requests")
    for loss in lists["losses"]:
        _loss(loss)
    _recipe(given["recipe"])
    select = None if given["select"] is None else _made(Select, given["select"], "select")
    entries = {name: _entry(entry, name) for name, entry in given["methods"].items()}
    if select is None and (open_ := [name for name, each in entries.items() if each.others]):
        raise InputError(f"{open_[0]} has settings to choose from, and nothing says by what. Add a select section.")
    return Config(
        data={name: _made(Data, entry, f"data {name}") for name, entry in given["data"].items()},
        models={name: _made(Model, entry, f"model {name}") for name, entry in given["models"].items()},
        methods=entries,
        test_per_class=given["test_per_class"],
        recipe=given["recipe"],
        retrained=given["retrained"],
        select=select,
        **lists,
    )


def _recipe(entry: Mapping[str, Any]) -> Recipe:
    if isinstance(entry, dict) and "loss" in entry:
        raise InputError("recipe: losses have a list of their own, as losses: [cross-entropy].")
    return _made(Recipe, entry, "recipe")


def _loss(name: Any) -> Loss:
    if not isinstance(name, str) or name not in (*_SMOOTHED, *LOSSES):
        raise InputError(f"a loss is one of {LOSSES.listed()}, {', '.join(_SMOOTHED)}, not {name!r}.")
    return _SMOOTHED.get(name) or loss_named(name)


def _check_requests(requests: Sequence[str], where: str) -> None:
    if not requests:
        raise InputError(f"{where}: there is no request.")
    for request in requests:
        share(request)


def _entry(entry: Any, name: Any) -> Entry:
    """A method by its class and fields, and those with other values of them to choose from."""
    if not isinstance(name, str):
        raise InputError(f"method {name!r}: its name must be a text. Put it into quotes.")
    if name == ORIGINAL or is_retrained(name) or name.endswith(CHOSEN):
        raise InputError(f"method {name}: this name is taken by what every method is compared with.")
    given = dict(entry) if isinstance(entry, dict) else {}
    choose = given.pop("choose", [])
    tables = choose if isinstance(choose, list) else [choose]
    if not all(isinstance(each, dict) and each and all(map(_filled, each.values())) for each in tables):
        raise InputError(
            f"method {name}: choose must be a table of fields, each with a list of values, or a list of such."
        )
    default = _method(given, name)
    combined = [dict(zip(each, values, strict=True)) for each in tables for values in product(*each.values())]
    made = [_method({**given, **values}, name) for values in combined]
    return Entry(default, tuple({repr(each): each for each in made if each != default}.values()))


def _filled(values: Any) -> bool:
    """Whether it is a list with something in it."""
    return isinstance(values, list) and bool(values)


def _method(given: Mapping[str, Any], name: str) -> Method:
    """A method of ``fastntk.evidence.methods``."""
    given = dict(given)
    kind = METHODS.get(str(given.pop("method", None)))
    if kind is None:
        raise InputError(f"method {name}: say which, as 'method: FastNTK'. There are {METHODS.listed()}.")
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
