"""The sums at the rate of matrix products, and the head's blocks without their zeros.

    python benchmarks/sums.py [--parameters 9600] [--samples 1024] [--repeats 3]

gemm ratio   (n C p^2 operations / time of adding n samples' Jacobians to the sums) over the rate of this machine's
             square matrix products of the same dtype, 2 m^3 operations each; larger is better. Half of the 2 n C p^2
             operations of the product are needed, as it is symmetric.
head         time of adding the Jacobians of a linear head, C = 100 and d = 512, written out with their zeros, as a
             dense product of p = 51,200 columns would, over the time of ``Sums.observe_`` on the same samples

Random Jacobians in float32, C = 10, as they come from the network: ``Sums.observe_`` converts them. Alternatives run
in turn; ratios are the median over the rounds. The last line is JSON.
"""

import argparse
import json

import torch
from rich.console import Console
from rich.table import Table
from timing import interleaved, ratio

from fastntk.common.machine import settle
from fastntk.jacobians.jacobian import Jacobian
from fastntk.solve.sums import ROWS, Sums

CLASSES = 10


def gemm_ratio(dtype: torch.dtype, p: int, samples: int, repeats: int) -> tuple[float, float]:
    """The ratio, and the rate of the sums in operations a second."""
    batch = ROWS // CLASSES
    part = Jacobian(torch.randn(batch, CLASSES, p), torch.empty(batch, 0))
    sums, residual = Sums.zero(part, dtype), torch.randn(batch, CLASSES)
    rounds = -(-samples // batch)
    square = torch.randn(4096, 4096, dtype=dtype)
    out = torch.empty_like(square)

    def add() -> None:
        for _ in range(rounds):
            sums.observe_(part, residual)

    seconds = interleaved({"sums": add, "square": lambda: torch.mm(square, square, out=out)}, repeats)
    operations = rounds * batch * CLASSES * p**2
    fastest = operations / (2 * len(square) ** 3)
    return fastest / ratio(seconds, "sums", "square"), operations / sorted(seconds["sums"])[repeats // 2]


def head_speedup(classes: int, width: int, samples: int, repeats: int) -> float:
    """The dense block over the structured one; the dense one from the lower triangle of some of its columns.

    The dense block is ``(C d)^2`` and 10.5 GB in float32. So that it fits, its time is that of one block of columns
    against all of them below the diagonal, times the number of such blocks.
    """
    part = Jacobian(torch.empty(samples, classes, 0), torch.randn(samples, width))
    residual, sums = torch.randn(samples, classes), Sums.zero(part, torch.float32)
    rows = part.dense().flatten(0, 1)
    columns = 20  # blocks
    block = rows[:, : rows.shape[1] // columns].contiguous()
    out = torch.zeros(rows.shape[1], block.shape[1])
    work = {"dense": lambda: out.addmm_(rows.T, block), "structured": lambda: sums.observe_(part, residual)}
    seconds = interleaved(work, repeats)
    # Half of the blocks: those below the diagonal.
    return ratio(seconds, "dense", "structured") * columns / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=9600)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    settle()
    table, results = Table("what", "ratio", "rate"), {}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        value, rate = gemm_ratio(dtype, arguments.parameters, arguments.samples, arguments.repeats)
        results[f"gemm_ratio_{name}"] = value
        table.add_row(f"sums over square product, {name}", f"{value:.2f}", f"{rate / 1e9:.0f} GF/s")
    results["head_speedup"] = head_speedup(100, 512, 64, arguments.repeats)
    table.add_row("dense over structured head", f"{results['head_speedup']:.0f}", "")
    Console(width=100).print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
