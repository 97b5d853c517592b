"""Several steps in place of one, each from the gradient of the network where the last one led."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fastntk.evidence.methods.problem import Problem, Unlearned
from fastntk.jacobians.per_sample import PerSampleJacobian
from fastntk.jacobians.products import pull


@dataclass(frozen=True)
class Iterated:
    """``FastNTK``'s step, ``d_0 = s(R) - s(D)``, and then, with the memory's matrix and the network's own gradient,

        d_k = -(G_R + ridge I)^-1 grad F_R(theta_k) - s(D),    F_R(theta) = sum_R loss_i + ridge/2 |theta - theta_0|^2.

    ``theta_{k+1} = theta_k + t d_k``, where t is 1, or halved until the next step is shorter: ``|d_{k+1}| <= (1 - t/2)
    |d_k|``. Where the model is linear and the loss squared, ``d_1 = 0``. Where it is linear, the loss convex and
    ``theta*`` the optimum over D, the limit is the retrained optimum: for cross-entropy, too, where one step is not.
    The convex form's s is not linear in the gradient; its d_k is the one above to first order, with the same zeros if
    ``s(D) = 0``.

    Attributes:
        steps: after the first, at most. Each takes one backward pass over the retained samples, or more where halved.
        tolerance: the steps end when they are shorter than that share of the first.
        halvings: of a step; if the next is not shorter then, the steps end with what was reached.

    Source: the step as for ``FastNTK``; the iteration is Newton's with a fixed matrix and Deuflhard's monotonicity test
    (Newton Methods for Nonlinear Problems, 2004, section 3.2).
    """

    prepared: ClassVar[bool] = True
    steps: int = 2
    tolerance: float = 1e-2
    halvings: int = 3

    def __call__(self, problem: Problem) -> Unlearned:
        """Answer the request with the retained samples at hand; the note says how the steps ended."""
        search = _Search(problem)
        theta = search.start + search.first
        following, taken, ended = search.step_at(theta), 0, "no more were allowed"
        while taken < self.steps:
            if following.norm() <= self.tolerance * search.first.norm():
                ended = "they had become short enough"
                break
            found = self._shorter(search, theta, following)
            if found is None:
                ended = "they became no shorter"
                break
            theta, following = found
            taken += 1
        share = float(following.norm() / search.first.norm()) if problem.forget else 0.0
        note = f"{taken} steps after the first, then {ended}: the next one's length is {share:.0%} of the first's"
        return Unlearned(problem.state.layout.unflatten(theta, problem.state.anchor), note=note)

    def _shorter(self, search: "_Search", theta: Tensor, step: Tensor) -> tuple[Tensor, Tensor] | None:
        """The parameters after a step, damped if need be, and the step from there; None if no damping is enough."""
        for halved in range(self.halvings + 1):
            damping = 0.5**halved
            reached = theta + damping * step
            following = search.step_at(reached)
            if following.norm() <= (1 - damping / 2) * step.norm():
                return reached, following
        return None


class _Search:
    """The steps of one request."""

    def __init__(self, problem: Problem) -> None:
        state = problem.state
        self.problem, self.ridge, self.layout = problem, state.ridge, state.layout
        self.start = self.layout.flatten(state.anchor)
        self.center = state.center
        self.short = state.solution.step  # s(D)
        self.rest = self._resolved(torch.zeros_like(self.start))
        self.first = self._resolved(self.start - self.center) - self.short

    def _resolved(self, displacement: Tensor) -> Tensor:
        """``(G_R + ridge I)^-1 (b_R - ridge v)``."""
        return self.problem.state.resolve(self.problem.positions, displacement, self.ridge)

    def step_at(self, theta: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """``d`` at ``theta``."""
        state = self.problem.state
        parameters = self.layout.unflatten(theta, state.anchor)
        here = replace(state.network, jacobian=PerSampleJacobian(state.model, parameters, self.layout))
        pulled = pull(here, here.residual(self.problem.staying.tolist()))
        downhill = pulled - self.ridge * (theta - self.center)
        return self.rest - self._resolved(downhill / self.ridge) - self.short
