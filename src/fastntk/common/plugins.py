"""What other packages add to fastntk, found by the entry points that they declare and loaded when first looked at.

A package adds a selector, say, by an entry point in the group ``fastntk.selectors``, whose name is the selector's:

    [project.entry-points."fastntk.selectors"]
    first-conv = "my_package:FIRST_CONV"

examples/plugin is such a package, with one of each kind.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from fastntk.common.errors import InputError, reason

_T = TypeVar("_T")


class Registry(Mapping[str, _T]):
    """Things of a kind by name: fastntk's own, then those of other packages.

    Args:
        kind: the entry points' group is ``fastntk.KIND``.
        own: fastntk's.
        fits: whether what a package declares is one.
        wanted: what it must be, in words.

    Raises:
        InputError: when others' are looked at: one cannot be loaded, is not what is wanted, or has a taken name.
    """

    def __init__(self, kind: str, own: Mapping[str, _T], fits: Callable[[Any], bool], wanted: str) -> None:
        self.kind, self.own, self._fits, self._wanted = kind, own, fits, wanted

    def __getitem__(self, name: str) -> _T:
        return self.own[name] if name in self.own else self._others[name][0]

    def __iter__(self) -> Iterator[str]:
        yield from self.own
        yield from self._others

    def __len__(self) -> int:
        return len(self.own) + len(self._others)

    @property
    def others(self) -> dict[str, str]:
        """The packages of those that are not fastntk's own, with their versions, by name."""
        return {name: package for name, (_, package) in self._others.items()}

    def listed(self) -> str:
        """All names for a message, others' with where they come from."""
        return ", ".join([*self.own, *(f"{name} (of {package})" for name, package in self.others.items())])

    @cached_property
    def _others(self) -> dict[str, tuple[_T, str]]:
        found: dict[str, tuple[_T, str]] = {}
        for point in sorted(entry_points(group=f"fastntk.{self.kind}"), key=lambda each: (each.name, each.value)):
            package = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"
            if point.name in self.own or point.name in found:
                whose = found[point.name][1] if point.name in found else "fastntk"
                raise InputError(f"{package}: {point.name!r} among {self.kind} is taken by {whose}. Rename it.")
            found[point.name] = self._loaded(point, package), package
        return found

    def _loaded(self, point: EntryPoint, package: str) -> _T:
        try:
            made = point.load()
        except Exception as error:  # whatever a package's code raises
            raise InputError(
                f"{package}: {point.name!r} among {self.kind} cannot be loaded ({type(error).__name__}: "
                f"{reason(error)}). Repair or uninstall the package."
            ) from error
        if not self._fits(made):
            raise InputError(f"{package}: {point.name!r} among {self.kind} must be {self._wanted}, not {made!r}.")
        return made
