"""Newton's method where the kernel does not fit into memory: in the parameters, by reads of rows on disk.

    F(d) = sum_S l(z_i + J_i d) + ridge/2 |d + u|^2,    (ridge I + sum_S J_i'L_i L_i'J_i) x = -grad F,    d <- d + t x,

with ``H_i = L_i L_i'`` the loss's Hessian at the logits where d leads, and t halved until F falls. A product with the
matrix takes one read of all rows, and so does F with its gradient. The systems are solved by conjugate gradients, as
well as the step is worth, preconditioned by the same matrix of a ``Sample`` s of S, whose rows stay in memory: with
``c = |S| / |s|``,

    M = ridge I + c J_s'L_s L_s'J_s,    M^-1 = (I - J_s'L_s (ridge/c I + L_s'K_s L_s)^-1 L_s'J_s) / ridge.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastntk.jacobians.jacobian import Jacobian
from fastntk.jacobians.rows import Point, Rows
from fastntk.solve.linalg import below, conjugated, factor_
from fastntk.solve.newton import across, curvature
from fastntk.tuning.loss import Kept, Loss

TOLERANCE = 1e-4
"""The relative gradient that every solve reaches: products of float32 rows are not good for less than 1e-5."""

SHARE = 1e-2
"""Of the gradient that a request starts from, which it leaves at most, so that a small one is as exact as a large."""

_NEWTON, _STEPS, _HALVINGS, _LOOSE = 60, 60, 12, 0.1  # at most, and a share, as in fastntk.solve.newton


@dataclass(frozen=True)
class Place:
    """Where a step d leads.

    Attributes:
        d: the step.
        value: F.
        gradient: of F.
        root: L, 0 for who is not in the set.
        inexactness: ``|grad F| / |ridge (d + u)|``.
    """

    d: Float[Tensor, " p"]
    value: float
    gradient: Float[Tensor, " p"]
    root: Float[Tensor, "samples outputs outputs"]
    inexactness: float


@dataclass(frozen=True)
class Objective:
    """F over a set S of samples.

    Attributes:
        sets: rows, one set after the other.
        loss: l.
        displacement: ``u``.
        ridge: a total.
        present: which samples of all sets are in S.
        dtype: that products are taken in.
    """

    sets: tuple[Rows, ...]
    loss: Loss
    displacement: Float[Tensor, " p"]
    ridge: float
    present: Bool[Tensor, " samples"]
    dtype: torch.dtype

    def at(self, d: Float[Tensor, " p"], soft: float = 1.0) -> Place:
        """Where d leads, by one read; the root is of the Hessian at ``soft`` times the logits."""
        value, gradient, roots = 0.0, self.ridge * (d + self.displacement), []
        for here, jacobian, z, kept in self._read():
            z = z + jacobian.matvec(d)
            value += float(self.loss.value_of(z, kept) @ here)
            gradient = gradient + jacobian.rmatvec(self.loss.gradient_of(z, kept) * here[:, None])
            roots.append(self.loss.root_of(soft * z, kept) * here[:, None, None])
        pull = self.ridge * (d + self.displacement)
        value += float(pull.square().sum()) / self.ridge / 2
        reached = float(gradient.norm() / pull.norm().clamp_min(1e-300))
        return Place(d, value, gradient, torch.cat(roots), reached)

    def curved(self, root: Tensor, v: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """``(ridge I + sum J_i'L_i L_i'J_i) v``, by one read."""
        image, start = self.ridge * v, 0
        for _, jacobian, z, _ in self._read():
            own = root[start : start + len(z)]
            start += len(z)
            moved = across(own, across(own, jacobian.matvec(v).flatten(), True))
            image = image + jacobian.rmatvec(moved.view_as(z))
        return image

    def _read(self) -> Iterator[tuple[Tensor, Jacobian, Tensor, Kept]]:
        """Who is there, the Jacobian, the logits at ``theta*`` and the loss as their function, part by part."""
        start, device = 0, self.displacement.device
        for rows in self.sets:
            point, here = cast(Point, rows.point), self.present[start : start + len(rows)].to(device).double()
            for some, jacobian in rows.parts(self.dtype, device):
                own = point[some]
                yield here[some], jacobian, own.z, own.kept
            start += len(rows)


@dataclass(frozen=True)
class Sample:
    """Some samples of S, of the first set of an objective, that precondition.

    Attributes:
        positions: of them; who has left does not count.
        kernel: ``K_s``.
    """

    positions: Int[Tensor, " some"]
    kernel: Float[Tensor, "rows rows"]

    def preconditioner(self, objective: Objective) -> Callable[[Tensor], Callable[[Tensor], Tensor]]:
        """From L to what multiplies with ``M^-1``."""
        jacobian = objective.sets[0].jacobian[self.positions].to(objective.dtype, objective.displacement.device)
        share = int(objective.present.sum()) / max(1, int(objective.present[self.positions].sum()))

        def at(root: Tensor) -> Callable[[Tensor], Tensor]:
            own = root[self.positions]
            factor = factor_(curvature(self.kernel, own, objective.ridge / share))

            def inverse(v: Tensor) -> Tensor:
                inside = across(own, jacobian.matvec(v).flatten(), True)
                solved = across(own, torch.cholesky_solve(inside[:, None], factor)[:, 0])
                return (v - jacobian.rmatvec(solved.view(len(own), -1))) / objective.ridge

            return inverse

        return at


def minimise(objective: Objective, d: Float[Tensor, " p"], sample: Sample, soft: float = 1.0) -> Place:
    """The optimum from a start, up to ``TOLERANCE`` and to ``SHARE`` of what the start had; the first step with the
    Hessian at ``soft`` times the logits."""
    place, precondition = objective.at(d, soft), sample.preconditioner(objective)
    enough = min(TOLERANCE, SHARE * place.inexactness)
    for _ in range(_NEWTON):
        if place.inexactness <= enough:
            break
        wanted = max(min(place.inexactness, _LOOSE), min(_LOOSE, enough / place.inexactness / 2))
        there = _searched(objective, place, _solved(objective, place, precondition(place.root), wanted))
        if there is None:
            break
        place = there
    return place


def _solved(
    objective: Objective, place: Place, precondition: Callable[[Tensor], Tensor], wanted: float
) -> Float[Tensor, " p"]:
    """``-(ridge I + sum J_i'L_i L_i'J_i)^-1 grad F``, up to a share of the gradient."""
    enough = below(wanted * float(place.gradient.norm()))
    return conjugated(partial(objective.curved, place.root), -place.gradient, precondition, enough, _STEPS)[0]


def _searched(objective: Objective, place: Place, x: Float[Tensor, " p"]) -> Place | None:
    """Where the first of the steps 1, 1/2, ... along x leads that lowers F, or, where rounding hides by how much, its
    gradient."""
    noise = 8 * torch.finfo(objective.dtype).eps * abs(place.value)
    for halving in range(_HALVINGS):
        there = objective.at(place.d + 0.5**halving * x)
        if there.value < place.value - noise or (
            there.value < place.value + noise and float(there.gradient.norm()) < float(place.gradient.norm())
        ):
            return there
    return None
