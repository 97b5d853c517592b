"""This project's method: the anchored difference, from a prepared memory."""

from dataclasses import dataclass

from fastntk.methods.problem import Problem, Unlearned


@dataclass(frozen=True)
class FastNTK:
    """``theta* + s(R) - s(D)``, with the memory's ridge; see ``fastntk.step``.

    Source: Li et al. 2023, "Fast-NTK" (arXiv 2312.14923), for the step over parameter-efficient parameters; anchored at
    the parameters before fitting by this project.

    Attributes:
        ridge: a total; None takes the memory's own, which is quicker.
    """

    ridge: float | None = None

    def __call__(self, problem: Problem) -> Unlearned:
        """Answer the request from the forgotten samples alone."""
        known = problem.memory.members.ids
        answer = problem.memory.preview([known[index] for index in problem.forget.tolist()], ridge=self.ridge)
        return Unlearned(answer.parameters, answer.seconds, answer.certificate.explanation)
