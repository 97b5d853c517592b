"""Choosing settings: every method's, ours included, by the same score on the same requests, which nobody asks for.

The score of an answer to a request is

    ratio * (1 + gap) / (1 + gap of the retrained models),

with the ratio of distances that the fit's loss calls for (``distance_ratio`` of logits, or ``probability_ratio``) and
``average_gap`` in points, each the mean over the models retrained for the request, theirs over their pairs: 1 is as
near as retraining. Of a method's settings those with the least geometric mean over the requests are chosen, and kept
for every request that the model is then asked.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import geometric_mean, mean

from torch import Tensor
from torch.utils.data import Dataset

from fastntk.common.progress import track
from fastntk.evidence.measures import MEASURES, RATIOS, Subject
from fastntk.evidence.methods import Method, Problem, Unlearned
from fastntk.evidence.methods.problem import measured
from fastntk.evidence.report import beside, subjects_of
from fastntk.tuning.outputs import model_at

_ASKED, _LEAST = "asked", 1e-9


@dataclass(frozen=True)
class Trial:
    """A request that nobody asks for.

    Attributes:
        problem: the request.
        test: images that no model was fitted to.
        retrained: the answers of models retrained for it, by name.
        kept: from a method's name and settings to these with answers that are kept.
    """

    problem: Problem
    test: Dataset
    retrained: Mapping[str, Unlearned]
    kept: Callable[[str, Method], Method]

    def score(self, parameters: Mapping[str, Tensor]) -> float:
        """Of an answer with these parameters; infinite where its outputs are not finite."""
        subjects = {**self._known, **self._subjects({_ASKED: parameters})}
        subject = beside(subjects, list(self._known))[_ASKED]
        ratio = MEASURES[RATIOS[self.problem.state.network.loss.unit]](subject)
        near = math.inf if ratio is None else max(ratio, _LEAST)
        return near * (1 + _gap(subject)) / (1 + self._floor)

    @cached_property
    def _known(self) -> dict[str, Subject]:
        return self._subjects({name: each.parameters for name, each in self.retrained.items()})

    @cached_property
    def _floor(self) -> float:
        return mean(map(_gap, beside(self._known, list(self._known)).values()))

    def _subjects(self, parameters: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Subject]:
        problem = self.problem
        sets = {"retain": problem.retain, "forget": problem.forgotten, "test": self.test}
        models = {name: model_at(problem.model, each) for name, each in parameters.items()}
        return subjects_of(models, sets, problem.device)


@dataclass(frozen=True)
class Choice:
    """The settings that were chosen for a method: their score, how many were tried, and the seconds of all of them; and
    the score and the seconds of each, by its key."""

    method: Method
    score: float
    tried: int
    seconds: float
    scores: Mapping[str, tuple[float, float]]


def choose(
    tried: Mapping[str, Sequence[Method]],
    trials: Sequence[Trial],
    key_of: Callable[[Method], str],
    known: Mapping[str, tuple[float, float]],
) -> dict[str, Choice]:
    """Of every method's settings, by its name, those with the least score, of equal ones the first. What is ``known``,
    by its key, is not tried again."""
    chosen = {}
    for name, settings in track(tried.items(), "choosing settings"):
        keys = [key_of(each) for each in settings]
        scores = {key: known.get(key) or _scored(name, each, trials) for key, each in zip(keys, settings, strict=True)}
        best = min(keys, key=lambda key: scores[key][0])
        seconds = sum(each for _, each in scores.values())
        chosen[name] = Choice(settings[keys.index(best)], scores[best][0], len(settings), seconds, scores)
    return chosen


def _scored(name: str, method: Method, trials: Sequence[Trial]) -> tuple[float, float]:
    """The geometric mean of its scores over the requests, and the seconds of its answers."""
    answers = [(trial, measured(trial.kept(name, method), trial.problem)) for trial in trials]
    score = geometric_mean(trial.score(answer.parameters) for trial, answer in answers)
    return score, sum(answer.seconds or 0.0 for _, answer in answers)


def _gap(subject: Subject) -> float:
    return MEASURES["average_gap"](subject) or 0.0
