"""The convex form with its rows on disk, beside the one that keeps them and their kernel in memory.

    python benchmarks/on_disk.py --data cifar10.npz [--per-class 500]

MobileNetV2 (batch norms and the head, 64 px), fitted with cross-entropy for three epochs; each form in a process of its
own. Printed are seconds of preparing and of requests (a class, a tenth, ten images), the peak of memory that is not the
disk's cache, the ridge's factor, and how far apart the answers lie, |change - change'| / |change|. The last line is
JSON. --only leaves one form out, where the other has no room.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from memories import automatic
from pretrained import cifar, mobilenet_v2
from timing import in_own_process

import fastntk
from fastntk.common.machine import settle
from fastntk.evidence.requests import drawn
from fastntk.tuning.recipe import Recipe

REQUESTS = {"class": "class", "tenth": "random 10%", "ten images": "ten"}


def anonymous() -> float:
    """GiB of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 2**20


def one(arguments: argparse.Namespace) -> dict[str, object]:
    """A form's figures; its answers are stored."""
    settle()
    model, preprocessing = mobilenet_v2(64, 0, 10)
    train, test = cifar(arguments.data, preprocessing, arguments.per_class, 10)
    fastntk.tune(model, "bn", "head")
    fit = fastntk.fit(model, train, Recipe(loss=fastntk.CrossEntropy(), epochs=3))
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous())

    threading.Thread(target=watch, daemon=True).start()
    before, started = anonymous(), time.perf_counter()
    memory = fastntk.prepare(model, train, fit.initial, loss=fit.recipe.loss, form=arguments.form)
    found: dict[str, object] = {"form": memory.form, "images": len(train), "prepare": time.perf_counter() - started}
    changes = {}
    for name, kind in REQUESTS.items():
        ids = memory.ids[:10] if kind == "ten" else drawn(kind, train, test, 0, gone=0)[0]
        answer = memory.preview(ids)
        found[name] = answer.seconds
        changes[name] = memory.state.layout.flatten(answer.parameters) - memory.state.vector
    done.set()
    torch.save(changes, arguments.out / f"{arguments.form}.pt")
    inexact = answer.certificate.inexactness
    return {**found, "peak_gib": peak[0] - before, "factor": automatic(memory).factor, "inexactness": inexact}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 as .npz")
    parser.add_argument("--per-class", type=int, default=100)
    parser.add_argument("--only", help="a form")
    parser.add_argument("--form", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.form:
        print(json.dumps(one(arguments)))
        return
    rows, forms = [], [arguments.only] if arguments.only else ["convex", "convex-disk"]
    with tempfile.TemporaryDirectory() as folder:
        for form in forms:
            rows.append(in_own_process(__file__, *sys.argv[1:], "--form", form, "--out", folder))
            print(json.dumps(rows[-1]), flush=True)
        apart = {}
        if len(forms) == 2:
            left, right = (torch.load(Path(folder) / f"{form}.pt") for form in forms)
            apart = {name: float((left[name] - right[name]).norm() / left[name].norm()) for name in REQUESTS}
    print(json.dumps({"forms": rows, "apart": apart}))


if __name__ == "__main__":
    main()
