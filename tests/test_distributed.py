"""Jobs of several processes, as a user starts them."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

JOB = Path(__file__).with_name("job.py")
FORMS = ("primal", "dual", "convex-disk", "layerwise", "matrix-free", "fit")


def launch(count, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", str(JOB)]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120, cwd=JOB.parent
    )


def results(folder, form, count):
    return [torch.load(folder / f"{form}-{rank}.pt") for rank in range(count)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process gets, by form."""
    folder = tmp_path_factory.mktemp("alone")
    for form in FORMS:
        done = subprocess.run(
            [sys.executable, str(JOB), str(folder), form], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    return {form: results(folder, form, 1)[0] for form in FORMS}


def same(left, right, tolerance):
    for ours, theirs in zip(left, right, strict=True):
        assert list(ours) == list(theirs)
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("form", "count"),
    [
        ("primal", 2),
        ("primal", 3),
        ("dual", 3),
        ("convex-disk", 2),
        ("layerwise", 2),
        ("matrix-free", 2),
        ("fit", 2),
        ("fit", 3),
    ],
)
def test_the_number_of_processes_does_not_matter(form, count, alone, tmp_path):
    done = launch(count, tmp_path, form)
    assert done.returncode == 0, done.stderr
    each = results(tmp_path, form, count)
    # A solve by iteration agrees to its own residual, all else to rounding.
    parts = slice(0, 2) if form != "matrix-free" else slice(1, 2)
    for other in each:
        same(other[parts], alone[form][parts], 1e-10 if form != "matrix-free" else 1e-3)
        same(other, each[0], 0)
    assert not (tmp_path / "partial").exists()


def test_a_killed_process_ends_the_job_and_the_next_goes_on(alone, tmp_path):
    started = time.monotonic()
    done = launch(2, tmp_path, "primal", 1)
    assert time.monotonic() - started < 60
    assert done.returncode != 0
    assert "another process of this job is gone" in done.stderr
    assert not list(tmp_path.glob("*.pt"))
    assert list((tmp_path / "partial").glob("sums-*.safetensors"))
    again = launch(3, tmp_path, "primal")
    assert again.returncode == 0, again.stderr
    for other in results(tmp_path, "primal", 3):
        same(other, alone["primal"], 1e-10)
    assert not (tmp_path / "partial").exists()
