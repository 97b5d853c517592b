"""Every shape annotation of the package is checked while the tests run."""

import gc
import os

import torch
from jaxtyping import install_import_hook

LONG = ("test_faults", "test_store", "test_distributed", "test_bench", "test_cli", "test_gpu_benchmark")

install_import_hook("fastntk", "beartype.beartype")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
torch.set_flush_denormal(True)


def pytest_collection_finish() -> None:
    """What is there by now stays: measurements of memory collect garbage first, and need not look at it each time."""
    gc.freeze()


def pytest_collection_modifyitems(items: list) -> None:
    """The longest files first, so that no process waits for the other's last one."""
    items.sort(key=lambda item: item.path.stem not in LONG)
