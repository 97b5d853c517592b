"""A large training set, by several processes, one of which is killed on the way: does memory stay flat, does it go on?

    python benchmarks/large.py [--images 5000 50000] [--processes 2]

ShuffleNetV2 x0.5 fitted for an epoch to random images of 32 px in ten classes, batch norm tuned, squared loss, primal
form: what people type, `fastntk fit` and `torchrun -m fastntk prepare`. When a third of the shards is on disk one of
the processes is killed; the job is started again, goes on, and ends. *peak GiB*: resident memory of one process, the
largest of both jobs; *seconds*: of the job that was killed and of the one that ended; *on disk*: the share of the
shards that the first left; *kept*: the share of these that the second went on from. An answer for ten images follows,
and `fastntk verify`. The last line is JSON.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table
from timing import finished

import fastntk
from fastntk.common.files import read_tensors
from fastntk.solve.collect import SHARD

SIDE, KILLED_AT = 32, 1 / 3
FASTNTK = [sys.executable, "-m", "fastntk"]


def made(folder: Path, images: int) -> Path:
    """A run that was fitted to so many images."""
    generator = np.random.default_rng(0)
    labels = np.arange(images) % 10
    pixels = generator.integers(0, 200, (images, SIDE, SIDE, 3), dtype=np.uint8)
    pixels[:, :4, :4] += (5 * labels).astype(np.uint8)[:, None, None, None]
    np.savez(folder / "data.npz", x=pixels, y=labels)
    model = ["--model", "torchvision/shufflenet_v2_x0_5", "--image-size", str(SIDE), "--select", "bn"]
    rest = ["--loss", "squared", "--epochs", "1", "--data", str(folder / "data.npz")]
    finished([*FASTNTK, "fit", str(folder / "run"), *model, *rest])
    return folder / "run"


def shards(run: Path) -> int:
    """How many are on disk."""
    found = 0
    for path in (run / "partial").glob("sums-*.safetensors"):
        try:
            found += len(read_tensors(path, names=[])[1]["shards"])
        except (OSError, fastntk.InputError):  # it is being replaced
            continue
    return found


def job(run: Path, processes: int, enough: Callable[[], bool]) -> dict[str, Any]:
    """Prepare by so many processes, one of which is killed when it is ``enough``."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    started, peak, killed = time.perf_counter(), 0, False
    command = [*launcher, "-m", "fastntk", "prepare", str(run), "--form", "primal"]
    with tempfile.TemporaryFile("w+") as said:
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        running = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        while running.poll() is None:
            time.sleep(0.5)
            workers = []
            with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
                workers = psutil.Process(running.pid).children()
                peak = max([peak, *(worker.memory_info().rss for worker in workers)])
            if not killed and workers and enough():
                os.kill(workers[-1].pid, signal.SIGKILL)
                killed = True
        said.seek(0)
        text = said.read()
    seconds = time.perf_counter() - started
    return {"status": running.returncode, "seconds": seconds, "peak_gib": peak / 2**30, "said": text}


def one(images: int, processes: int) -> dict[str, Any]:
    """Fit, prepare with a kill on the way, go on, ask."""
    count = -(-images // SHARD)
    with tempfile.TemporaryDirectory() as folder:
        run = made(Path(folder), images)
        first = job(run, processes, lambda: shards(run) >= KILLED_AT * count)
        if not first["status"]:
            sys.exit("the job ended before a process of it could be killed.")
        done = shards(run)
        second = job(run, processes, lambda: False)
        if second["status"]:
            sys.exit(f"the second job failed:\n{second['said'][-2000:]}")
        went_on = re.search(r"going on from (\d+) of (\d+) shards", second["said"])
        answer = json.loads(finished([*FASTNTK, "forget", str(run), "--ids", "5,6,7,8,9,10,11,12,13,14", "--json"]))
        finished([*FASTNTK, "verify", str(run)])
    return {
        "images": images,
        "processes": processes,
        "killed_seconds": first["seconds"],
        "seconds": second["seconds"],
        "peak_gib": max(first["peak_gib"], second["peak_gib"]),
        "on_disk": done / count,
        "kept": (int(went_on[1]) if went_on else 0) / done,
        "request_seconds": answer["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[5000, 50000])
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    rows = []
    for images in arguments.images:
        rows.append(one(images, arguments.processes))
        print(json.dumps(rows[-1]), flush=True)
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{each:,}" if isinstance(each, int) else f"{each:.3g}" for each in row.values()))
    Console(width=140).print(table)
    print(json.dumps({"rows": rows, "memory_growth": rows[-1]["peak_gib"] / rows[0]["peak_gib"]}))


if __name__ == "__main__":
    main()
