"""This project's method: the anchored difference, from a prepared memory."""

import time
from dataclasses import dataclass, replace

from fastntk.common.errors import InputError
from fastntk.common.machine import elapsed
from fastntk.evidence.gain import amplified
from fastntk.evidence.methods.problem import Problem, Unlearned
from fastntk.solve.head import exact_head


@dataclass(frozen=True)
class FastNTK:
    """``theta* + s(R) - s(D)``, with the memory's ridge; see ``fastntk.solve.primal``.

    Source: Li et al. 2023, "Fast-NTK" (arXiv 2312.14923), for the step over parameter-efficient parameters; anchored at
    the parameters before fitting by this project.

    Attributes:
        ridge: a total; None takes the memory's own, which is quicker.
        exact_head: solve the head anew at the features after the step (``fastntk.solve.head``), by a forward pass over the
            retained samples; with the memory's own ridge alone.
        gain: multiply the step, before that, by the gain of the memory's audit (``fastntk.evidence.gain``); one below 1 only if
            the exact head follows. The note explains
            the certificate of the step without it, with the audit of answers with it.
    """

    ridge: float | None = None
    exact_head: bool = False
    gain: bool = False

    def __post_init__(self) -> None:
        if self.exact_head and self.ridge is not None:
            raise InputError("an exact head goes with the memory's own ridge: prepare with the ridge that you want.")

    def __call__(self, problem: Problem) -> Unlearned:
        """Answer the request from the forgotten samples alone, and with an exact head from all of them."""
        started, memory = time.perf_counter(), problem.memory
        known = memory.members.ids
        answer = memory.preview([known[index] for index in problem.forget.tolist()], ridge=self.ridge)
        certificate, least = answer.certificate, 0.0 if self.exact_head else 1.0
        if self.gain and certificate.audit and certificate.audit.gain >= least:
            certificate = replace(certificate, audit=certificate.audit.with_gain)
        note = certificate.explanation
        if not self.exact_head and not self.gain:
            return Unlearned(answer.parameters, answer.seconds, note)
        parameters = amplified(memory, answer.parameters, least) if self.gain else answer.parameters
        if self.exact_head:
            parameters = exact_head(memory, parameters, problem.forget.tolist())
        return Unlearned(parameters, elapsed(started, problem.device), note)
