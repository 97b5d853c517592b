"""How easily what was forgotten comes back: by training on it again, by training on what is retained alone, by
refitting the head to a part of it; and whether a barrier lies between a model and the one that was fitted to all.

Parameters that only hide the forgotten samples give them back sooner than parameters that never saw them. All of it
says so only beside a retrained model's.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from fastntk.common.seeds import random_order
from fastntk.evidence.methods import Problem
from fastntk.evidence.methods.descent import descend, shuffled
from fastntk.evidence.metrics import accuracy
from fastntk.inputs.batches import batches, labels_of
from fastntk.inputs.heads import head_modules
from fastntk.tuning.outputs import logits_of, model_at

STEPS = 30
"""After which relearning is given up."""
BACK = 0.9
"""The share of the original's accuracy on the forgotten samples at which they are taken to be back."""
POINTS = 5
"""Of a line, between its ends."""
SAMPLES = 64
"""Of the forgotten, and 4 times as many of the retained, are used at most: the first ones of a fixed random order."""


def relearn_steps(problem: Problem, parameters: Mapping[str, Tensor]) -> float | None:
    """Steps on the forgotten samples alone until their accuracy is back at ``BACK`` times the original's.

    Every step is one of Adam on all of them (at most ``SAMPLES``), at the recipe's learning rate; between two steps
    the accuracy is interpolated. None if ``STEPS`` are not enough. "Relearn time" as in Golatkar et al. 2020
    (arXiv 1911.04933) and Tarun et al. 2021 (arXiv 2111.08947).
    """
    forgotten = _some(problem.forgotten, SAMPLES)
    labels = labels_of(forgotten)
    enough = BACK * accuracy(_logits(problem, problem.state.anchor, forgotten), labels)
    curve: list[float] = []

    def losses(problem: Problem, model: nn.Module) -> Iterator[Tensor]:
        [(images, wanted)] = batches(forgotten, len(labels))
        for _ in range(STEPS + 1):
            logits = model(images.to(problem.device))
            curve.append(accuracy(logits.detach().cpu(), labels))
            if curve[-1] >= enough:
                return
            yield problem.recipe.loss(logits, wanted.to(problem.device))

    descend(problem, losses, problem.recipe.learning_rate, start=parameters)
    return first_reached(curve, enough)


def relearned_without(problem: Problem, parameters: Mapping[str, Tensor]) -> float:
    """The accuracy, in percent, that training on the retained samples alone gives back on the forgotten ones: the best
    after any epoch of a sixth of the fit's, by Adam at the fit's rate.

    Nothing that was forgotten is shown: what comes back was not forgotten. Source: Siddiqui et al. 2025, "From dormant
    to deleted" (arXiv 2505.22310).
    """
    forgotten = problem.forgotten
    labels, best = labels_of(forgotten), 0.0

    def losses(problem: Problem, model: nn.Module) -> Iterator[Tensor]:
        nonlocal best
        for epoch in range(problem.epochs(1 / 6)):
            for images, wanted in shuffled(problem, problem.retain, epoch):
                yield problem.recipe.loss(model(images), wanted)
            best = max(best, accuracy(logits_of(model, forgotten, problem.device).cpu(), labels))

    descend(problem, losses, problem.recipe.learning_rate, start=parameters)
    return best


def barrier(problem: Problem, parameters: Mapping[str, Tensor]) -> float:
    """The loss barrier on the line from the fitted parameters to others, on retained samples (``4 SAMPLES`` at most):

        max_t L(theta* + t (theta - theta*)) - (1 - t) L(theta*) - t L(theta),    at least 0,

    at ``POINTS`` between the ends. A model that only moved away lies in the original's valley; a retrained one may or
    may not. Sources: Frankle et al. 2020 (arXiv 1912.05671) for the barrier, Siddiqui et al. 2025 (arXiv 2505.22310)
    for its use here.
    """
    retained, anchor = _some(problem.retain, 4 * SAMPLES), problem.state.anchor
    labels = torch.stack([torch.as_tensor(retained[i][1]) for i in range(len(retained))])
    shares = torch.linspace(0, 1, POINTS + 2).tolist()
    heights = []
    for t in shares:
        between = {name: start + t * (parameters[name] - start) for name, start in anchor.items()}
        heights.append(float(problem.recipe.loss(_logits(problem, between, retained), labels)))
    first, last = heights[0], heights[-1]
    return max(0.0, *(h - (1 - t) * first - t * last for t, h in zip(shares, heights, strict=True)))


def moved(problem: Problem, parameters: Mapping[str, Tensor]) -> float:
    """``|theta - theta*|``, the distance of other tuned parameters to the fitted ones."""
    flatten = problem.state.layout.flatten
    return float((flatten(parameters) - flatten(problem.state.anchor)).norm())


def first_reached(curve: Sequence[float], level: float) -> float | None:
    """Where a curve, given at 0, 1, 2, ... and linear between, first is at ``level`` or above; None if nowhere."""
    before = None
    for place, value in enumerate(curve):
        if value >= level:
            return float(place) if before is None else place - (value - level) / (value - before)
        before = value
    return None


def head_recovery(problem: Problem, parameters: Mapping[str, Tensor]) -> float | None:
    """Accuracy, in percent, on half of the forgotten samples of a new linear head, fitted to the other half.

    The head (ridge regression to +-1 on standardised inputs) is fitted to the inputs of the model's own head on that
    half and on retained samples, so it says what the tuned parameters before the head still know. None for fewer than
    two forgotten samples.
    """
    from sklearn.linear_model import RidgeClassifier  # a second to import, which no request should wait for
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    forgotten, retained = _some(problem.forgotten, SAMPLES), _some(problem.retain, 4 * SAMPLES)
    labels, half = labels_of(forgotten), len(forgotten) // 2
    if not half:
        return None
    inputs, others = (head_inputs(problem, parameters, part) for part in (forgotten, retained))
    head = make_pipeline(StandardScaler(), RidgeClassifier())
    head.fit(torch.cat([inputs[:half], others]), torch.cat([labels[:half], labels_of(retained)]))
    return 100 * float(head.score(inputs[half:], labels[half:]))


def head_inputs(
    problem: Problem, parameters: Mapping[str, Tensor], samples: Dataset
) -> Float[Tensor, "samples features"]:
    """What the model's head is given for ``samples``; of two heads the first."""
    found: list[Tensor] = []
    head = problem.model.get_submodule(head_modules(problem.model)[0])
    hook = head.register_forward_pre_hook(lambda _, given: found.append(given[0].detach().cpu()))
    try:
        _logits(problem, parameters, samples)
    finally:
        hook.remove()
    return torch.cat(found).flatten(1)


def _logits(problem: Problem, parameters: Mapping[str, Tensor], samples: Dataset) -> Tensor:
    return logits_of(model_at(problem.model, parameters), samples, problem.device).cpu()


def _some(samples: Dataset, most: int) -> Subset:
    """At most so many, the first of a fixed random order."""
    count = len(samples)  # type: ignore[arg-type]
    return Subset(samples, random_order(count)[:most].tolist())
