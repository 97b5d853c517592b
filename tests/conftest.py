"""Every shape annotation of the package is checked while the tests run."""

import gc
import os

import torch
from jaxtyping import install_import_hook

LONG = [
    *("test_store", "test_contracts", "test_bench", "test_distributed", "test_faults", "test_run", "test_cli"),
    *("test_examples", "test_methods", "test_gpu_benchmark"),
]

install_import_hook("fastntk", "beartype.beartype")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
torch.set_flush_denormal(True)


def pytest_collection_finish() -> None:
    """What is there by now stays: measurements of memory collect garbage first, and need not look at it each time."""
    gc.freeze()


def pytest_collection_modifyitems(items: list) -> None:
    """The longest files first, so that no process waits for the other's last one."""
    order = {stem: place for place, stem in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))
