"""Training on from the fitted parameters: shared by every method that fine-tunes."""

from collections.abc import Callable, Iterator, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastntk.evidence.methods.problem import Problem, Unlearned
from fastntk.inputs.batches import batches, checked
from fastntk.inputs.called import copied, suited, uncached
from fastntk.tuning.parameters import snapshot, tuned

Losses = Callable[[Problem, nn.Module], Iterator[Float[Tensor, ""]]]
"""From a request and a model to one loss a step, each computed at the parameters which that step finds."""


@torch.enable_grad()
def descend(
    problem: Problem,
    losses: Losses,
    learning_rate: float,
    mask: Mapping[str, Tensor] | None = None,
    start: Mapping[str, Tensor] | None = None,
) -> Unlearned:
    """Adam along one loss after the other; the problem's model is not changed.

    Official codes of most methods descend by SGD with momentum and weight decay, in training mode, over all parameters
    (Golatkar et al.'s fine-tuning and the baselines of SCRUB's small experiments in eval mode). Here every method
    moves what the fit tuned, by the fit's default optimiser and without weight decay, and norms keep the statistics
    that the network is used with, so that answers differ in the method alone.

    Args:
        problem: the request.
        losses: to be minimised, one a step.
        learning_rate: constant.
        mask: of the tuned parameters, 1 where they may move and 0 where not.
        start: the tuned parameters to begin with; None takes the fitted ones.
    """
    model = copied(problem.model)
    model.load_state_dict(dict(start or problem.state.anchor), strict=False)
    parameters = tuned(model)
    optimiser = torch.optim.Adam(parameters.values(), lr=learning_rate)
    for loss in losses(problem, model.eval()):
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        for name, allowed in (mask or {}).items():
            gradient = parameters[name].grad
            if gradient is not None:
                gradient.mul_(allowed)
        optimiser.step()
        uncached(model)
    return Unlearned(snapshot(parameters))


def shuffled(problem: Problem, data: Dataset, seed: int) -> Iterator[tuple[Tensor, Int[Tensor, " batch"]]]:
    """Batches of ``(images, labels)`` in a random order, on the model's device."""
    order = torch.Generator().manual_seed(seed)
    for images, labels in batches(data, problem.recipe.batch_size, order):
        yield suited(problem.model, checked(images).to(problem.device)), labels.to(problem.device)


def endlessly(problem: Problem, data: Dataset, seed: int) -> Iterator[tuple[Tensor, Int[Tensor, " batch"]]]:
    """``shuffled``, again and again, in another order each time."""
    while True:
        yield from shuffled(problem, data, seed)
        seed += 1
