"""The benchmark for a GPU takes its whole path here, with small networks, so that it runs when there is a GPU."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


def test_it_measures_everything_and_writes_it_as_it_goes(tmp_path):
    done = run("--tiny", "--device", "cpu", "--out", tmp_path / "gpu.jsonl")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert rows == found["rows"]
    assert done.stdout.startswith("cpu")
    assert {row["what"] for row in rows} == {"Jacobians", "vmap(jacrev)", "prepare"}
    exact = [row for row in rows if row["what"] == "Jacobians" and row["precision"] == "full"]
    assert len(exact) == 2
    assert all(row["error"] < 1e-5 and row["images_a_second"] > 0 for row in exact)
    prepared = [row for row in rows if row["what"] == "prepare"]
    assert [row["form"] for row in prepared] == ["dual", "convex", "convex", "convex", "convex", "dual"]
    assert all(row[f"{name}_over_retrain"] > 0 for row in prepared for name in ("prepare", "first", "ten", "tenth"))


def test_what_does_not_begin_in_time_is_said_to_be_left_out(tmp_path):
    done = run("--tiny", "--device", "cpu", "--minutes", "0", "--out", tmp_path / "gpu.jsonl")
    assert done.returncode == 0, done.stderr
    assert all("left_out" in row for row in json.loads(done.stdout.splitlines()[-1])["rows"])


def test_a_device_that_is_not_there_is_named(tmp_path):
    done = run("--device", "mps:7", "--out", tmp_path / "gpu.jsonl")
    assert done.returncode == 2
    assert "cannot use the device 'mps:7'" in done.stderr
    assert not (tmp_path / "gpu.jsonl").exists()
