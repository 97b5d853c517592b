"""Shape annotations of the package are checked while the tests run: in every test, whose parameters do not count, at
the first call of each function. To check all calls takes as long as all else.
"""

import functools
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import CodeType

import jaxtyping
import pytest
import torch

LONG = [
    *("test_store", "test_contracts", "test_bench", "test_distributed", "test_faults", "test_run", "test_cli"),
    *("test_examples", "test_methods", "test_gpu_benchmark"),
]

IN_MEMORY, ROOM = Path("/dev/shm"), 2**31

_jaxtyped = jaxtyping.jaxtyped
_called = set[CodeType]()
_test, _modules = "", 0


def _checked(function: Callable, **options: object) -> Callable:
    """What the import hook does to a function. One inside another is made anew at every call of that, which takes
    longer than to call it."""
    if isinstance(function, type):
        return _jaxtyped(function, **options)
    inner, code = "<locals>" in function.__qualname__, function.__code__
    if inner and code in _called:
        return function
    checked = _jaxtyped(function, **options)

    @functools.wraps(function)
    def called(*arguments: object, **named: object) -> object:
        if code in _called:
            return function(*arguments, **named)
        _called.add(code)
        return checked(*arguments, **named)

    return called


jaxtyping.jaxtyped = lambda **options: lambda function: _checked(function, **options)
jaxtyping.install_import_hook("fastntk", "beartype.beartype")
from runs import colours, fitted, given, run  # noqa: E402, F401 (fixtures, checked as all else is)

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
torch.set_flush_denormal(True)
if "TMPDIR" not in os.environ and os.access(IN_MEMORY, os.W_OK) and shutil.disk_usage(IN_MEMORY).free > ROOM:
    os.environ["TMPDIR"] = tempfile.tempdir = str(IN_MEMORY)  # folders are synced often, and a disk takes its time


def pytest_collection_modifyitems(items: list) -> None:
    """The longest files first, so that no process waits for the other's last one."""
    order = {stem: place for place, stem in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Every test checks anew. What modules brought along stays: measurements of memory collect garbage first, and need
    not look at it each time."""
    global _test, _modules
    if item.nodeid.partition("[")[0] != _test:
        _test = item.nodeid.partition("[")[0]
        _called.clear()
    if len(sys.modules) > _modules:
        _modules = len(sys.modules)
        gc.collect()
        gc.freeze()
