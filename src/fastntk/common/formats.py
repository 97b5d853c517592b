"""Documents on disk have a format version: older ones are upgraded when they are read, what cannot be read is named."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastntk.common.errors import InputError

Upgrade = Callable[[dict[str, Any]], dict[str, Any]]
"""From a document of one version to the next one's."""

_STAMP, _SEAL = ("format", "fastntk"), "sha256"


class Document(dict[str, Any]):
    """What was read from a file. A key that is not there is an ``InputError`` that says so, in any depth."""

    def __init__(self, content: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), where: str = "a document") -> None:
        super().__init__({key: _within(value, where) for key, value in dict(content).items()})
        self.where = where

    def __missing__(self, key: str) -> Any:
        raise InputError(f"{self.where}: {key!r} is missing in it. Restore it from a backup, or make it anew.")


def _within(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return Document(value, where)
    return [_within(each, where) for each in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Format:
    """A kind of document.

    Attributes:
        name: what it is called in messages.
        upgrades: from version 0 to 1, from 1 to 2, ...; their number is the version of today. Documents of before they
            had versions are of version 0. A document of an older version becomes one of today's by all that follow.
    """

    name: str
    upgrades: tuple[Upgrade, ...]

    @property
    def version(self) -> int:
        """Of today."""
        return len(self.upgrades)

    def stamped(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """The document with its version and that of the package which writes it."""
        return {"format": self.version, "fastntk": version("fastntk"), **document}

    def read(self, document: Mapping[str, Any], path: Path) -> Document:
        """A document as one of today's version, without the stamp.

        Args:
            document: as it was written.
            path: where it was read from, for messages.

        Raises:
            InputError: its version is not known here, or something that an upgrade needs is missing.
        """
        number, writer = document.get("format", 0), document.get("fastntk", "before 0.1.0")
        where = f"{path} ({self.name}, format {number}, written by fastntk {writer})"
        if not isinstance(number, int) or not 0 <= number <= self.version:
            raise InputError(
                f"{where} cannot be read by this fastntk, {version('fastntk')}, which knows formats 0 to "
                f"{self.version}. Install the version that wrote it, or make it anew."
            )
        content: dict[str, Any] = Document({k: v for k, v in document.items() if k not in _STAMP}, where)
        for upgrade in self.upgrades[number:]:
            content = upgrade(content)
        return Document(content, where)


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with the SHA-256 of all that is in it."""
    return {**document, _SEAL: _sum(document)}


def unsealed(document: Mapping[str, Any], path: Path, needed: bool) -> dict[str, Any]:
    """The reverse; what was never sealed is as it is, unless a seal is ``needed``.

    Raises:
        InputError: it is not what was sealed, or has no seal.
    """
    if needed and _SEAL not in document:
        raise InputError(f"{path} is damaged: its sum is missing. Restore it from a backup, or make it anew.")
    content = {key: value for key, value in document.items() if key != _SEAL}
    if document.get(_SEAL, _sum(content)) != _sum(content):
        raise InputError(f"{path} is damaged: it is not what was written. Restore it from a backup, or make it anew.")
    return content


def _sum(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def unchanged(document: dict[str, Any]) -> dict[str, Any]:
    """The upgrade that only gives a version to what had none."""
    return document
