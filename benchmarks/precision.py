"""What every shortcut of the arithmetic costs in accuracy, on the answer to a request.

    python benchmarks/precision.py [--samples 100]

ResNet-18 (random weights, 100 classes, images of 32 px, batch norm tuned, p = 9,600), random images, ten of them
forgotten, ridge 0.1 of the Gram matrix's mean diagonal (estimated from 16 images). Everything is compared with a
float64 network and float64 sums.

gram    relative error (Frobenius norm) of the Gram matrix
answer  relative error of the change of the tuned parameters that the request brings

``full`` is the default. TF32 exists on NVIDIA GPUs only: see gpu.py. The last line is JSON.
"""

import argparse
import json
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fastntk import SquaredLoss, prepare
from fastntk.inputs.libraries import torchvision
from fastntk.jacobians.per_sample import PerSampleJacobian
from fastntk.solve.primal import Primal
from fastntk.tuning.parameters import snapshot, tuned
from fastntk.tuning.selectors import tune

CLASSES = 100
CASES: dict[str, dict[str, Any]] = {
    "float32 network, float64 sums (full)": {},
    "float32 network, float32 sums": {"dtype": torch.float32},
    "bf16 network, float64 sums": {"precision": "bf16"},
    "50 class probes of 100": {"class_probes": 50},
    "20 class probes of 100": {"class_probes": 20},
}


def prepared(dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    """A network a little away from where it started, and where it started."""
    torch.manual_seed(0)
    model = torchvision().models.resnet18(num_classes=CLASSES).to(dtype).eval()
    tune(model, "bn")
    initial = snapshot(tuned(model))
    with torch.no_grad():
        for parameter in tuned(model).values():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model, initial


def answer(train: TensorDataset, dtype: torch.dtype, ridge: float, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The Gram matrix and the change of the parameters when ten samples go."""
    model, initial = prepared(dtype)
    memory = prepare(model, train, initial, form="primal", ridge=ridge, loss=SquaredLoss(), **options)
    state, gone = memory.state, torch.arange(10)
    update = state.solution.update(state.network, gone, -1, state.rows(gone))
    return cast(Primal, state.solution).sums.rest.double(), update.change


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100)
    arguments = parser.parse_args()
    images, labels = torch.randn(arguments.samples, 3, 32, 32), torch.arange(arguments.samples) % CLASSES
    double = TensorDataset(images.double(), labels)
    model, _ = prepared(torch.float64)
    few = PerSampleJacobian(model, snapshot(tuned(model)))(double.tensors[0][:16]).rest
    ridge = 0.1 * float(few.square().sum()) / 16 * arguments.samples / few.shape[2]
    exact_gram, exact = answer(double, torch.float64, ridge, {})
    table, results = Table("what", "gram", "answer"), {}
    for name, options in CASES.items():
        gram, change = answer(TensorDataset(images, labels), torch.float32, ridge, options)
        row = [float((a - b).norm() / b.norm()) for a, b in ((gram, exact_gram), (change, exact))]
        print(name, row, flush=True)
        results[name] = dict(zip(("gram", "answer"), row, strict=True))
        table.add_row(name, *(f"{each:.1e}" for each in row))
    Console(width=100).print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
