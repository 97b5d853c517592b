"""What others would use for ``G = sum_i J_i'J_i``, the Gauss-Newton matrix of the squared loss, beside ours.

    pip install laplace-torch curvlinops-for-pytorch
    python benchmarks/peers.py [--samples 256] [--repeats 3] [--names ours ...]

ResNet-18 with random weights at 64 px, 10 classes, batch norm tuned (p = 9,600), all else frozen, the same random
images for all. Each run is a process of its own; processes take turns, and ratios are the median over the rounds. Two
images run untimed first. Columns: seconds; peak GB of the process; time and peak over ours; relative error to a
float64 matrix from torch.func, on four images in float64 (in float32 rounding takes a ReLU's input across zero).

ours            Sums.observe_ over PerSampleJacobian, float32 sums like all others
ours_float64    the same with float64 sums, the default of prepare
laplace         laplace-torch's full GGN (Daxberger et al. 2021, arXiv 2106.14806) by SubnetLaplace over every tuned
                parameter, whose default backend takes torch.func's Jacobian of a batch. Its FullLaplace wants all
                p columns at once and does not fit into 24 GB
laplace_asdl    FullLaplace with the AsdlGGN backend: wrong on networks that add in place after a batch norm
golatkar        one backward pass a sample and class, all rows kept, one product at the end: the loop of the NTK
                forgetting notebook of Golatkar et al. 2020 (arXiv 2003.02960) and of SSD's NTK function (Foster et al.
                2024, arXiv 2308.07707), from their description. Theirs form the nC x nC product in place of the p x p
curvlinops      curvlinops' GGNLinearOperator (Dangel et al. 2025, arXiv 2501.19183), which multiplies and forms no G,
                times the identity: 32 of its columns are timed and counted up
torch_func      vmap(jacrev), batch by batch
torch_func_vjp  one vjp of a vmap with per-sample copies of the parameters, pulled back once a class

The last line is JSON.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from networks import by_loop, by_vmap, randomise
from rich.console import Console
from rich.table import Table
from timing import in_own_process, peak_bytes
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils.data import DataLoader, TensorDataset

from fastntk.common.machine import settle
from fastntk.inputs.libraries import torchvision
from fastntk.jacobians.per_sample import PerSampleJacobian
from fastntk.solve.sums import Sums, accumulate
from fastntk.tuning.parameters import snapshot, tuned
from fastntk.tuning.selectors import tune

CLASSES, SIDE = 10, 64


def problem(samples: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """The network as every peer gets it, and the images."""
    torch.manual_seed(0)
    model = torchvision().models.resnet18(num_classes=CLASSES).eval()
    randomise(model)
    images = torch.randn(samples, 3, SIDE, SIDE)
    tune(model, "bn")
    return model.to(dtype), images.to(dtype)


def ours(model: nn.Module, images: Tensor, batch: int = 32, dtype: torch.dtype | None = None) -> Tensor:
    """The lower triangle is mirrored, as prepare does."""
    settle()
    jacobian = PerSampleJacobian(model, snapshot(tuned(model)))
    sums = Sums.zero(jacobian(images[:1]), dtype or images.dtype)
    parts = images.split(batch)
    accumulate(((jacobian(part), part.new_zeros(len(part), CLASSES)) for part in parts), sums)
    return sums.complete_().rest


def ours_float64(model: nn.Module, images: Tensor) -> Tensor:
    return ours(model, images, dtype=torch.float64)


def _laplace(model: nn.Module, images: Tensor, batch: int, **choice: object) -> Tensor:
    from laplace import Laplace

    targets = F.one_hot(torch.arange(len(images)) % CLASSES, CLASSES).to(images)  # H does not depend on them
    posterior = Laplace(model, "regression", hessian_structure="full", **choice)
    posterior.fit(DataLoader(TensorDataset(images, targets), batch_size=batch))
    return posterior.H


def laplace(model: nn.Module, images: Tensor, batch: int = 2) -> Tensor:
    """Batches of two: larger ones are no faster and take more memory."""
    indices = torch.arange(sum(parameter.numel() for parameter in tuned(model).values()))
    return _laplace(model, images, batch, subset_of_weights="subnetwork", subnetwork_indices=indices)


def laplace_asdl(model: nn.Module, images: Tensor, batch: int = 32) -> Tensor:
    from laplace.curvature import AsdlGGN

    return _laplace(model, images, batch, subset_of_weights="all", backend=AsdlGGN)


def curvlinops(model: nn.Module, images: Tensor, batch: int = 64, columns: int = 32) -> Tensor:
    """The first of the columns; of a sum of squares, of which G is half the curvature."""
    from curvlinops import GGNLinearOperator

    targets = F.one_hot(torch.arange(len(images)) % CLASSES, CLASSES).to(images)
    data = [*zip(images.split(batch), targets.split(batch), strict=True)]
    own = list(tuned(model).values())
    operator = GGNLinearOperator(model, nn.MSELoss(reduction="sum"), own, data, check_deterministic=False)
    return operator @ torch.eye(operator.shape[0], columns, dtype=images.dtype) / 2


def golatkar(model: nn.Module, images: Tensor) -> Tensor:
    dense = by_loop(model, images).flatten(0, 1)
    return dense.T @ dense


def _accumulated(rows: Callable[[Tensor], Tensor], images: Tensor, batch: int) -> Tensor:
    gram: Tensor | float = 0.0
    with torch.no_grad():  # no graph to the tuned parameters
        for part in images.split(batch):
            jacobian = rows(part)
            gram = gram + jacobian.T @ jacobian
    return gram  # type: ignore[return-value]


def torch_func(model: nn.Module, images: Tensor, batch: int = 16) -> Tensor:
    parameters = snapshot(tuned(model))
    return _accumulated(lambda part: by_vmap(model, parameters, part).flatten(0, 1), images, batch)


def torch_func_vjp(model: nn.Module, images: Tensor, batch: int = 32) -> Tensor:
    parameters = snapshot(tuned(model))

    def logits(copies: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, copies, (image[None],))[0]

    def rows(part: Tensor) -> Tensor:
        copies = {name: value.expand(len(part), *value.shape) for name, value in parameters.items()}
        pull = vjp(lambda copies: vmap(logits)(copies, part), copies)[1]
        eye = torch.eye(CLASSES).to(part)[:, None].expand(-1, len(part), -1)
        return torch.cat([torch.cat([g.flatten(1) for g in pull(each)[0].values()], 1) for each in eye])

    return _accumulated(rows, images, batch)


def oracle(model: nn.Module, images: Tensor) -> Tensor:
    """Image by image, with no rule and no batch."""
    return torch_func(model, images, 1)


ALL: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    each.__name__: each
    for each in (ours, ours_float64, laplace, laplace_asdl, curvlinops, golatkar, torch_func, torch_func_vjp)
}


def error(name: str) -> float:
    """Relative, in float64, on four images."""
    truth = oracle(*problem(4, torch.float64))
    found = ALL[name](*problem(4, torch.float64))
    truth = truth[:, : found.shape[1]]
    return float((found - truth).norm() / truth.norm())


def one(name: str, samples: int) -> dict[str, float]:
    """Seconds and peak memory in this process."""
    model, images = problem(samples)
    ALL[name](model, images[:2])
    started = time.perf_counter()
    found = ALL[name](model, images)
    seconds = (time.perf_counter() - started) * found.shape[0] / found.shape[1]
    return {"seconds": seconds, "peak_bytes": peak_bytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--names", nargs="+", choices=list(ALL), default=list(ALL))
    parser.add_argument("--one", choices=list(ALL), help=argparse.SUPPRESS)
    parser.add_argument("--error", choices=list(ALL), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.one:
        print(json.dumps(one(arguments.one, arguments.samples)))
        return
    if arguments.error:
        print(json.dumps({"error": error(arguments.error)}))
        return
    names = ["ours", *(name for name in arguments.names if name != "ours")]
    rounds = []
    for _ in range(arguments.repeats):
        rounds.append({name: in_own_process(__file__, "--one", name, "--samples", arguments.samples) for name in names})
        print(json.dumps(rounds[-1]), flush=True)
    table, results = Table("what", "seconds", "peak GB", "time over ours", "peak over ours", "error"), {}
    for name in names:
        figures = {
            "seconds": statistics.median(each[name]["seconds"] for each in rounds),
            "peak_bytes": statistics.median(each[name]["peak_bytes"] for each in rounds),
            "time_ratio": statistics.median(each[name]["seconds"] / each["ours"]["seconds"] for each in rounds),
            "memory_ratio": statistics.median(each[name]["peak_bytes"] / each["ours"]["peak_bytes"] for each in rounds),
            **in_own_process(__file__, "--error", name),
        }
        results[name] = figures
        seconds, peak, *ratios, wrong = figures.values()
        table.add_row(name, f"{seconds:.2f}", f"{peak / 1e9:.2f}", *(f"{each:.2f}" for each in ratios), f"{wrong:.0e}")
    Console(width=100).print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
