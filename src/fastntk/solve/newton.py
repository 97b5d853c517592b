"""A convex problem with one unknown a row, by Newton's method.

With ``z = f - J u + K a`` and the loss's Hessian ``H = L L'``,

    r = l'(z) + ridge a,    (ridge I + L'K L) x = -L'K r,    a <- a - t (r + L x) / ridge,

where t is halved until the objective falls. For who is not in the set, l is 0: whatever a they start from, a whole step
leads to 0, so that the optimum of a larger set is a start for a smaller one. The systems are solved by conjugate
gradients, as well as the step is worth, preconditioned by ``ridge I + L'K L`` at an earlier a.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastntk.common.errors import InputError
from fastntk.jacobians.jacobian import Operator
from fastntk.jacobians.rows import Point, Rows, rows_of
from fastntk.solve.linalg import conjugated, factorised, near_factor, solved_by
from fastntk.tuning.loss import Kept, Loss

SOFT = 0.6
"""Of a fitted network's logits, at which the first Hessian is taken: at these themselves the loss is flatter than it is
anywhere on the way, and the first step too long."""

_NEWTON, _STEPS, _HALVINGS = 60, 41, 30  # at most: of the method, of conjugate gradients, of a search

_ROWS, _LEAST = 200, 8  # making a factor of m rows takes as long as m / 200 steps with one, and 8 at least

_REFINED = 4  # at most: steps with exact products; each leaves as little of the gradient as the kernel is rounded

_LOOSE = 0.1  # of the gradient that the first solves leave; later ones leave less, as the optimum is near

_FEW, _SHARE = 4, 6  # samples, and the share of all: more have left or joined than a factor is kept for

_LOOK = 4  # steps of conjugate gradients between looks at what is left


@dataclass(frozen=True)
class DualProblem:
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

    def logits(self, a: Float[Tensor, " rows"], jacobian: Operator | None = None) -> Float[Tensor, "samples outputs"]:
        """``z``, by the kernel, or as ``J J'a``."""
        image = self.kernel @ a if jacobian is None else jacobian.matvec(jacobian.rmatvec(a.view_as(self.start)))
        return self.start + image.view_as(self.start)

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


def gradient_of(
    rows: Rows, present: Float[Tensor, " samples"], loss: Loss, moved: Float[Tensor, " p"]
) -> Float[Tensor, " p"]:
    """``sum_i J_i'l'(f_i + J_i d)`` over the samples that are present (1, else 0), with ``moved`` for d, in float64."""
    point, total = cast(Point, rows.point), torch.zeros_like(moved)
    for some, jacobian in rows.parts(torch.float64, moved.device):
        z = point.z[some].double() + jacobian.matvec(moved)
        total += jacobian.rmatvec(loss.gradient_of(z, point.kept[some]) * present[some, None].to(z))
    return total


Preconditioner = Callable[[Float[Tensor, " rows"]], Float[Tensor, " rows"]]
"""What multiplies with nearly the inverse of ``ridge I + L_0'K L_0``."""


@dataclass(frozen=True)
class Factor:
    """The Cholesky factor of ``ridge I + L_0'K L_0`` over a set of samples: float32, which is near enough to
    precondition with, a quarter of the price of the inverse, and half the size; float64 where rounding would make the
    matrix indefinite.

    Attributes:
        lower: of the rows of the samples 0, 1, ...; who is not in the set has no part of K.
        over: the positions of the set.
    """

    lower: Float[Tensor, "rows rows"]
    over: Int[Tensor, " samples"]

    @classmethod
    def of(cls, problem: "DualProblem", root: Float[Tensor, "samples outputs outputs"]) -> "Factor":
        """Of a problem's set, where the Hessian's root is ``root``.

        Raises:
            InputError: the kernel plus the ridge is not positive definite in float64 either.
        """
        lower = near_factor(lambda dtype: curvature(problem.kernel.to(dtype), root.to(dtype), problem.ridge))
        return cls(lower, problem.present.nonzero()[:, 0].cpu())

    def changes(self, problem: "DualProblem") -> tuple[Tensor, Tensor]:
        """The samples that have left, and those that have joined, since: positions."""
        known = torch.zeros(len(problem.present), dtype=torch.bool).index_fill(0, self.over, True)
        present = problem.present.cpu()
        return tuple((one & ~other).nonzero()[:, 0] for one, other in ((known, present), (present, known)))  # type: ignore[return-value]

    def preconditioner(self, problem: "DualProblem") -> Preconditioner:
        """For a problem whose set is nearly this one: without the rows of who has left, exactly; with the diagonal
        alone for who has joined."""
        outputs, device = problem.start.shape[1], problem.kernel.device
        left, joined = (rows_of(some, outputs).to(device) for some in self.changes(problem))
        size, scale = len(self.lower), problem.kernel.diagonal()[joined] + problem.ridge
        columns = self.lower.new_zeros(size, len(left))
        columns[left, torch.arange(len(left), device=left.device)] = 1
        columns = solved_by(self.lower, columns)
        core = factorised(columns[left].double())

        def inverted(v: Tensor) -> Tensor:
            image = torch.zeros_like(v)
            inside = solved_by(self.lower, v[:size].index_fill(0, joined[joined < size], 0)[:, None])[:, 0]
            image[:size] = inside - (columns @ torch.cholesky_solve(inside[left, None], core).to(columns))[:, 0]
            image[joined] = v[joined] / scale
            return image.index_fill(0, left, 0)

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


class NewtonMethod:
    """Newton's method for problems that are near each other: what preconditioned one does so for the next.

    Args:
        factor: known beforehand. Where there is none, or it is no good any more, another is made.

    Attributes:
        factor: the one that preconditioned last.
    """

    def __init__(self, factor: Factor | None = None) -> None:
        self.factor = factor
        self._ready: tuple[DualProblem, Preconditioner] | None = None

    def start(self, problem: DualProblem, z: Float[Tensor, "samples outputs"]) -> Float[Tensor, " rows"]:
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
        self, problem: DualProblem, a: Float[Tensor, " rows"], tolerance: float
    ) -> tuple[Float[Tensor, " rows"], float]:
        """The optimum from a start, and its inexactness, at most the ``tolerance`` unless rounding has it otherwise.

        Raises:
            InputError: there is no number for it.
        """
        z = problem.logits(a)
        for _ in range(_NEWTON):
            reached = problem.inexactness(a, z)
            if reached <= tolerance:
                break
            a, z, moved = self._moved(problem, a, z, tolerance / reached)
            if not moved:
                break
        reached = problem.inexactness(a, z)
        if not isfinite(reached):
            raise InputError(
                "the solve came to no number: the ridge is too small for floating point. Prepare with a larger one, or "
                "'auto'."
            )
        return a, reached

    def refine(
        self, problem: DualProblem, a: Float[Tensor, " rows"], jacobian: Operator, tolerance: float
    ) -> tuple[Float[Tensor, " rows"], float]:
        """From nearly the optimum to that of ``K = J J'``, which the kernel at hand is up to rounding: products with J
        say what is left, and the kernel where to go from there."""
        reached = problem.inexactness(a, z := problem.logits(a, jacobian))
        for _ in range(_REFINED):
            if reached <= tolerance:
                break
            a, *_ = self._moved(problem, a, z, tolerance / reached)
            reached = problem.inexactness(a, z := problem.logits(a, jacobian))
        return a, reached

    def _moved(self, problem: DualProblem, a: Tensor, z: Tensor, share: float) -> tuple[Tensor, Tensor, bool]:
        """A step from a, whose logits are z, to a ``share`` of the gradient; and whether there is one."""
        reached, root, r = problem.inexactness(a, z), problem.root(z), problem.slope(a, z)
        wanted = problem.gradient(a, z) * max(min(reached, _LOOSE), min(_LOOSE, share / 2))
        x = self._solved(problem, root, -across(root, problem.kernel @ r, True), wanted)
        return _searched(problem, a, z, -(r + across(root, x)) / problem.ridge)

    def _solved(self, problem: DualProblem, root: Tensor, rhs: Tensor, wanted: float) -> Tensor:
        """``(ridge I + L'K L)^-1 rhs``, by a factor of its own if another's takes more steps than that is worth."""
        x = torch.zeros_like(rhs)
        if self.factor is not None and self._near(self.factor, problem):
            limit = min(max(len(rhs) // _ROWS, _LEAST), _STEPS)
            x, done = _iterated(problem, root, rhs, x, self._preconditioner(problem), wanted, limit)
            if done:
                return x
        self.factor, self._ready = Factor.of(problem, root), None
        return _iterated(problem, root, rhs, x, self._preconditioner(problem), wanted)[0]

    def _near(self, factor: Factor, problem: DualProblem) -> bool:
        """Whether so few have left or joined since a factor was made that making another takes longer."""
        return sum(map(len, factor.changes(problem))) <= max(_FEW, int(problem.present.sum()) // _SHARE)

    def _preconditioner(self, problem: DualProblem) -> Preconditioner:
        """Of the factor, made once for a problem."""
        if self._ready is None or self._ready[0] is not problem:
            self._ready = problem, cast(Factor, self.factor).preconditioner(problem)
        return self._ready[1]


def _iterated(
    problem: DualProblem,
    root: Tensor,
    rhs: Tensor,
    x: Tensor,
    precondition: Preconditioner,
    wanted: float,
    limit: int = _STEPS,
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

    change, done = conjugated(product, rhs - product(x) if x.any() else rhs, precondition, enough, limit)
    return x + change, done


def _searched(problem: DualProblem, a: Tensor, z: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, bool]:
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


@dataclass(frozen=True)
class Optimum:
    """What is known of an optimum.

    Attributes:
        kernel: K; the next solution takes it over.
        coefficients: a.
        factor: preconditions; made over the problem's set, or over a set that is nearly the same.
        start: ``f - J u``.
    """

    kernel: Float[Tensor, "rows rows"]
    coefficients: Float[Tensor, " rows"]
    factor: Factor
    start: Float[Tensor, "samples outputs"]


def solved(problem: DualProblem, z: Float[Tensor, "samples outputs"], tolerance: float) -> Optimum:
    """From the kernel alone, and logits z that are near the optimum's."""
    newton = NewtonMethod()
    a, _ = newton.minimise(problem, newton.start(problem, z), tolerance)
    if newton.factor is None or problem.loss.curved:  # it is of another place
        newton.factor = Factor.of(problem, problem.root(problem.logits(a)))
    return Optimum(problem.kernel, a, newton.factor, problem.start)
