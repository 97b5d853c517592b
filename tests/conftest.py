"""Shape annotations of the package are checked while the tests run: of a test with parameters, in the first of them.

Checking takes as long as all else, and whether shapes are as annotated depends on what is called and not on numbers.
"""

import gc
import os
from collections.abc import Callable

import jaxtyping
import pytest
import torch

FIRST = pytest.StashKey[bool]()
"""Whether a test is the first of its function."""

LONG = [
    *("test_store", "test_contracts", "test_bench", "test_distributed", "test_faults", "test_run", "test_cli"),
    *("test_examples", "test_methods", "test_gpu_benchmark"),
]

_jaxtyped = jaxtyping.jaxtyped


def _checked(function: Callable, **options: object) -> Callable:
    """What the import hook does to a function; but none that is made anew at every call, while nothing is checked."""
    inner = "<locals>" in function.__qualname__
    return function if inner and jaxtyping.config.jaxtyping_disable else _jaxtyped(function, **options)


jaxtyping.jaxtyped = lambda **options: lambda function: _checked(function, **options)
jaxtyping.install_import_hook("fastntk", "beartype.beartype")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
torch.set_flush_denormal(True)


def pytest_collection_finish() -> None:
    """What is there by now stays: measurements of memory collect garbage first, and need not look at it each time."""
    gc.freeze()


def pytest_collection_modifyitems(items: list) -> None:
    """The longest files first, so that no process waits for the other's last one."""
    order = {stem: place for place, stem in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))
    first = {item.nodeid.partition("[")[0]: item for item in reversed(items)}
    for item in items:
        item.stash[FIRST] = first[item.nodeid.partition("[")[0]] is item


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before its fixtures."""
    jaxtyping.config.update("jaxtyping_disable", not item.stash[FIRST])
