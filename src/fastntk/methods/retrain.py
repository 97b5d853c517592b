"""The yardstick: training again without the forgotten samples."""

import copy
from dataclasses import dataclass, replace

from fastntk.methods.problem import Problem, Unlearned
from fastntk.training import fit
from fastntk.tunable import snapshot, tuned


@dataclass(frozen=True)
class Retrain:
    """Fit the initial parameters to the retained samples, with the original recipe.

    Attributes:
        seed: of the order of the samples; None takes the original's. Two retrained models that differ in it alone lie
            some distance apart: the noise floor of every comparison.
    """

    seed: int | None = None

    def __call__(self, problem: Problem) -> Unlearned:
        """Answer the request by training."""
        model = copy.deepcopy(problem.model)
        model.load_state_dict(dict(problem.initial), strict=False)
        seed = problem.recipe.seed if self.seed is None else self.seed
        done = fit(model, problem.retain, replace(problem.recipe, seed=seed))
        return Unlearned(snapshot(tuned(model)), done.seconds)
