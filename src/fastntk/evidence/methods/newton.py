"""One Newton step toward the retained optimum, from a fit that is taken to be optimal."""

import time
from dataclasses import dataclass

from fastntk.common.machine import elapsed
from fastntk.evidence.methods.problem import Problem, Unlearned


@dataclass(frozen=True)
class Newton:
    """``theta* - (G_R + ridge I)^-1 b_F`` with ``b_F = J_F'r_F``: certified removal's step, or an influence function.

    Where the fit is stationary, ``b_D = ridge u``, it is ``s(R) - s(D)`` of ``fastntk.solve.primal``; where it is not, it
    differs from it by what fitting fell short of.

    Attributes:
        ridge: a total; None takes the memory's.

    Source: Guo et al. 2020, "Certified data removal from machine learning models" (arXiv 1911.03030); Koh and Liang
    2017 (arXiv 1703.04730), whose inverse is over D.
    """

    ridge: float | None = None

    def __call__(self, problem: Problem) -> Unlearned:
        """Answer the request by one backward pass over all samples and a solve over the stored sums."""
        started = time.perf_counter()
        memory, linearised = problem.memory, problem.memory.linearised
        ridge = memory.ridge if self.ridge is None else self.ridge
        gradient = linearised.pull(linearised.residual(range(len(problem.train))))  # type: ignore[arg-type]
        step = memory.resolve(problem.forget, gradient / ridge, ridge)  # (G_R + ridge)^-1 (b_R - b_D)
        return Unlearned(memory.assemble(step), elapsed(started, problem.device))
