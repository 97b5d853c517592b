"""The ridge, found from the fitted model alone: no retrained model, no held-out data, no request.

Fitting stops long before its own explicit weight decay is felt, so the ridge that describes the fitted network as a
minimiser has to be found. ``s(D)`` of ``fastntk.solve`` leads from the fitted parameters to the optimum that the
linearised network has under a ridge. ``calibrate`` takes the ridge whose optimum has the outputs nearest to those that
the network really has on its training data:

    ridge = argmin |J s(D; ridge)|.

With too small a ridge the linearised optimum fits the training data better than the network did, with too large a one
worse. docs/benchmarks-ridge.md compares this rule with seven others on several models, against the best in hindsight.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.common.seeds import random_order
from fastntk.jacobians.rows import Point, Rows
from fastntk.solve.gram import Gram, Krylov, Spectrum
from fastntk.solve.kernel import Stored, kernel
from fastntk.solve.newton import DualProblem, NewtonMethod
from fastntk.tuning.loss import Loss

STEPS = 60
"""Of the Krylov space that the ridge is found in, at most: fewer where ten more have not moved it by over 5 %."""

USUAL = 25
"""A guess at how many: 20 to 30 were counted."""

SAMPLED = 2048
"""Rows of the samples that ``calibrate_convex`` looks at: docs/benchmarks-cross-entropy.md has what others find."""

STORED = 8192
"""Rows of the samples that ``calibrate_stored`` looks at."""

_LEAST, _MOST = 1e-4, 1e2  # multiples of the kernel's mean diagonal that are looked at
_FACTORS = torch.logspace(-4, 2, 601, dtype=torch.float64)

_STEADY = 2  # of these, apart, are the same ridge

_DOWN, _UP = [-k / 2 for k in range(9)], [k / 2 for k in range(1, 5)]  # the exponents that ``calibrate_convex`` tries

_ROUGH = 1e-2  # the relative gradient up to which it solves for them


@dataclass(frozen=True)
class Calibration:
    """An automatic ridge.

    Attributes:
        ridge: the total.
        factor: ``ridge`` over the mean diagonal of ``J J'``, which compares between models.
        mismatch: ``|J s(D)| / |J u|`` at that ridge: how far the linearised optimum's outputs lie from the network's,
            as a share of what fitting changed to first order; of probabilities where the rows are of a convex form.
            0 if the fitted parameters are that optimum.
    """

    ridge: float
    factor: float
    mismatch: float

    def __str__(self) -> str:
        edge = "" if _LEAST < self.factor < _MOST else ", the end of what is looked at"
        return f"automatic: {self.factor:.3g} of the kernel's mean diagonal{edge}, mismatch {self.mismatch:.2f}"


def calibrate(gram: Gram, displacement: Float[Tensor, " p"], spectrum: Spectrum | None = None) -> Calibration:
    """The ridge that minimises ``|J s(D)|``, among multiples of the kernel's mean diagonal.

    Args:
        gram: of the whole training set, at ``theta*``.
        displacement: ``u = theta* - theta_0``.
        spectrum: the problem in a Krylov space, where that is known already.
    """
    scale, before = gram.trace / (gram.count * gram.outputs), -9

    def best_of(found: Spectrum) -> int:
        return int(found.outputs(_FACTORS.to(found.values) * scale).argmin())

    def steady(found: Spectrum) -> bool:
        nonlocal before
        best, last = best_of(found), before
        before = best
        return abs(best - last) <= _STEADY

    known = spectrum or Krylov.of(gram, displacement, STEPS, steady).spectrum
    best = best_of(known)
    ridge = float(_FACTORS[best]) * scale
    square = known.outputs(known.values.new_tensor([ridge]))[0]
    mismatch = float((square.clamp_min(0) / known.square).sqrt())
    return Calibration(ridge, float(_FACTORS[best]), mismatch)


def calibrate_stored(rows: Rows, u: Tensor) -> Calibration:
    """``calibrate`` over some of the samples, for the mean diagonal of all."""
    found, rest = calibrate(Stored(_some(rows, STORED)), u), rows.jacobian.rest
    return replace(found, ridge=found.factor * rows.mean_diagonal(rest.dtype, rest.device))


def sampled(rows: Rows, size: int) -> Int[Tensor, " some"]:
    """The positions of samples with so many rows, chosen at random."""
    order = random_order(len(rows))
    return order[: max(1, size // rows.residual.shape[1])].sort().values


def calibrate_convex(rows: Rows, loss: Loss, u: Tensor, few: Rows | None = None) -> Calibration:
    """The ridge whose optimum has probabilities (squared loss: logits) nearest to the network's.

    Among multiples of the kernel's mean diagonal, from 1 down by half decades while that falls, or up where it rises at
    once, then between the best of these and its neighbours; over some of the samples, and for the mean diagonal of
    all. ``few`` are the rows of these, where they are at hand.
    """
    few = _some(rows, SAMPLED) if few is None else few
    point = cast(Point, few.point)
    found = calibrate_kernel(point, loss, point.z - few.jacobian.matvec(u), kernel(few))
    dtype, device = few.jacobian.rest.dtype, few.jacobian.rest.device
    return replace(found, ridge=found.factor * rows.mean_diagonal(dtype, device))


def _some(rows: Rows, size: int) -> Rows:
    """Of samples with so many rows; all of them where there are no more, and no copy."""
    positions = sampled(rows, size)
    return rows if len(positions) == len(rows) else rows[positions]


def calibrate_kernel(point: Point, loss: Loss, start: Float[Tensor, "samples outputs"], matrix: Tensor) -> Calibration:
    """The same over samples whose kernel is known, with their logits at ``theta*`` and, to first order, at the
    ``start``."""
    scale = float(matrix.diagonal().mean())
    everyone = torch.ones(len(start), dtype=torch.bool, device=matrix.device)
    wanted, newton = loss.gradient_of(point.z, point.kept), NewtonMethod()
    first = DualProblem(loss, point.kept, start, matrix, scale, everyone)
    tried: dict[float, tuple[float, Tensor]] = {}

    def miss(exponent: float, a: Tensor) -> float:
        problem = replace(first, ridge=10**exponent * scale)
        a, _ = newton.minimise(problem, a, _ROUGH)
        tried[exponent] = float((wanted - loss.gradient_of(problem.logits(a), point.kept)).norm()), a
        return tried[exponent][0]

    def nearest() -> float:
        return min(tried, key=lambda each: tried[each][0])

    def along(exponents: Sequence[float], a: Tensor) -> None:
        for exponent in exponents:
            least = tried[nearest()][0] if tried else math.inf
            if miss(exponent, a) >= least:
                break
            a = tried[exponent][1]

    along(_DOWN, newton.start(first, point.z))
    if nearest() == 0:
        along(_UP, tried[0][1])
    middle = nearest()
    for between in (middle - 0.25, middle + 0.25):
        miss(between, tried[middle][1])
    exponent = nearest()
    found, _ = tried[exponent]
    before = float((wanted - loss.gradient_of(start, point.kept)).norm())
    return Calibration(10**exponent * scale, 10**exponent, found / before if before else 0.0)
