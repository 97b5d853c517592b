"""The paper's largest case, whole: ViT-B/32 (87 million parameters), ten prompts and the head, 5,000 images.

    python benchmarks/vit.py --data cifar10.npz                 fit, prepare, forget, retrain twice, compare
    python benchmarks/vit.py --data cifar10.npz --fits 2        two fits of what is missing, and nothing else
    python benchmarks/vit.py --data cifar10.npz --side 224      prepare and forget, at the paper's size of images

The backbone is a ViT-S/14 that was widened without a change of its function (benchmarks/widened.py). CIFAR-10, 500
images a class, cross-entropy, 12 epochs, at 64 px: a class and a random tenth, two retrained models each. Fits are kept
under --out one by one, each after an hour and a half on two cores; the command goes on where it was cut off. With
--side 224 the prompts of that fit are linearised at 224 px. The last line is JSON.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cross_entropy import MODELS, Case, Setting, opened
from paper import answers
from pretrained import cifar
from timing import peak_bytes
from widened import vit_b32

import fastntk
from fastntk.common.files import read_json, write_json
from fastntk.common.machine import peak_memory, settle
from fastntk.tuning.parameters import snapshot, tuned

SETTING, RETRAINED = Setting("vit_b32", "plain", 10, 500, 0), 2


def missing(case: Case, count: int) -> None:
    """Make so many of the retrained models that are not there."""
    for request, ids, _ in case.requests():
        for k in range(RETRAINED):
            if count and not (case.folder / f"{request}-retrained-{k}.safetensors").exists():
                case.retrained(request, ids, k + 1)
                count -= 1


def larger(case: Case, side: int, data: str) -> dict[str, Any]:
    """Prepare and forget with images of another side, at the parameters of the fit."""
    model, preprocessing = vit_b32(side)
    train, _ = cifar(data, preprocessing, SETTING.per_class)
    fastntk.tune(model, *MODELS[SETTING.model][1])
    model.load_state_dict(snapshot(tuned(case.model)), strict=False)
    started = time.perf_counter()
    with peak_memory(torch.device("cpu")) as peak:
        memory = fastntk.prepare(model, train, case.fit.initial, loss=case.fit.recipe.loss)
        prepared = time.perf_counter() - started
        first = memory.ready()
    row = {"side": side, "images": len(train), "form": memory.form, "prepare": prepared}
    seconds = {request: memory.preview(ids).seconds for request, ids, _ in replace(case, train=train).requests()}
    return {**row, "first": first, **seconds, "peak_gib": peak.bytes / 2**30, "process_gib": peak_bytes() / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 as .npz")
    parser.add_argument("--fits", type=int, help="so many, and nothing else")
    parser.add_argument("--side", type=int, help="of the images, for preparing and forgetting alone")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="where fits are kept")
    arguments = parser.parse_args()
    arguments.many, arguments.requests = None, "class,tenth"
    settle()
    started = time.perf_counter()
    case = opened(SETTING, arguments)
    fresh = time.perf_counter() - started
    if arguments.fits:
        missing(case, arguments.fits)
        return
    if arguments.side:
        print(json.dumps({**larger(case, arguments.side, arguments.data), "fit": case.fit.seconds}))
        return
    kept = case.folder / "paper.json"
    if not kept.exists():
        write_json(kept, {"rows": answers(case, RETRAINED), "fit": case.fit.seconds, "opened": fresh})
    print(json.dumps(read_json(kept)))


if __name__ == "__main__":
    main()
