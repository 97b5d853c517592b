"""The paper's sizes on a GPU: 5,000 and 50,000 images at 224 px, ResNet-18 and ViT-B/32, random weights.

    python benchmarks/gpu.py [--samples 5000 50000] [--precision full tf32 bf16] [--cases ...]

resnet18 bn (p = 9,600) and vit_b_32 with ten prompts and head (p = 15,370), 10 classes. Random images, made on the GPU,
so that what is timed is Jacobians and sums, not the reading of files. Each row: seconds of the pass and of the solve,
peak GPU memory, and the error of the Jacobians of 16 images against float64 on the CPU (median over the images). The
first line names the GPU; the last is JSON. Without a GPU that torch can use it ends with exit status 2.
"""

import argparse
import json
import statistics
import sys
import time
from functools import cache

import torch
from networks import randomise
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fastntk.common.machine import settle
from fastntk.inputs.libraries import torchvision
from fastntk.jacobians.linearised import jacobians
from fastntk.jacobians.numerics import PRECISIONS
from fastntk.jacobians.per_sample import PerSampleJacobian
from fastntk.solve.primal import Primal
from fastntk.solve.sums import Sums, accumulate
from fastntk.tuning.loss import SquaredLoss
from fastntk.tuning.parameters import snapshot, tuned
from fastntk.tuning.selectors import tune

CLASSES, SIDE = 10, 224
CASES = {"resnet18": ("bn",), "vit_b_32": ("prompt:10", "head")}


def prepared(name: str, device: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network with its selection tuned."""
    torch.manual_seed(0)
    model = getattr(torchvision().models, name)(num_classes=CLASSES).eval()
    randomise(model)
    tune(model, *CASES[name])
    model = model.to(device, dtype).to(memory_format=torch.channels_last)
    return model, snapshot(tuned(model))


@cache
def exact(name: str, count: int) -> tuple[Tensor, Tensor]:
    """Some images, and their Jacobians in float64 on the CPU."""
    images = torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return images, PerSampleJacobian(*prepared(name, "cpu", torch.float64))(images.double()).rest


def error(name: str, precision: str, count: int = 16) -> float:
    """Of the Jacobians on the GPU, relative to float64 on the CPU."""
    images, wanted = exact(name, count)
    labels = torch.zeros(count, dtype=torch.long)
    jacobian = PerSampleJacobian(*prepared(name, "cuda", torch.float32))
    [(ours, _)] = jacobians(jacobian, [(images, labels)], SquaredLoss(), precision)
    differences = (ours.rest.cpu().double() - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    return statistics.median(differences.tolist())


def measured(name: str, samples: int, precision: str, batch: int, dtype: torch.dtype) -> dict[str, float]:
    """One pass and one solve."""
    model, parameters = prepared(name, "cuda", torch.float32)
    jacobian = PerSampleJacobian(model, parameters)
    generator = torch.Generator("cuda").manual_seed(0)
    labels = torch.arange(batch, device="cuda") % CLASSES

    def images(count: int) -> Tensor:
        pixels = torch.randn(count, 3, SIDE, SIDE, device="cuda", generator=generator)
        return pixels.contiguous(memory_format=torch.channels_last)

    def source(total: int):
        for start in range(0, total, batch):
            count = min(batch, total - start)
            yield images(count), labels[:count]

    sums = Sums.zero(jacobian(images(2)), dtype)
    accumulate(jacobians(jacobian, source(2 * batch), SquaredLoss(), precision), sums)  # to start the GPU's libraries
    sums = Sums.zero(jacobian(images(2)), dtype)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    accumulate(jacobians(jacobian, source(samples), SquaredLoss(), precision), sums).complete_()
    torch.cuda.synchronize()
    passed = time.perf_counter()
    displacement = torch.zeros(len(sums.rhs), dtype=torch.float64, device="cuda")
    Primal.of(sums, displacement, 0.1 * sums.trace / len(sums.rhs), torch.arange(samples))
    torch.cuda.synchronize()
    return {
        "pass_seconds": passed - started,
        "images_a_second": samples / (passed - started),
        "solve_seconds": time.perf_counter() - passed,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[5000, 50000])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--sums", choices=["float64", "float32"], default="float64")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a GPU that torch can use; there is none here.", file=sys.stderr)
        sys.exit(2)
    settle()
    print(torch.cuda.get_device_name(), torch.__version__, f"{arguments.sums} sums")
    table = Table("network", "images", "precision", "pass s", "images/s", "solve s", "peak GB", "error")
    results = {}
    for name in arguments.cases:
        for precision in arguments.precision:
            wrong = error(name, precision)
            for samples in arguments.samples:
                row = measured(name, samples, precision, arguments.batch, getattr(torch, arguments.sums))
                results[f"{name}/{samples}/{precision}"] = {**row, "error": wrong}
                passed, rate, solved, peak = row.values()
                figures = f"{passed:.1f}", f"{rate:.0f}", f"{solved:.1f}", f"{peak / 1e9:.1f}", f"{wrong:.0e}"
                table.add_row(name, f"{samples:,}", precision, *figures)
                print(json.dumps({"case": [name, samples, precision], **row, "error": wrong}), flush=True)
    Console(width=100).print(table)
    print(json.dumps({"device": torch.cuda.get_device_name(), **results}))


if __name__ == "__main__":
    main()
