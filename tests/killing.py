"""Kill a process at a random point of a request, again and again: python killing.py FOLDER COUNT.

Every time the memory must open, hold the parameters from before or after the request exactly, and take the request (or
its purge) once more. A fork of this process makes the request; it starts in milliseconds.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from cases import CASES
from memories import moved

import fastntk

REQUEST = [2, 7]


def opened(folder):
    return fastntk.load(folder, model, data)


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in right)


def ask(folder):
    memory = opened(folder)
    memory.forget(REQUEST)
    memory.purge()


def in_child(folder, delay=None):
    """Make the request in a child, which is killed ``delay`` seconds after it began (None: never)."""
    child = os.fork()
    if not child:
        ask(folder)
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


root, count = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
case = CASES["bn+head"]
model, data = case.model(), case.data()
little = {"witnesses": 2, "loss": fastntk.SquaredLoss()}  # to compute: a request is what it writes
fastntk.prepare(model, data, moved(model), ridge=0.5, **little).save(root / "whole")
before = opened(root / "whole").parameters
after = opened(root / "whole").preview(REQUEST).parameters
seconds = 60.0
for _ in range(3):
    shutil.rmtree(root / "timed", ignore_errors=True)
    shutil.copytree(root / "whole", root / "timed")
    started = time.perf_counter()
    in_child(root / "timed")
    seconds = min(seconds, time.perf_counter() - started)
    assert same(opened(root / "timed").parameters, after)

random.seed(0)
states = {"before": 0, "after": 0}
for attempt in range(count):
    folder = root / "killed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(root / "whole", folder)
    in_child(folder, random.uniform(0, 1.1 * seconds))
    memory = opened(folder)
    state = "before" if same(memory.parameters, before) else "after"
    states[state] += 1
    assert same(memory.parameters, before if state == "before" else after), attempt
    if state == "before":
        assert len(memory.ids) == 14, attempt
        assert not memory.requests(), attempt
        assert same(memory.forget(REQUEST).parameters, after), attempt
    assert not set(REQUEST) & set(memory.ids), attempt
    memory.purge()
    files = sorted(path.suffix or path.name for path in folder.iterdir() if path.name != "lock")
    assert files == [".safetensors", ".sha256", ".sqlite"], (attempt, files)
    assert [request.state for request in memory.requests()] == ["purged"], attempt
    assert same(opened(folder).parameters, after), attempt
print(states)
