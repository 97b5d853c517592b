"""Timing alternatives side by side in one process, so that their ratios hold when the machine's speed drifts."""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any


def interleaved(work: Mapping[str, Callable[[], object]], repeats: int = 3) -> dict[str, list[float]]:
    """Seconds of every run of every alternative: one that is not counted, then in turn."""
    for run in work.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: Mapping[str, list[float]], over: str, under: str) -> float:
    """The median over the rounds of one alternative's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))


def finished(command: list[str]) -> str:
    """What a command prints, which has to succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def in_own_process(file: str, *arguments: object) -> dict[str, Any]:
    """What a benchmark prints as its last line, JSON, when it is run with these arguments, in a process of its own."""
    return json.loads(finished([sys.executable, file, *map(str, arguments)]).splitlines()[-1])


def peak_bytes() -> int:
    """The largest resident size that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
