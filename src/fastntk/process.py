"""Settings of the whole process that long passes over a network run faster with."""

import ctypes
import sys

import torch

# glibc's names for its settings (mallopt), and values: blocks up to 128 MiB come from the heap and up to 1 GiB of freed
# memory stays there. By default every large activation is given back to the system and asked for again, page by page.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = (-3, 2**27), (-1, 2**30)


def settle() -> None:
    """Flush denormal numbers to zero, which some processors compute with ten times slower, and keep freed memory.

    The latter where the C library is glibc; elsewhere it stays as it is. Both hold for the process from then on.
    """
    torch.set_flush_denormal(True)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for name, value in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            mallopt(name, value)
