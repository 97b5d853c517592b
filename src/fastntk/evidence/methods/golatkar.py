"""The published one-shot step, which Fast-NTK takes over parameter-efficient parameters."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fastntk.evidence.methods.fisher import FisherForgetting
from fastntk.evidence.methods.problem import Problem, Unlearned


@dataclass(frozen=True)
class Golatkar:
    """``theta* + m (s_0(R) - s_0(D))``: ``s_0`` is the step that the memory's form solves for, with ``u = 0``:
    of a convex memory, the optimum under its loss; the paper has one linear system, which the primal and dual forms do.

    Its ridge is ``n_S weight_decay`` in the solve over S, so it is a different total for R and for D. The multiplier m
    is ``1 + 2 |<D, e>| / |D|^2`` for the step ``D = s_0(R) - s_0(D)`` and ``e = u - s_0(R)``, as in the official code,
    or 1 without the ``trapezium``. That code's system under cross-entropy is ``J'J + n_S weight_decay`` over all
    classes, without the loss's Hessian and with the fit's own decay; here it is the memory's, with its ridge. Its noise
    is of the Fisher information at the parameters after the step; here it is of that at ``theta*``, where the memory
    has the Jacobians. With it the row of a class that goes whole is made anew, as there.

    Attributes:
        weight_decay: per sample; None takes the memory's ridge over the number of its samples.
        trapezium: scale the step by the trapezium rule.
        noise: ``a`` of the noise ``a F_R^(-1/4) n`` that is added to the parameters; see ``FisherForgetting``.
        seed: of n.

    Source: Golatkar, Achille, Soatto 2020, "Forgetting Outside the Box" (arXiv 2003.02960).
    """

    prepared: ClassVar[bool] = True
    weight_decay: float | None = None
    trapezium: bool = True
    noise: float = 0.0
    seed: int = 0

    def __call__(self, problem: Problem) -> Unlearned:
        """Answer the request by two solves over the stored sums; noise takes a pass over the retained samples."""
        state, gone = problem.state, problem.positions
        count, zero = len(state.positions), torch.zeros_like(state.displacement)
        decay = state.ridge / count if self.weight_decay is None else self.weight_decay
        step_all = state.resolve(gone[:0], zero, decay * count)
        step_retain = state.resolve(gone, zero, decay * (count - len(gone)))
        step = step_retain - step_all
        if self.trapezium:
            step = step * trapezium_factor(step, state.displacement - step_retain)
        if not self.noise:
            return Unlearned(state.moved_by(step))
        return FisherForgetting(self.noise, seed=self.seed).hidden(problem, step)


def trapezium_factor(step: Float[Tensor, " p"], error: Float[Tensor, " p"]) -> float:
    """``1 + 2 |<D, e>| / |D|^2`` for the step D and the error e."""
    return 1 + 2 * float((step @ error).abs() / step.square().sum())
