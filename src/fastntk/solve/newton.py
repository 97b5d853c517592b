"""A convex problem with one unknown a row, by Newton's method.

With ``z = f - J u + K a`` and the loss's Hessian ``H = L L'``,

    r = l'(z) + ridge a,    (ridge I + L'K L) x = -L'K r,    a <- a - t (r + L x) / ridge,

where t is halved until the objective falls. The systems are solved by conjugate gradients, preconditioned by the
inverse of ``ridge I + L'K L`` at an earlier a, which is made anew, where it may be, when that takes too many steps.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastntk.solve.linalg import factorised, invert_
from fastntk.tuning.loss import Kept, Loss

TOLERANCE = 1e-9
"""The relative gradient that every solve reaches."""


_NEWTON, _CG, _HALVINGS = 60, 60, 30  # steps at most, of each kind


_REFACTOR = 25  # steps of conjugate gradients after which, while preparing, the preconditioner is made anew


@dataclass(frozen=True)
class Problem:
    """The convex problem of a set of samples, in one unknown a row.

    Attributes:
        loss: l.
        kept: l as a function of the rows' logits.
        start: ``f - J u``, the rows' logits at ``theta_0`` to first order.
        kernel: K, zero where a sample has left.
        ridge: a total.
        present: which samples are in the set.
    """

    loss: Loss
    kept: Kept
    start: Float[Tensor, "samples outputs"]
    kernel: Float[Tensor, "rows rows"]
    ridge: float
    present: Bool[Tensor, " samples"]

    def logits(self, a: Float[Tensor, " rows"]) -> Float[Tensor, "samples outputs"]:
        """``z``."""
        return self.start + (self.kernel @ a).view_as(self.start)

    def value(self, a: Tensor, z: Tensor) -> float:
        """The objective at a, with its logits z."""
        pull = a @ (z - self.start).flatten()
        return float((self.loss.value_of(z, self.kept) * self.present).sum() + self.ridge / 2 * pull)

    def slope(self, a: Tensor, z: Tensor) -> Float[Tensor, " rows"]:
        """``r = l'(z) + ridge a``, 0 for who is not in the set."""
        r = self.loss.gradient_of(z, self.kept) + self.ridge * a.view_as(z)
        return (r * self.present[:, None]).flatten()

    def root(self, z: Tensor) -> Float[Tensor, "samples outputs outputs"]:
        """L, 0 for who is not in the set."""
        return self.loss.root_of(z, self.kept) * self.present[:, None, None]

    def inexactness(self, a: Tensor, z: Tensor) -> float:
        """``|grad| / |ridge (d + u)|``: the gradient of the objective in d over its part from the ridge."""
        square = a @ (z - self.start).flatten()
        return self.gradient(a, z) / (self.ridge * float(square.clamp_min(1e-300).sqrt()))

    def gradient(self, a: Tensor, z: Tensor) -> float:
        """``|grad|`` of the objective in d."""
        r = self.slope(a, z)
        return float((r @ (self.kernel @ r)).clamp_min(0).sqrt())


class Preconditioner:
    """``(ridge I + L_0'K L_0)^-1`` over a set, from its inverse over a larger one."""

    def __init__(self, inverse: Tensor, gone: Int[Tensor, " rows"]) -> None:
        self.inverse, self.gone = inverse, gone
        self.columns = inverse[:, gone]
        self.factor = factorised(self.columns[gone]) if len(gone) else self.columns[gone]

    def __call__(self, v: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """The inverse times v, which is 0 for who is gone, and so is the result."""
        image = self.inverse @ v
        if len(self.gone):
            image = image - self.columns @ torch.cholesky_solve(image[self.gone, None], self.factor)[:, 0]
            image[self.gone] = 0
        return image


def across(root: Tensor, v: Tensor, transposed: bool = False) -> Tensor:
    """``L v`` or ``L'v`` of block-diagonal L."""
    blocks = v.view(len(root), root.shape[1], 1)
    return ((root.mT if transposed else root) @ blocks).flatten()


def curvature(matrix: Float[Tensor, "rows rows"], root: Tensor, ridge: float) -> Float[Tensor, "rows rows"]:
    """``ridge I + L'K L``, in a matrix of its own."""
    n, m = root.shape[:2]
    half = torch.einsum("nab,nac->nbc", root, matrix.view(n, m, n * m)).view(n * m, n, m)
    whole = torch.einsum("rnc,ncd->rnd", half, root).reshape(n * m, n * m)
    whole.diagonal().add_(ridge)
    return whole


def minimise(
    problem: Problem, a: Float[Tensor, " rows"], precondition: Preconditioner | None
) -> tuple[Float[Tensor, " rows"], float]:
    """The optimum from a start, and its inexactness.

    Without a preconditioner inverses are made as they are needed.
    """
    z, own = problem.logits(a), precondition is None
    for _ in range(_NEWTON):
        if problem.inexactness(a, z) <= TOLERANCE:
            break
        root, r = problem.root(z), problem.slope(a, z)
        if precondition is None:
            inverse = invert_(curvature(problem.kernel, root, problem.ridge))
            precondition = Preconditioner(inverse, torch.empty(0, dtype=torch.long, device=a.device))
        rhs = -across(root, problem.kernel @ r, True)
        x, steps = _solved(problem, root, rhs, precondition)
        direction = -(r + across(root, x)) / problem.ridge
        a, z, moved = _searched(problem, a, z, direction)
        if not moved:
            break
        if own and steps > _REFACTOR:
            precondition = None
    return a, problem.inexactness(a, z)


def _solved(problem: Problem, root: Tensor, rhs: Tensor, precondition: Preconditioner) -> tuple[Tensor, int]:
    """``(ridge I + L'K L)^-1 rhs`` to a small residual, and the steps it took."""
    x, residual = torch.zeros_like(rhs), rhs.clone()
    direction = s = precondition(residual)
    rho, enough = residual @ s, 1e-4 * float(rhs.norm())
    for step in range(_CG):
        if float(residual.norm()) <= enough:
            return x, step
        image = across(root, problem.kernel @ across(root, direction), True) + problem.ridge * direction
        length = rho / (direction @ image)
        x, residual = x + length * direction, residual - length * image
        s = precondition(residual)
        rho, before = residual @ s, rho
        direction = s + rho / before * direction
    return x, _CG


def _searched(problem: Problem, a: Tensor, z: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, bool]:
    """The first of the steps 1, 1/2, ... along a direction that lowers the objective, or, where rounding hides by how
    much, its gradient."""
    change = (problem.kernel @ direction).view_as(z)
    value, gradient = problem.value(a, z), problem.gradient(a, z)
    noise = 1e-12 * abs(value)
    for halving in range(_HALVINGS):
        t = 0.5**halving
        there = a + t * direction, z + t * change
        reached = problem.value(*there)
        if reached < value - noise or (reached < value + noise and problem.gradient(*there) < gradient):
            return (*there, True)
    return a, z, False
