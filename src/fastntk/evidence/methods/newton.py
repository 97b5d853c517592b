"""One Newton step toward the retained optimum, from a fit that is taken to be optimal."""

from dataclasses import dataclass
from typing import ClassVar

from fastntk.evidence.methods.problem import Problem, Unlearned
from fastntk.jacobians.products import pull


@dataclass(frozen=True)
class Newton:
    """``theta* - (G_R + ridge I)^-1 b_F`` with ``b_F = J_F'r_F``: certified removal's step, or an influence function.

    Where the fit is stationary, ``b_D = ridge u``, it is ``s(R) - s(D)`` of ``fastntk.solve``; where it is not, it
    differs from it by what fitting fell short of.

    Attributes:
        ridge: a total; None takes the memory's.

    Source: Guo et al. 2020, "Certified data removal from machine learning models" (arXiv 1911.03030); Koh and Liang
    2017 (arXiv 1703.04730), whose inverse is over D.
    """

    prepared: ClassVar[bool] = True
    ridge: float | None = None

    def __call__(self, problem: Problem) -> Unlearned:
        """Answer the request by one backward pass over all samples and a solve over the stored sums."""
        state, network = problem.state, problem.state.network
        ridge = state.ridge if self.ridge is None else self.ridge
        gradient = pull(network, network.residual(state.positions.tolist()))
        step = state.resolve(problem.positions, gradient / ridge, ridge)  # (G_R + ridge)^-1 (b_R - b_D)
        return Unlearned(state.moved_by(step))
