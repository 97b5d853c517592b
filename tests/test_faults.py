"""Faults at some operations of every command that writes (at all of them: ``python benchmarks/faults.py``)."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "faults.py"


def test_a_run_is_as_before_or_as_after_and_the_command_can_be_repeated():
    """In a process of its own, as its forks are of one without threads."""
    done = subprocess.run([sys.executable, SCRIPT, "--every", "29"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("faults") == 3 * found.pop("operations") > 30
    assert not any(found.values()), done.stdout
