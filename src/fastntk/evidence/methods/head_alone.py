"""The simplest of all: the head solved anew without what is to be forgotten, everything before it as it is."""

from dataclasses import dataclass
from typing import ClassVar

from fastntk.evidence.methods.problem import Problem, Unlearned
from fastntk.memory.finish import finished


@dataclass(frozen=True)
class HeadAlone:
    """``W* + W(R) - W(D)`` with ``W(S) = argmin sum_S l(W h_i) + ridge/2 |W - W_0|^2`` at the fitted features h and the
    memory's ridge: from the fitted head, as an exact head after a step is (``fastntk.solve.head``). The features have
    seen what is forgotten.

    Source: the usual last-layer baseline; solved exactly here, as ``fastntk.exact_head`` does after a step.
    """

    prepared: ClassVar[bool] = True

    def __call__(self, problem: Problem) -> Unlearned:
        """Answer the request by a forward pass over the retained samples."""
        return Unlearned(finished(problem.memory, problem.state.anchor, exact_head=True, without=problem.forget))
