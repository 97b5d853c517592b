"""The paper's largest case, whole: ViT-B/32 (87 million parameters), ten prompts and the head, 5,000 or 50,000 images.

    python benchmarks/vit.py --data cifar10.npz                     fit, prepare, forget, retrain twice, compare
    python benchmarks/vit.py --data cifar10.npz --fits 2            two fits of what is missing, and nothing else
    python benchmarks/vit.py --data cifar10.npz --linearised 224    prepare and forget, at the paper's size of images
    python benchmarks/vit.py --data cifar10.npz --side 224 --device cuda [--crops 10 --epochs 3 --tf32]

The backbone is a ViT-S/14 that was widened without a change of its function (benchmarks/widened.py). CIFAR-10, 500
images a class, cross-entropy, 12 epochs, at 64 px: a class and a random tenth, two retrained models each. Fits are kept
under --out one by one, each after 50 minutes of a core, 20 with --bf16; the command goes on where it was cut off. With
--linearised the prompts of that fit are linearised at 224 px. With --crops every photo stands so many times, moved by
up to an eighth of its side and every other time flipped, and goes with all of these. On a GPU all images are kept
there; --tf32 lets Jacobians round products to TF32; --bf16 fits, as most networks of this size are fitted, under
autocast to bfloat16. The last line is JSON.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cross_entropy import Answers
from fits import MODELS, RECIPES, REQUESTS, Case, Setting
from paper import Steps, answers
from pretrained import cifar, fingerprint
from timing import peak_bytes
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset
from widened import vit_b32

import fastntk
from fastntk.common.files import read_json, writable, write_json
from fastntk.common.machine import device_name, peak_memory, settle
from fastntk.evidence.bench.stored import fitted
from fastntk.evidence.requests import drawn
from fastntk.inputs.batches import Labelled, labels_of
from fastntk.tuning.parameters import snapshot, tuned

SETTING, TWICE = Setting("vit_b32", "plain", 10, 500, 0), 2


@dataclass(frozen=True)
class Photos(Case):
    """Of every photo some crops, which stand one after the other and are asked for together."""

    crops: int = 1
    precision: str = "full"

    def requests(self) -> Iterator[tuple[str, list, Dataset]]:
        """Every request: its name, the ids, and the test images that it leaves."""
        photos = Subset(self.train, range(0, len(self.train), self.crops))
        for request in self.asked:
            ids, test = drawn(REQUESTS[request], photos, self.test, SETTING.head, gone=SETTING.head)
            yield request, [self.crops * int(photo) + crop for photo in ids for crop in range(self.crops)], test

    def prepared(self, **options: Any) -> fastntk.Memory:
        """Its memory."""
        return super().prepared(precision=self.precision, **options)


def fitting(arguments: argparse.Namespace) -> torch.autocast:
    """Where networks are fitted: under autocast to bfloat16, or as they are."""
    return torch.autocast(torch.device(arguments.device).type, torch.bfloat16, enabled=arguments.bf16)


def moved(images: Tensor, crop: int) -> Tensor:
    """The images themselves, then others: moved by up to an eighth of their side, every other time flipped."""
    if not crop:
        return images
    reach = images.shape[-1] // 8
    down, right = torch.randint(2 * reach + 1, (2,), generator=torch.Generator().manual_seed(crop)).tolist()
    whole = F.pad(images, [reach] * 4, mode="reflect")
    part = whole[..., down : down + images.shape[-2], right : right + images.shape[-1]]
    return part.flip(-1) if crop % 2 else part


def cropped(photos: Labelled, crops: int, device: torch.device) -> TensorDataset:
    """All crops of all photos, in the device's memory."""
    images = torch.stack([photos[i][0] for i in range(len(photos))]).to(device)
    every = torch.stack([moved(images, crop) for crop in range(crops)], 1).flatten(0, 1)
    return TensorDataset(every, labels_of(photos).repeat_interleave(crops))


def opened(arguments: argparse.Namespace) -> Photos:
    """Fit, or take the fit from before."""
    device = torch.device(arguments.device)
    model, preprocessing = vit_b32(arguments.side)
    train, test = (
        cropped(part, crops, device)
        for part, crops in zip(
            cifar(arguments.data, preprocessing, SETTING.per_class), (arguments.crops, 1), strict=True
        )
    )
    select = MODELS[SETTING.model][1]
    fastntk.tune(model.to(device), *select)
    recipe = replace(RECIPES[SETTING.recipe], epochs=arguments.epochs, batch_size=arguments.batch_size)
    key = fingerprint(SETTING, preprocessing, select, recipe, arguments.crops, arguments.bf16)
    folder = writable(arguments.out / "vit" / f"{SETTING}-{arguments.side}-{key}")
    with fitting(arguments):
        fit = fitted(model, train, recipe, folder / "original.safetensors", key)
    precision = "tf32" if arguments.tf32 else "full"
    asked = tuple(arguments.requests.split(","))
    return Photos(SETTING, model, train, test, fit, folder, key, asked, arguments.crops, precision)


def missing(case: Case, count: int | None, retrained: int) -> None:
    """Make so many of the retrained models that are not there, or all, of so many for each request."""
    asked = [(request, ids, k) for request, ids, _ in case.requests() for k in range(retrained)]
    absent = [each for each in asked if not (case.folder / f"{each[0]}-retrained-{each[2]}.safetensors").exists()]
    for request, ids, k in absent[:count]:
        case.retrained(request, ids, k + 1)


def linearised(case: Photos, side: int, data: str) -> dict[str, Any]:
    """Prepare and forget with images of another side, at the parameters of the fit."""
    model, preprocessing = vit_b32(side)
    train, _ = cifar(data, preprocessing, SETTING.per_class)
    fastntk.tune(model.to(case.device), *MODELS[SETTING.model][1])
    model.load_state_dict(snapshot(tuned(case.model)), strict=False)
    case = replace(case, model=model, train=train)
    answered, known = prepared(case)
    seconds = {request: answered.memory.preview(ids).seconds for request, ids, _ in case.requests()}
    return {"side": side, "fit": case.fit.seconds, **known, **seconds}


def prepared(case: Photos) -> tuple[Answers, dict[str, Any]]:
    """A memory, and what it cost; for a few images Golatkar's step stands beside ours."""
    with peak_memory(case.device) as peak:
        found = (Steps if case.crops == 1 else Answers)(case, others=False)
        first = found.memory.ready()
    network = found.memory.state.network
    known = {"images": len(case.train), "form": found.memory.form, "classes_kept": network.keep}
    known |= {"prepare": found.prepared, "first": first, "peak_gib": peak.bytes / 2**30}
    return found, known | {"process_gib": peak_bytes() / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 as .npz")
    parser.add_argument("--fits", type=int, help="so many, and nothing else")
    parser.add_argument("--linearised", type=int, help="side of images, for preparing and forgetting alone")
    parser.add_argument("--side", type=int, default=64, help="of the images, a multiple of 32")
    parser.add_argument("--crops", type=int, default=1, help="of every photo")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=32, help="of the fits")
    parser.add_argument("--retrained", type=int, default=TWICE, help="models for each request")
    parser.add_argument("--requests", default="class,tenth")
    parser.add_argument("--tf32", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="fit under autocast to bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="where fits are kept")
    arguments = parser.parse_args()
    if arguments.linearised and arguments.crops > 1:
        parser.error("--linearised takes the photos alone: leave --crops out.")
    settle()
    started = time.perf_counter()
    case = opened(arguments)
    fresh = time.perf_counter() - started
    if arguments.linearised:
        print(json.dumps(linearised(case, arguments.linearised, arguments.data)))
        return
    with fitting(arguments):
        missing(case, arguments.fits, arguments.retrained)
    if arguments.fits:
        return
    kept = case.folder / f"paper-{arguments.requests}-{arguments.retrained}.json"
    if not kept.exists():
        answered, cost = prepared(case)
        known = {"device": device_name(case.device), "side": arguments.side, "crops": arguments.crops, **cost}
        known |= {"opened": fresh, "fit": case.fit.seconds, "recipe": str(case.fit.recipe)}
        known |= {"tf32": arguments.tf32, "bf16": arguments.bf16}
        print(json.dumps(known), flush=True)
        write_json(kept, {**known, "rows": answers(case, arguments.retrained, answered)})
    print(json.dumps(read_json(kept)))


if __name__ == "__main__":
    main()
