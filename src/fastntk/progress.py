"""Progress on the terminal for work that takes long; silent where nobody watches."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

T = TypeVar("T")

console = Console(stderr=True)
"""Where progress and messages go; results go to standard output."""


def busy(description: str) -> AbstractContextManager[object]:
    """A spinner on standard error while a block of work lasts whose parts cannot be counted."""
    return console.status(description) if console.is_terminal else nullcontext()


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """``items`` as they are, with a bar on standard error while they last if that is a terminal."""
    return rich_track(items, description, total, console=console, transient=True, disable=not console.is_terminal)
