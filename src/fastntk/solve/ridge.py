"""The ridge, found from the fitted model alone: no retrained model, no held-out data, no request.

Fitting stops long before its own explicit weight decay is felt, so the ridge that describes the fitted network as a
minimiser has to be found. ``s(D)`` of ``fastntk.solve.primal`` leads from the fitted parameters to the optimum that the
linearised network has under a ridge. ``calibrate`` takes the ridge whose optimum has the outputs nearest to those that
the network really has on its training data:

    ridge = argmin |J s(D; ridge)|.

With too small a ridge the linearised optimum fits the training data better than the network did, with too large a one
worse. docs/benchmarks.md compares this rule with seven others on several models, against what is best in hindsight.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fastntk.solve.linalg import lanczos
from fastntk.solve.sums import Rows, Sums

STEPS = 120
_FACTORS = torch.logspace(-4, 2, 601, dtype=torch.float64)


@dataclass(frozen=True)
class Calibration:
    """An automatic ridge.

    Attributes:
        ridge: the total.
        factor: ``ridge`` over the mean diagonal of ``J J'``, which compares between models.
        mismatch: ``|J s(D)| / |J u|`` at that ridge: how far the linearised optimum's outputs lie from the network's,
            as a share of what fitting changed to first order. 0 if the fitted parameters are that optimum.
    """

    ridge: float
    factor: float
    mismatch: float

    def __str__(self) -> str:
        return f"automatic: {self.factor:.3f} of the kernel's mean diagonal, mismatch {self.mismatch:.2f}"


def calibrate(
    statistics: Sums | Rows, displacement: Float[Tensor, " p"], kernel: Float[Tensor, "rows rows"] | None = None
) -> Calibration:
    """The ridge that minimises ``|J s(D)|``.

    Args:
        statistics: of the whole training set, at ``theta*``.
        displacement: ``u = theta* - theta_0``.
        kernel: ``K = J J'``, where the statistics are ``Rows`` and it is known already.

    ``J s = K (K + ridge I)^-1 (r + J u) - J u``, and ``s = (G + ridge I)^-1 (b + G u) - u``: for all ridges at once
    from one Krylov space of K at ``r + J u``, or of G at ``b + G u``.
    """
    if isinstance(statistics, Rows):
        matrix = statistics.kernel() if kernel is None else kernel
        moved, rows = statistics.jacobian.matvec(displacement).flatten(), statistics.residual.numel()
        basis, projected = lanczos(lambda v: matrix @ v, statistics.residual.double().flatten() + moved, STEPS)
        start = basis.T @ (statistics.residual.double().flatten() + moved)
        square, power, cross = moved.square().sum(), 2, projected @ (basis.T @ moved)
    else:
        image, rows = statistics.matvec(displacement), int(statistics.count) * len(statistics.cross)
        basis, projected = lanczos(statistics.matvec, statistics.rhs + image, STEPS)
        start = basis.T @ (statistics.rhs + image)
        square, power, cross = displacement @ image, 1, basis.T @ image
    return closest_outputs(projected, start, cross, square, power, statistics.trace / rows)


def closest_outputs(
    projected: Float[Tensor, "m m"],
    start: Float[Tensor, " m"],
    cross: Float[Tensor, " m"],
    square: Float[Tensor, ""],
    power: int,
    scale: float,
) -> Calibration:
    """The ridge that minimises ``a(ridge)' M^power a(ridge) - 2 a(ridge)'cross + square``, where
    ``a = (M + ridge I)^-1 start``.

    Args:
        projected: M, the kernel or Gram matrix in a Krylov space.
        start: ``r + J u`` (kernel, ``power`` 2) or ``b + G u`` (Gram matrix, ``power`` 1) in that space.
        cross: ``K J u`` or ``G u`` there.
        square: ``|J u|^2``.
        power: of M in the quadratic term.
        scale: the kernel's mean diagonal, in whose multiples ridges are tried.
    """
    ridges = _FACTORS.to(start) * scale
    values, vectors = torch.linalg.eigh(projected)
    solved = (vectors.T @ start) / (values + ridges[:, None])
    misses = (solved.square() * values**power).sum(1) - 2 * solved @ (vectors.T @ cross) + square
    best = int(misses.argmin())
    mismatch = float((misses[best].clamp_min(0) / square).sqrt())
    return Calibration(float(ridges[best]), float(_FACTORS[best]), mismatch)
