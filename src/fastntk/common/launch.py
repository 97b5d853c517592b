"""What a launcher of several processes says to each of them in its environment, known before they connect."""

import os


def launched() -> bool:
    """Whether this process is one of several that a launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def first() -> bool:
    """Whether this process is the only one, or the one that speaks for all; known before they connect."""
    return os.environ.get("RANK", "0") == "0"


def local_device(name: str) -> str:
    """``cuda`` as this process's own GPU, where several processes share a machine."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" and launched() else name
