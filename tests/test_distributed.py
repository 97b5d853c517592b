"""Jobs of several processes, as a user starts them."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

JOB = Path(__file__).with_name("job.py")
FORMS = {
    1: ["primal", "dual", "convex-disk", "layerwise", "matrix-free", "fit", "exact", "run"],
    2: ["primal", "convex-disk", "layerwise", "matrix-free", "fit", "exact", "run"],
    3: ["primal", "dual", "fit"],
}
"""By the number of processes."""


def launch(count, *arguments):
    started = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    command = [sys.executable, *started, JOB, *arguments]
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, timeout=120, cwd=JOB.parent
    )


def results(folder, form, count):
    return [torch.load(folder / f"{form}-{rank}.pt") for rank in range(count)]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """The folders of jobs of one, two and three processes."""
    folders = {count: tmp_path_factory.mktemp(f"of-{count}") for count in FORMS}
    for count, folder in folders.items():
        done = launch(count, folder, ",".join(FORMS[count]))
        assert done.returncode == 0, done.stderr
    return folders


def same(left, right, tolerance):
    for ours, theirs in zip(left, right, strict=True):
        assert list(ours) == list(theirs)
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("form", "count"), [(form, count) for count in (2, 3) for form in FORMS[count]])
def test_the_number_of_processes_does_not_matter(form, count, jobs):
    [alone], each = results(jobs[1], form, 1), results(jobs[count], form, count)
    # A solve by iteration agrees to its own residual, all else to rounding: a run folder's model is of float32.
    parts = slice(0, 2) if form != "matrix-free" else slice(1, 2)
    for other in each:
        same(other[parts], alone[parts], {"matrix-free": 1e-3, "run": 1e-4}.get(form, 1e-10))
        same(other, each[0], 0)
    assert not (jobs[count] / "partial").exists()


def test_a_killed_process_ends_the_job_and_the_next_goes_on(jobs, tmp_path):
    started = time.monotonic()
    done = launch(2, tmp_path, "primal", 1)
    assert time.monotonic() - started < 60
    assert done.returncode != 0
    assert "another process of this job is gone" in done.stderr
    assert not list(tmp_path.glob("*.pt"))
    assert list((tmp_path / "partial").glob("sums-*.safetensors"))
    again = launch(1, tmp_path, "primal")
    assert again.returncode == 0, again.stderr
    same(results(tmp_path, "primal", 1)[0], results(jobs[1], "primal", 1)[0], 1e-10)
    assert not (tmp_path / "partial").exists()
