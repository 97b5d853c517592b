"""Per-sample Jacobians: how near to the least that a batch's forward and backward passes take, and against what else.

    python benchmarks/jacobian.py [--models resnet18 ...] [--repeats 5]

Random weights, C = 10, batch-norm (ViT: layer-norm) parameters; ImageNet networks at 64 px, the ViT at 224 px. Columns:

limit   time over (one forward and C backward passes that carry activation gradients only, from the first tuned layer
        on, all parameters frozen)
vmap    time of torch.func's vmap(jacrev) over ours
loop    time of a loop over samples and classes, one backward pass each (the loop of Golatkar et al.'s notebook, as
        it describes itself), over ours
error   of the float32 Jacobian to a float64 per-sample oracle, relative, median over the images; and of torch.func's
error64 the same in float64, the largest of the images

All run in turn, torch.func and the loop on fewer images than ours and the limit; a ratio is the median over the rounds
of that of the times per image. The last line is JSON.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from networks import by_loop, by_vmap, randomise
from rich.console import Console
from rich.table import Table
from timing import interleaved, ratio
from torch import Tensor, nn
from torch.func import functional_call

from fastntk.common.machine import settle
from fastntk.inputs.libraries import timm, torchvision
from fastntk.jacobians.per_sample import PerSampleJacobian
from fastntk.tuning.parameters import snapshot, tuned
from fastntk.tuning.selectors import tune

CLASSES = 10


@dataclass(frozen=True)
class Case:
    """A network, what of it is tuned, and the images a batch."""

    make: Callable[[], nn.Module]
    select: str
    size: int
    batch: int = 128
    vmap_batch: int = 16
    loop_batch: int = 8


CASES = {
    "resnet18": Case(lambda: torchvision().models.resnet18(num_classes=CLASSES), "bn", 64),
    "mobilenet_v2": Case(lambda: torchvision().models.mobilenet_v2(num_classes=CLASSES), "bn", 64),
    "shufflenet_v2_x1_0": Case(lambda: torchvision().models.shufflenet_v2_x1_0(num_classes=CLASSES), "bn", 64),
    "tf_efficientnet_lite0": Case(lambda: timm().create_model("tf_efficientnet_lite0", num_classes=CLASSES), "bn", 64),
    "vit_b_32": Case(lambda: torchvision().models.vit_b_32(num_classes=CLASSES), "ln", 224, 16, 8, 2),
}


def prepared(case: Case, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """The model, its tuned parameters and a batch of images; norms with scales and statistics that are not trivial."""
    torch.manual_seed(0)
    model = case.make().eval()
    randomise(model)
    images = torch.randn(case.batch, 3, case.size, case.size).to(dtype)
    model = model.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    tune(model, case.select)
    return model, snapshot(tuned(model)), images.contiguous(memory_format=torch.channels_last)


def limit(model: nn.Module) -> Callable[[Tensor], None]:
    """One forward pass and C backward passes with every parameter frozen, down to the first tuned layer's input."""
    first = next(module for module in model.modules() if any(p.requires_grad for p in module.parameters(recurse=False)))
    frozen = {name: tensor.detach() for name, tensor in model.named_parameters()}

    def run(images: Tensor) -> None:
        starts: list[Tensor] = []

        def begin(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            starts.append(arguments[0].detach().requires_grad_())
            return (starts[0], *arguments[1:])

        handle = first.register_forward_pre_hook(begin)
        logits = functional_call(model, frozen, (images,))
        handle.remove()
        for c in range(CLASSES):
            torch.autograd.grad(logits[:, c].sum(), starts[0], retain_graph=c + 1 < CLASSES)

    return run


def errors(case: Case, count: int = 16) -> dict[str, float]:
    """Relative errors per image against the float64 loop."""
    model, parameters, images = prepared(case, torch.float64)
    images = images[:count]
    oracle = by_loop(model, images)
    ours64 = PerSampleJacobian(model, parameters)(images).rest
    single, parameters, _ = prepared(case)
    ours = PerSampleJacobian(single, parameters)(images.float()).rest
    func = by_vmap(single, parameters, images.float())
    scale = oracle.flatten(1).norm(dim=1)

    def relative(jacobian: Tensor) -> list[float]:
        return ((jacobian.double() - oracle).flatten(1).norm(dim=1) / scale).tolist()

    return {
        "error": statistics.median(relative(ours)),
        "error_largest": max(relative(ours)),
        "error_torch_func": statistics.median(relative(func)),
        "error_torch_func_largest": max(relative(func)),
        "error_float64": max(relative(ours64)),
    }


def measured(case: Case, repeats: int) -> dict[str, float]:
    """All figures of one network."""
    model, parameters, images = prepared(case)
    jacobian = PerSampleJacobian(model, parameters)
    work: dict[str, tuple[int, Callable[[Tensor], object]]] = {
        "limit": (case.batch, limit(model)),
        "ours": (case.batch, jacobian),
        "vmap": (case.vmap_batch, lambda images: by_vmap(model, parameters, images)),
        "loop": (case.loop_batch, lambda images: by_loop(model, images)),
    }
    runs = {name: partial(run, images[:batch]) for name, (batch, run) in work.items()}
    seconds = interleaved(runs, repeats)
    each = {name: [s / work[name][0] for s in of_runs] for name, of_runs in seconds.items()}  # an image
    return {
        "parameters": sum(tensor.numel() for tensor in parameters.values()),
        "milliseconds": 1e3 * statistics.median(each["ours"]),
        "limit_ratio": ratio(each, "ours", "limit"),
        "vmap_ratio": ratio(each, "vmap", "ours"),
        "loop_ratio": ratio(each, "loop", "ours"),
        **errors(case),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    settle()
    table = Table("model", "p", "ms/image", "limit", "vmap", "loop", "error", "error64")
    results = {}
    for name in arguments.models:
        results[name] = r = measured(CASES[name], arguments.repeats)
        table.add_row(
            name,
            f"{r['parameters']:,}",
            f"{r['milliseconds']:.2f}",
            *(f"{r[key]:.2f}" for key in ("limit_ratio", "vmap_ratio", "loop_ratio")),
            f"{r['error']:.1e} (torch.func {r['error_torch_func']:.1e})",
            f"{r['error_float64']:.0e}",
        )
        print(json.dumps({name: r}), flush=True)
    Console(width=120).print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
