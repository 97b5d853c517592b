"""The ridge, found from the fitted model alone: no retrained model, no held-out data, no request.

Fitting stops long before its own explicit weight decay is felt, so the ridge that describes the fitted network as a
minimiser has to be found. Let ``F_ridge(theta) = 1/2 sum_D |f(x_i; theta) - t_i|^2 + ridge/2 |theta - theta_0|^2``,
linearised at ``theta*``. For the wrong ridge the fitted parameters are far from optimal; ``calibrate`` takes the ridge
for which they are nearest to it:

    ridge = argmax  min_theta F_ridge(theta) / F_ridge(theta*).

docs/benchmarks.md compares this rule with others on several models, against what is best in hindsight.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fastntk.linalg import lanczos
from fastntk.statistics import Rows, Sums

_STEPS = 100
_FACTORS = torch.logspace(-4, 2, 601, dtype=torch.float64)


@dataclass(frozen=True)
class Calibration:
    """An automatic ridge.

    Attributes:
        ridge: the total.
        factor: ``ridge`` over the mean diagonal of ``J J'``, which compares between models.
        optimality: ``min F / F(theta*)`` at that ridge: 1 if the fitted parameters are optimal for the linearised
            problem; low values say that no ridge describes the fit well.
    """

    ridge: float
    factor: float
    optimality: float

    def __str__(self) -> str:
        return f"automatic: {self.factor:.3f} of the kernel's mean diagonal, optimality {self.optimality:.2f}"


def calibrate(
    statistics: Sums | Rows, displacement: Float[Tensor, " p"], kernel: Float[Tensor, "rows rows"] | None = None
) -> Calibration:
    """The ridge that maximises ``min F / F(theta*)``.

    Args:
        statistics: of the whole training set, at ``theta*``.
        displacement: ``u = theta* - theta_0``.
        kernel: ``J J'``, where the statistics are ``Rows`` and it is known already.

    With ``y = r + J u``, ``2 min F = ridge y'(K + ridge I)^-1 y = y'y - w'(G + ridge I)^-1 w``, ``w = b + G u``; both
    quadratic forms come for all ridges from one Lanczos run.
    """
    squares = displacement @ displacement
    if isinstance(statistics, Rows):
        kernel = statistics.kernel() if kernel is None else kernel
        fitted = statistics.residual.double().square().sum()
        target = (statistics.residual.double() + statistics.jacobian.matvec(displacement)).flatten()
        rows = statistics.residual.numel()
        ridges = _FACTORS.to(target) * statistics.trace / rows
        least = ridges * _quadratic_forms(lambda v: kernel @ v, target, ridges)
    else:
        fitted = statistics.square
        image = statistics.matvec(displacement)
        rows = int(statistics.count) * statistics.cross.shape[1]
        ridges = _FACTORS.to(image) * statistics.trace / rows
        whole = fitted + 2 * displacement @ statistics.rhs + displacement @ image
        least = whole - _quadratic_forms(statistics.matvec, statistics.rhs + image, ridges)
    optimality = least / (fitted + ridges * squares)
    best = int(optimality.argmax())
    return Calibration(float(ridges[best]), float(_FACTORS[best]), float(optimality[best]))


def _quadratic_forms(apply, start: Tensor, ridges: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """``start' (operator + ridge I)^-1 start`` for every ridge."""
    diagonal, off = lanczos(apply, start, _STEPS)
    values, vectors = torch.linalg.eigh(torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1))
    weights = start.square().sum() * vectors[0].square()
    return (weights / (values + ridges[:, None])).sum(1)
