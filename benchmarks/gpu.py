"""What matters on one GPU, in some eight minutes: random weights, and random images of 224 px that are on the GPU.

    python benchmarks/gpu.py [--out gpu.jsonl] [--minutes 8] [--only TEXT]
    python benchmarks/gpu.py --tiny --device cpu            the same path with small networks and a dozen images

*Jacobians*: of a batch of 64, images a second, in every precision; their error against float64 on the CPU (median over
eight images); torch.func's vmap(jacrev) beside them. *prepare*: a network is fitted for an epoch on some of the images,
then a memory is prepared; *first* is what the first request waits for beside its own time; requests for ten images and
for a tenth of them; *over retrain*: all of these over twelve epochs, from the one that was run. ViT-B/32 with ten
prompts and head, 5,000 and 50,000 images; ResNet-50 with batch norm and head, 5,000 images of 100 and of 1,000 classes.

Every line is written to ``--out`` when it is known, so what was cut off is not lost; what does not begin in time, or
ends in an error, is left out, and said to be. The first line names the device, the last is JSON. A device that torch
cannot use is exit status 2, a row that ended in an error 1.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from networks import by_vmap, randomise
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

import fastntk
from fastntk.common.machine import device_name, peak_memory, settle, synchronise
from fastntk.inputs.libraries import timm, torchvision
from fastntk.jacobians.linearised import jacobians
from fastntk.jacobians.numerics import PRECISIONS
from fastntk.jacobians.per_sample import PerSampleJacobian
from fastntk.tuning.losses import loss_named
from fastntk.tuning.parameters import snapshot, tuned

EPOCHS = 12  # of the retraining that is compared with


@dataclass(frozen=True)
class Sizes:
    """What is run: of networks, images, and what is fitted to know an epoch."""

    vit: Callable[[int], nn.Module]
    resnet: Callable[[int], nn.Module]
    side: int
    batch: int
    few: int
    many: int
    fitted: int
    classes: tuple[int, int]


FULL = Sizes(
    lambda c: torchvision().models.vit_b_32(num_classes=c),
    lambda c: torchvision().models.resnet50(num_classes=c),
    *(224, 64, 5000, 50_000, 2000, (100, 1000)),
)
TINY = Sizes(
    lambda c: timm().create_model("vit_tiny_patch16_224", num_classes=c, img_size=32, depth=2),
    lambda c: timm().create_model("test_resnet", num_classes=c),
    *(32, 4, 12, 14, 8, (5, 7)),
)
SELECT = {"vit": ("prompt:10", "head"), "resnet": ("bn", "head")}


class Images(Dataset):
    """A thousand images on the device, each brighter whenever it comes again. A class is a pattern in noise."""

    def __init__(self, count: int, side: int, classes: int, device: torch.device) -> None:
        self.count, self.classes = count, classes
        generator = torch.Generator(device).manual_seed(0)
        self.pixels = torch.randn(min(count, 1000), 3, side, side, device=device, generator=generator)
        patterns = torch.randn(classes, 3, 8, 8, device=device, generator=generator)
        self.pixels += F.interpolate(patterns, side)[torch.arange(len(self.pixels)) % classes]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        turn, place = divmod(index, len(self.pixels))
        return self.pixels[place] * (1 + 0.01 * turn), place % self.classes


class Bench:
    """The measurements, one after the other."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self.exact: dict[str, Tensor] = {}  # of each network, in float64

    def network(self, kind: str, classes: int, dtype: torch.dtype = torch.float32, device: str = "") -> nn.Module:
        """With its selection tuned."""
        torch.manual_seed(0)
        model = getattr(self.sizes, kind)(classes).eval()
        randomise(model)
        fastntk.tune(model, *SELECT[kind])
        return model.to(device or self.device, dtype)

    def clocked(self, work: Callable[[], object]) -> float:
        """Seconds, until the device is done."""
        synchronise(self.device)
        started = time.perf_counter()
        work()
        synchronise(self.device)
        return time.perf_counter() - started

    def jacobian(self, kind: str, precision: str) -> dict[str, Any]:
        """Images a second, and the error."""
        model = self.network(kind, 10)
        ours = PerSampleJacobian(model, snapshot(tuned(model)))
        images = Images(self.sizes.batch, self.sizes.side, 10, self.device).pixels
        labels = torch.arange(len(images), device=self.device) % 10

        def work() -> Tensor:
            [(found, _)] = jacobians(ours, [(images, labels)], fastntk.SquaredLoss(), precision)
            return found.rest

        work()
        seconds, few = self.clocked(work), min(8, len(images))
        if kind not in self.exact:
            exact = self.network(kind, 10, torch.float64, "cpu")
            jacobian = PerSampleJacobian(exact, snapshot(tuned(exact)))
            self.exact[kind] = jacobian(images[:few].double().cpu()).rest.flatten(1)
        wanted = self.exact[kind]
        off = (work()[:few].cpu().double().flatten(1) - wanted).norm(dim=1) / wanted.norm(dim=1)
        return {"images_a_second": len(images) / seconds, "error": statistics.median(off.tolist())}

    def vmap(self, kind: str) -> dict[str, Any]:
        """torch.func's, images a second, with as many images as fit."""
        model, images = self.network(kind, 10), Images(self.sizes.batch, self.sizes.side, 10, self.device).pixels
        parameters = snapshot(tuned(model))
        while len(images):
            try:
                work = partial(by_vmap, model, parameters, images)
                work()
                return {"batch": len(images), "images_a_second": len(images) / self.clocked(work)}
            except torch.OutOfMemoryError:
                images = images[: len(images) // 2]
        return {"batch": 0, "images_a_second": 0.0}

    def prepare(self, kind: str, count: int, classes: int, loss: str, precision: str) -> dict[str, Any]:
        """A memory, requests, and an epoch of fitting."""
        model, own = self.network(kind, classes), loss_named(loss)
        train = Images(count, self.sizes.side, classes, self.device)
        part = Subset(train, range(min(count, self.sizes.fitted)))
        fit = fastntk.fit(model, part, epochs=1, loss=own)
        retraining = EPOCHS * fit.seconds * count / len(part)
        with peak_memory(self.device) as peak:
            started = time.perf_counter()
            memory = fastntk.prepare(model, train, fit.initial, loss=own, precision=precision)
            synchronise(self.device)
            prepared = time.perf_counter() - started
            first = memory.ready()
        requests = {"ten": memory.ids[1:11], "tenth": memory.ids[::10]}
        seconds = {name: memory.preview(ids).seconds for name, ids in requests.items()}
        known = {"prepare": prepared, "first": first, **seconds}
        return {
            "form": memory.form,
            "classes_kept": memory.state.network.keep,
            "fit_accuracy": fit.accuracies[-1],
            "retrain": retraining,
            "gib": peak.bytes / 2**30,
            **known,
            **{f"{name}_over_retrain": each / retraining for name, each in known.items()},
        }

    def all(self) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
        """What is measured, the most wanted first: what it is called, and how to."""
        few, many, (some, more) = self.sizes.few, self.sizes.many, self.sizes.classes
        prepared: list[tuple[str, int, int, str, str]] = [
            ("vit", few, 10, "squared", "full"),
            ("vit", few, 10, "cross-entropy", "full"),
            ("resnet", few, some, "cross-entropy", "full"),
            ("resnet", few, more, "cross-entropy", "full"),
            ("vit", many, 10, "cross-entropy", "tf32"),
            ("vit", many, 10, "squared", "tf32"),
        ]
        for kind in SELECT:
            for precision in PRECISIONS:
                described = {"what": "Jacobians", "network": kind, "precision": precision}
                yield described, partial(self.jacobian, kind, precision)
            yield {"what": "vmap(jacrev)", "network": kind}, partial(self.vmap, kind)
        for case in prepared:
            names = ("network", "images", "classes", "loss", "precision")
            yield {"what": "prepare", **dict(zip(names, case, strict=True))}, partial(self.prepare, *case)


def tried(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it found, or how it ended: the rest of the time is not lost with it."""
    try:
        return work()
    except (RuntimeError, fastntk.InputError) as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small networks and a dozen images")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing else begins")
    parser.add_argument("--only", default="", help="what has this in its line, such as tf32")
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), help="where every line goes at once")
    arguments = parser.parse_args()
    try:
        device = torch.device(arguments.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        print(f"torch cannot use the device {arguments.device!r} here ({error}).", file=sys.stderr)
        sys.exit(2)
    settle()
    started, rows = time.perf_counter(), []
    print(device_name(device), torch.__version__)
    with arguments.out.open("w") as file:
        for described, work in Bench(TINY if arguments.tiny else FULL, device).all():
            if arguments.only not in json.dumps(described):
                continue
            if time.perf_counter() - started > 60 * arguments.minutes:
                rows.append({**described, "left_out": "no time was left"})
            else:
                rows.append({**described, **tried(work)})
            print(json.dumps(rows[-1]), file=file, flush=True)
            print(json.dumps(rows[-1]), flush=True)
    print(json.dumps({"device": device_name(device), "seconds": time.perf_counter() - started, "rows": rows}))
    if any("failed" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
