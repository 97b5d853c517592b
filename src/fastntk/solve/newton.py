"""A convex problem with one unknown a row, by Newton's method.

With ``z = f - J u + K a`` and the loss's Hessian ``H = L L'``,

    r = l'(z) + ridge a,    (ridge I + L'K L) x = -L'K r,    a <- a - t (r + L x) / ridge,

where t is halved until the objective falls. For who is not in the set, l is 0: whatever a they start from, a whole step
leads to 0, so that the optimum of a larger set is a start for a smaller one. The systems are solved by conjugate
gradients, as well as the step is worth, preconditioned by ``ridge I + L'K L`` at an earlier a.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastntk.jacobians.rows import Point, Rows
from fastntk.solve.linalg import conjugated, factorised
from fastntk.tuning.loss import Kept, Loss

TOLERANCE = 1e-9
"""The relative gradient that every solve reaches."""


SOFT = 0.6
"""Of a fitted network's logits, at which the first Hessian is taken: at these themselves the loss is flatter than it is
anywhere on the way, and the first step too long."""

_NEWTON, _STEPS, _HALVINGS = 60, 41, 30  # at most: of the method, of conjugate gradients, of a search

_LOOSE = 0.1  # of the gradient that the first solves leave; later ones leave less, as the optimum is near

_LOOK = 4  # steps of conjugate gradients between looks at what is left


@dataclass(frozen=True)
class Problem:
    """The convex problem of a set of samples, in one unknown a row.

    Attributes:
        loss: l.
        kept: l as a function of the rows' logits.
        start: ``f - J u``, the rows' logits at ``theta_0`` to first order.
        kernel: K.
        ridge: a total.
        present: which samples are in the set.
    """

    loss: Loss
    kept: Kept
    start: Float[Tensor, "samples outputs"]
    kernel: Float[Tensor, "rows rows"]
    ridge: float
    present: Bool[Tensor, " samples"]

    @classmethod
    def of(cls, rows: Rows, loss: Loss, u: Tensor, ridge: float, kernel: Tensor, present: Tensor) -> "Problem":
        """Of the samples of rows."""
        point = cast(Point, rows.point)
        return cls(loss, point.kept, point.z - rows.jacobian.matvec(u), kernel, ridge, present)

    def logits(self, a: Float[Tensor, " rows"]) -> Float[Tensor, "samples outputs"]:
        """``z``."""
        return self.start + (self.kernel @ a).view_as(self.start)

    def value(self, a: Tensor, z: Tensor) -> float:
        """The objective at a, with its logits z."""
        pull = a @ (z - self.start).flatten()
        return float((self.loss.value_of(z, self.kept) * self.present).sum() + self.ridge / 2 * pull)

    def slope(self, a: Tensor, z: Tensor) -> Float[Tensor, " rows"]:
        """``r = l'(z) + ridge a``."""
        return (self.loss.gradient_of(z, self.kept) * self.present[:, None]).flatten() + self.ridge * a

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


Preconditioner = Callable[[Float[Tensor, " rows"]], Float[Tensor, " rows"]]
"""What multiplies with the inverse of ``ridge I + L_0'K L_0``; in float32, which is near enough and takes less time."""


def bordered(inverse: Float[Tensor, "rows rows"], gone: Int[Tensor, " some"]) -> Preconditioner:
    """Over a set, from the inverse over a larger one, and the rows of who is in that and not in the set."""
    cheap, columns = inverse.float(), inverse[:, gone]
    factor = factorised(columns[gone])

    def inverted(v: Tensor) -> Tensor:
        image = (cheap @ v.float()).to(v)
        image = image - columns @ torch.cholesky_solve(image[gone, None], factor)[:, 0]
        return image.index_fill(0, gone, 0)

    return inverted


def triangular(problem: Problem, root: Float[Tensor, "samples outputs outputs"]) -> Preconditioner:
    """Of a problem where L is the root, by the Cholesky factor: a quarter of the price of the inverse."""
    factor = factorised(curvature(problem.kernel, root, problem.ridge)).float()

    def inverted(v: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(factor, v.float()[:, None], upper=False)
        return torch.linalg.solve_triangular(factor.mT, half, upper=True)[:, 0].to(v)

    return inverted


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


class Newton:
    """Newton's method for problems that are near each other: what preconditioned one does so for the next.

    Args:
        precondition: known beforehand. Otherwise, and where it is no good any more, another is made.
    """

    def __init__(self, precondition: Preconditioner | None = None) -> None:
        self.precondition = precondition

    def start(self, problem: Problem, z: Float[Tensor, "samples outputs"]) -> Float[Tensor, " rows"]:
        """A start, from logits that are near the optimum's: with ``l'(z + y) = l'(z) + H y`` and ``z_0 = f - J u``,

            (ridge + H K) a = H (z - z_0) - l'(z) = c,    a = (c - L (ridge I + L'K L)^-1 L'K c) / ridge,

        for H at ``SOFT`` z.
        """
        root, slope = problem.root(SOFT * z), problem.loss.gradient_of(z, problem.kept) * problem.present[:, None]
        c = across(root, across(root, (z - problem.start).flatten(), True)) - slope.flatten()
        image = problem.kernel @ c
        x = self._solved(problem, root, across(root, image, True), _LOOSE * float((c @ image).clamp_min(0).sqrt()))
        return (c - across(root, x)) / problem.ridge

    def minimise(
        self, problem: Problem, a: Float[Tensor, " rows"], tolerance: float | None = None
    ) -> tuple[Float[Tensor, " rows"], float]:
        """The optimum from a start, and its inexactness, at most the ``tolerance`` (None: ``TOLERANCE``)."""
        z, enough = problem.logits(a), TOLERANCE if tolerance is None else tolerance
        for _ in range(_NEWTON):
            reached = problem.inexactness(a, z)
            if reached <= enough:
                break
            root, r = problem.root(z), problem.slope(a, z)
            wanted = problem.gradient(a, z) * max(min(reached, _LOOSE), min(_LOOSE, enough / reached / 2))
            x = self._solved(problem, root, -across(root, problem.kernel @ r, True), wanted)
            a, z, moved = _searched(problem, a, z, -(r + across(root, x)) / problem.ridge)
            if not moved:
                break
        return a, problem.inexactness(a, z)

    def _solved(self, problem: Problem, root: Tensor, rhs: Tensor, wanted: float) -> Tensor:
        """``(ridge I + L'K L)^-1 rhs``, by a preconditioner of its own if that takes too many steps."""
        x = torch.zeros_like(rhs)
        if self.precondition is not None:
            x, done = _iterated(problem, root, rhs, x, self.precondition, wanted)
            if done:
                return x
        self.precondition = triangular(problem, root)
        return _iterated(problem, root, rhs, x, self.precondition, wanted)[0]


def _iterated(
    problem: Problem, root: Tensor, rhs: Tensor, x: Tensor, precondition: Preconditioner, wanted: float
) -> tuple[Tensor, bool]:
    """``(ridge I + L'K L)^-1 rhs`` by conjugate gradients from a start, and whether it is good enough.

    A residual e leaves ``L e / ridge`` of the slope r, to first order, and so ``|grad| = (e'L'K L e)^1/2 / ridge``:
    that is what is ``wanted`` to be small, and looked at every few steps.
    """

    def curved(v: Tensor) -> Tensor:
        return across(root, problem.kernel @ across(root, v), True)

    def product(v: Tensor) -> Tensor:
        return curved(v) + problem.ridge * v

    def enough(residual: Tensor, step: int) -> bool:
        return step % _LOOK == 1 and float(residual @ curved(residual)) <= (wanted * problem.ridge) ** 2

    change, done = conjugated(product, rhs - product(x) if x.any() else rhs, precondition, enough, _STEPS)
    return x + change, done


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
