"""The yardstick: training again without the forgotten samples."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.utils.data import Dataset

from fastntk.evidence.methods.problem import Problem, Unlearned
from fastntk.inputs.called import copied
from fastntk.memory.exact import solved_anew
from fastntk.tuning.fitting import fit
from fastntk.tuning.parameters import snapshot, tuned
from fastntk.tuning.recipe import Recipe


@dataclass(frozen=True)
class Retrain:
    """Fit the initial parameters to the retained samples, with the original recipe; of a fit that forgets exactly
    (``fastntk.fit_exact``), do that fit anew without the samples, which no seed changes.

    Attributes:
        seed: of the order of the samples; None takes the original's. Two retrained models that differ in it alone lie
            some distance apart: the noise floor of every comparison.
    """

    seed: int | None = None

    def __call__(self, problem: Problem) -> Unlearned:
        """Answer the request by training."""
        if problem.state.core is not None:
            return Unlearned(solved_anew(problem.state, problem.leaving))
        seed = problem.recipe.seed if self.seed is None else self.seed
        recipe = replace(problem.recipe, seed=seed)
        return Unlearned(retrained(problem.model, problem.initial, problem.retain, recipe)[0])


def retrained(
    model: nn.Module, initial: Mapping[str, Tensor], retain: Dataset, recipe: Recipe
) -> tuple[dict[str, Tensor], float]:
    """The tuned parameters after fitting ``initial`` to ``retain``, and the seconds; the model is not changed."""
    again = copied(model)
    again.load_state_dict(dict(initial), strict=False)
    done = fit(again, retain, recipe)
    return snapshot(tuned(again)), done.seconds
