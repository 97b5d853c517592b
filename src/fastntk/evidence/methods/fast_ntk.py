"""This project's method: the anchored difference, from a prepared memory."""

from dataclasses import dataclass, replace
from typing import ClassVar

from fastntk.common.errors import InputError
from fastntk.evidence.methods.problem import Problem, Unlearned
from fastntk.memory.audit import Audit
from fastntk.memory.finish import finished
from fastntk.memory.memory import Memory


@dataclass(frozen=True)
class FastNTK:
    """``theta* + s(R) - s(D)``, with the memory's ridge; see ``fastntk.solve.solution``.

    Source: Li et al. 2023, "Fast-NTK" (arXiv 2312.14923), for the step over parameter-efficient parameters; anchored at
    the parameters before fitting by this project.

    Attributes:
        ridge: a total; None takes the memory's own, which is quicker. Another is answered by two solves at it, and
            without a certificate.
        exact_head: solve the head anew at the features after the step (``fastntk.solve.head``), by a forward pass over
            the retained samples; with the memory's own ridge alone.
        gain: multiply the step, before that, by this number, or if ``True`` by the gain of the memory's audit
            (``fastntk.memory.finish``); one below 1 only if the exact head follows. The note explains the certificate
            of the step, as a request has it; with the audit's gain, with what the audit found of answers with that.
    """

    prepared: ClassVar[bool] = True
    ridge: float | None = None
    exact_head: bool = False
    gain: bool | float = False

    def __post_init__(self) -> None:
        if self.exact_head and self.ridge is not None:
            raise InputError("an exact head goes with the memory's own ridge: prepare with the ridge that you want.")

    def __call__(self, problem: Problem) -> Unlearned:
        """Answer the request from the forgotten samples alone, and with an exact head from all of them."""
        if self.ridge is not None:
            return self._at_another_ridge(problem, self.ridge)
        answer = problem.memory.preview(problem.forget)
        audit = self.audit_of(problem.memory) or answer.certificate.audit
        certificate = replace(answer.certificate, audit=audit)
        if self.exact_head:
            certificate = replace(certificate, still=0.0)  # it was of the step, and of the head nothing is said
        parameters = finished(
            problem.memory, answer.parameters, gain=self.gain, exact_head=self.exact_head, without=problem.forget
        )
        return Unlearned(parameters, note=certificate.explanation)

    def audit_of(self, memory: Memory) -> Audit | None:
        """The memory's audit, of the step as it is or with the audit's gain; None where nothing audited such answers:
        at another ridge, and with another gain."""
        audit, least = memory.audit, 0.0 if self.exact_head else 1.0
        if audit is None or self.ridge is not None or self.gain not in (False, True):
            return None
        return audit.with_gain if self.gain is True and audit.gain >= least else audit

    @staticmethod
    def _at_another_ridge(problem: Problem, ridge: float) -> Unlearned:
        state, nobody = problem.state, problem.positions[:0]
        steps = [state.resolve(gone, state.displacement, ridge) for gone in (problem.positions, nobody)]
        return Unlearned(state.moved_by(steps[0] - steps[1]))
