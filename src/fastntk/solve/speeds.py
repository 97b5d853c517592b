"""How fast this machine is at the work that preparing is made of: measured in some seconds, on few images."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastntk.common.machine import elapsed, synchronise
from fastntk.inputs.batches import checked
from fastntk.jacobians import products
from fastntk.jacobians.jacobian import Jacobian
from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.numerics import arithmetic
from fastntk.jacobians.rows import PART
from fastntk.solve.linalg import add_product_, cholesky_
from fastntk.solve.sums import ROWS

_AIM = 0.7  # seconds that a piece of work is timed for
_ROWS = 4  # of an image, that are timed, at most: each further one is a backward pass more
_ROW_BYTES = 2**30  # of Jacobians that are timed, at most
_READ = 2**27  # bytes of rows that are read for it, at most
_TRIAL = 3072  # the side of the matrices that are multiplied and factorised, at most


@dataclass(frozen=True)
class Cost:
    """Seconds and floating-point operations of an image."""

    seconds: float
    operations: float


class Speeds:
    """Of one network on this machine; everything is measured when it is first asked for.

    Args:
        network: whose images are read and passed through; at least one.
        batch: images a batch, at most.
    """

    def __init__(self, network: Linearised, batch: int) -> None:
        self.network = replace(network, numerics=replace(network.numerics, workers=0))  # which take long to start
        self.most = max(1, min(batch, len(network.train)))  # type: ignore[arg-type]
        self._trial, self._factor = cache(self._tried), cache(self._factored)

    def rows(self, outputs: int) -> Cost:
        """An image's Jacobian of so many outputs: one forward pass, and a backward pass each."""
        one, most = self._of_rows[1], max(self._of_rows)
        further = (outputs - 1) / (most - 1)
        each = max(self._of_rows[most].seconds - one.seconds, 0.0)
        operations = self._of_rows[most].operations - one.operations
        return Cost(one.seconds + further * each, one.operations + further * operations)

    @cached_property
    def forward(self) -> Cost:
        """An image's logits."""
        network = self.network

        def logits(few: range) -> None:
            for images, _ in network.images(few):
                network.logits(checked(images).to(network.device))

        with torch.no_grad(), arithmetic(network.numerics.precision, network.device):
            return self._an_image(logits)

    @cached_property
    def _of_rows(self) -> dict[int, Cost]:
        """An image's Jacobian, by its number of outputs."""
        most = min(_ROWS, self.network.classes)
        counts, size = sorted({1, most}), self.network.layout.size * self.network.dtype.itemsize
        return {k: self._an_image(self._keeping(k).rows, max(1, _ROW_BYTES // (k * size))) for k in counts}

    def _keeping(self, count: int) -> Linearised:
        """The network with so many rows a sample: contrasts, or, where there are not as many, probes."""
        network, keep = self.network, count + self.network.loss.contrasted
        probes = count if keep > network.classes else None
        numerics = replace(network.numerics, class_probes=probes)
        return replace(network, keep=None if probes else keep, numerics=numerics)

    @cached_property
    def gram(self) -> Cost:
        """An image's part of a product of the Gauss-Newton matrix with a vector."""
        vector = torch.ones(self.network.layout.size, dtype=torch.float64, device=self.network.device)
        return self._an_image(lambda few: products.gram(self.network, few, vector))

    @cached_property
    def training(self) -> Cost:
        """An image's part of a step of fitting."""
        network = self.network
        free = {name: each.clone().requires_grad_() for name, each in network.jacobian.parameters.items()}

        def step(few: range) -> None:
            for images, labels in network.images(few):
                loss = network.loss(network.logits(checked(images).to(network.device), free), labels.to(network.device))
                torch.autograd.grad(loss, list(free.values()), allow_unused=True)

        return self._an_image(step)

    def _an_image(self, work: Callable[[range], object], room: int | None = None) -> Cost:
        """Of some work on the images at given positions, in batches of ``most``, or of as many as there is ``room``
        for: from one image, and from as many as take about ``_AIM`` seconds, as what a batch takes and what every image
        more does."""
        most = min(self.most, room or self.most)
        device = self.network.device
        with FlopCounterMode(display=False) as counter:  # and what is slow the first time
            work(range(1))
        one = _clocked(lambda: work(range(1)), device)
        count = min(most, int(_AIM / one))
        each = one if count < 2 else (_clocked(lambda: work(range(count)), device) - one) / (count - 1)
        seconds = max(each, 0.0) + max(one - each, 0.0) / most
        return Cost(seconds, float(counter.get_total_flops()))

    def read(self, outputs: int, dtype: torch.dtype) -> float:
        """Seconds a sample to multiply with so many rows of each, both ways: rows of a dtype, as what is read from
        disk and stays in the system's memory."""
        network, layout = self.network, self.network.layout
        head, rows = sum(layout.shapes[name].numel() for name in layout.head), outputs + network.loss.contrasted
        samples = max(1, min(PART, _READ // (outputs * layout.size * network.dtype.itemsize)))
        jacobian = Jacobian(
            torch.zeros(samples, outputs, layout.size - head, dtype=dtype),
            torch.zeros(samples, head // network.classes, dtype=network.dtype),
            None if rows > network.classes else torch.arange(rows).expand(samples, -1),
            network.classes,
        )
        vector = torch.ones(layout.size, dtype=torch.float64, device=network.device)

        def both() -> None:
            rows = jacobian.to(network.dtype, network.device)
            rows.rmatvec(rows.matvec(vector))

        return _clocked(both, network.device) / samples

    def rate(
        self, side: int, rows: int, dtype: torch.dtype = torch.float64, factors: torch.dtype | None = None
    ) -> float:
        """Entries of a sum of products a second, for a symmetric matrix of that side and dtype to which the products of
        so many rows are added at a time, taken in the dtype of ``factors`` (None: the network's)."""
        return self._trial(_size(side), max(1, ROWS // rows) * rows, dtype, factors or self.network.dtype)[0]

    def matvec(self, side: int, dtype: torch.dtype) -> float:
        """Seconds of such a matrix's product with a vector."""
        trial = _size(side)
        return (side / trial) ** 2 * self._trial(trial, ROWS, dtype, dtype)[1]

    def factor(self, side: int) -> float:
        """Seconds of a float32 Cholesky factor."""
        trial = _size(side)
        return (side / trial) ** 3 * self._factor(trial)

    def _factored(self, trial: int) -> float:
        """Seconds of a factor of that side."""
        matrix = torch.eye(trial, device=self.network.device)
        return _clocked(lambda: cholesky_(matrix), self.network.device)

    def _tried(self, trial: int, count: int, dtype: torch.dtype, factors: torch.dtype) -> tuple[float, float]:
        """A rate, and seconds of a product with a vector."""
        device = self.network.device
        parts = torch.randn(count, trial, device=device, dtype=factors)
        matrix = torch.zeros(trial, trial, device=device, dtype=dtype)
        multiply = _clocked(lambda: add_product_(matrix, parts.T, parts.T), device)
        vector = torch.ones(trial, device=device, dtype=dtype)
        return count * trial**2 / multiply, _clocked(lambda: matrix @ vector, device)


def _size(side: int) -> int:
    """Of the matrices that stand for one of that side."""
    return max(1, min(side, _TRIAL))


def _clocked(work: Callable[[], object], device: torch.device) -> float:
    """The seconds of some work: the median of as many as start within ``_AIM`` seconds, at most three."""
    seconds: list[float] = []
    while len(seconds) < 3 and sum(seconds) < _AIM:
        synchronise(device)
        started = time.perf_counter()
        work()
        seconds.append(elapsed(started, device))
    return statistics.median(seconds)
