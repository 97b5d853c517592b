"""Progress on the terminal for work that takes long, by the first process of a job; silent where nobody watches."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

from fastntk.common.launch import first

_T = TypeVar("_T")

console = Console(stderr=True, markup=False, emoji=False)
"""Where progress and messages go; results go to standard output. What is printed is data: brackets are brackets."""


def _watched() -> bool:
    return console.is_terminal and first()


def busy(description: str) -> AbstractContextManager[object]:
    """A spinner on standard error while a block of work lasts whose parts cannot be counted."""
    return console.status(description) if _watched() else nullcontext()


def track(items: Iterable[_T], description: str) -> Iterable[_T]:
    """``items`` as they are, with a bar on standard error while they last if that is a terminal."""
    return rich_track(items, description, console=console, transient=True, disable=not _watched())
