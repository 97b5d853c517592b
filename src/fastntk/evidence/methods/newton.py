"""One Newton step toward the retained optimum, from a fit that is taken to be optimal."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from fastntk.common.machine import free_bytes
from fastntk.evidence.methods.problem import Problem, Unlearned
from fastntk.jacobians.products import pull
from fastntk.memory.state import State
from fastntk.solve.convex import Convex
from fastntk.solve.kernel import Stored
from fastntk.solve.linalg import conjugate_gradients
from fastntk.solve.passes import Passes

_TOLERANCE = 1e-6  # of conjugate gradients


@dataclass(frozen=True)
class Newton:
    """``theta* - (G_R + ridge I)^-1 b_F`` with ``b_F = J_F'r_F``: certified removal's step, or an influence function.

    ``G_R`` is the generalised Gauss-Newton matrix of all classes. Where the fit is stationary, ``b_D = ridge u``, and
    the loss is squared, it is ``s(R) - s(D)`` of ``fastntk.solve``; where it is not, it differs from it by what fitting
    fell short of. The ridge is one total for D and for R; Guo et al.'s code has one a sample, whose share the removed
    take with them. A memory whose rows are of the likeliest classes alone has another optimum: there the system is
    solved by conjugate gradients, on rows of all classes, or by passes where these do not fit into memory.

    Of Guo et al.'s code are not here: noise in the objective, which the fit would have to have had
    (``fastntk.fit_exact`` does), and logistic regression on features that nothing private has trained. Koh and Liang
    solve by conjugate gradients, as here, or by a series on samples of the data.

    Attributes:
        ridge: a total; None takes the memory's.

    Source: Guo et al. 2020, "Certified data removal from machine learning models" (arXiv 1911.03030); Koh and Liang
    2017 (arXiv 1703.04730), whose inverse is over D.
    """

    prepared: ClassVar[bool] = True
    version: ClassVar[int] = 2
    ridge: float | None = None

    def __call__(self, problem: Problem) -> Unlearned:
        """Answer the request by one backward pass over all samples and a solve over the stored sums, or by one over the
        forgotten and the rows of the retained."""
        state, network = problem.state, problem.state.network
        ridge = state.ridge if self.ridge is None else self.ridge
        if state.solution.likeliest:
            return Unlearned(state.moved_by(-self._solved(problem, ridge)))
        gradient = pull(network, network.residual(state.positions.tolist()))
        step = state.resolve(problem.positions, gradient / ridge, ridge)  # (G_R + ridge)^-1 (b_R - b_D)
        return Unlearned(state.moved_by(step))

    @staticmethod
    def _solved(problem: Problem, ridge: float) -> Float[Tensor, " p"]:
        """``(G_R + ridge I)^-1 b_F``."""
        network, staying = replace(problem.state.network, keep=None), problem.staying
        size = len(staying) * network.classes * network.layout.size * network.dtype.itemsize
        fits = 2 * size < free_bytes(network.device)
        retained = Stored(network.rows(staying.tolist())) if fits else Passes(network, staying)
        forgotten = pull(network, network.residual(problem.positions.tolist()))
        near = _near(problem.state)
        return conjugate_gradients(lambda v: retained.matvec(v) + ridge * v, forgotten, near, _TOLERANCE)


def _near(state: State) -> Callable[[Float[Tensor, " p"]], Float[Tensor, " p"]]:
    """Nearly the inverse: that of the likeliest classes, where the memory has it."""
    if not isinstance(state.solution, Convex):
        return lambda v: v / state.ridge
    hessian, jacobian = state.solution.hessian, state.solution.jacobian(state.network)
    return lambda v: hessian.inverse(jacobian, v)
