"""What ``fastntk.plan`` says of a preparation, beside what it then takes: ten cases, each in a process of its own.

    python benchmarks/plans.py [--only TEXT]

Random weights moved a little as a fit would, random images. *plan*: seconds that the plan itself takes; *time* and
*memory*: planned over measured, the latter beyond what the process holds after it has planned, until the first request
can be answered; *first*: the same of the time that the first request waits for; *retraining*: the
planned time of a retraining of twelve epochs over six times that of two. The last line is JSON.
"""

import argparse
import json
import time
from dataclasses import dataclass
from typing import Any

import torch
from networks import moved, randomise
from rich.console import Console
from rich.table import Table
from scale import Images
from timing import in_own_process

import fastntk
from fastntk.common.machine import peak_memory
from fastntk.tuning.losses import loss_named


@dataclass(frozen=True)
class Case:
    """What is prepared."""

    model: str
    side: int
    classes: int
    select: tuple[str, ...]
    loss: str
    images: int
    form: str = "auto"


BN, PROMPTS = ("bn", "head"), ("prompt:10", "head")
CASES = {
    "mobilenet_v2": Case("torchvision/mobilenet_v2", 64, 10, BN, "cross-entropy", 500),
    "mobilenet_v2, squared": Case("torchvision/mobilenet_v2", 64, 10, BN, "squared", 300),
    "mobilenet_v2, rows on disk": Case("torchvision/mobilenet_v2", 64, 10, BN, "cross-entropy", 300, "convex-disk"),
    "efficientnet_b0": Case("torchvision/efficientnet_b0", 96, 10, BN, "cross-entropy", 300),
    "resnet18, squared, primal": Case("torchvision/resnet18", 64, 10, ("bn",), "squared", 500, "primal"),
    "resnet18, 100 classes": Case("torchvision/resnet18", 64, 100, BN, "cross-entropy", 500),
    "resnet18, 1,000 classes": Case("torchvision/resnet18", 64, 1000, BN, "cross-entropy", 300),
    "shufflenet, matrix-free": Case("torchvision/shufflenet_v2_x0_5", 64, 10, BN, "squared", 100, "matrix-free"),
    "vit_small, LoRA": Case("timm/vit_small_patch16_224", 96, 10, ("lora:4", "head"), "cross-entropy", 200),
    "vit_b_32, prompts": Case("torchvision/vit_b_32", 224, 10, PROMPTS, "cross-entropy", 64),
}


def one(case: Case) -> dict[str, Any]:
    """Plan and prepare, in this process."""
    torch.manual_seed(0)
    model, _ = fastntk.load_model(case.model, case.classes, size=case.side)
    randomise(model)
    train, loss = Images(case.images, case.side, case.classes), loss_named(case.loss)
    fastntk.tune(model, *case.select)
    initial = moved(model)
    started = time.perf_counter()
    planned = fastntk.plan(model, train, form=case.form, loss=loss)
    answered = time.perf_counter() - started
    with peak_memory(torch.device("cpu")) as peak:
        memory = fastntk.prepare(model, train, initial, form=case.form, loss=loss)
        seconds = time.perf_counter() - started - answered
        first = memory.ready()
    assert memory.form == planned.form
    fits = [fastntk.fit(model, train, epochs=epochs, loss=loss).seconds for epochs in (1, 2)]
    return {
        "form": memory.form,
        "plan": answered,
        "seconds": seconds,
        "gib": peak.bytes / 2**30,
        "time": planned.total_seconds / seconds,
        "first": sum(planned.first.values()) / first if planned.first else "",
        "memory": planned.bytes / peak.bytes,
        "retraining": planned.retraining / (6 * fits[1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(CASES[arguments.one])))
        return
    rows: list[dict[str, Any]] = []
    table = Table("case", "form", "plan s", "prepare s", "GiB", "time", "first", "memory", "retraining")
    for name in (each for each in CASES if arguments.only in each):
        rows.append({"case": name, **in_own_process(__file__, "--one", name)})
        print(json.dumps(rows[-1]), flush=True)
        table.add_row(*(each if isinstance(each, str) else f"{each:.2f}" for each in rows[-1].values()))
    Console(width=120).print(table)
    print(json.dumps({"cases": rows}))


if __name__ == "__main__":
    main()
