"""The head solved exactly at the features that the step leads to.

The step is linear in the head ``W`` and in what comes before it, and so leaves out the product of their changes. With
what comes before the head where the step took it, the head's part of the anchored objective has a closed form again.
With ``h_i(theta)`` the head's inputs, and a 1 for the bias,

    W(S; theta) = argmin_W  1/2 sum_S |W h_i(theta) - t_i|^2 + ridge/2 |W - W_0|^2

    W_new = W(R; theta_1) - (W(D; theta*) - W*),    theta_1 = theta* + s(R) - s(D).

The bracket is what the fitted head falls short of, as ``s(D)`` is for all parameters; a memory keeps it from when it
was prepared. Where the head alone is tuned, ``W_new`` is the step's.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.per_sample import PerSampleJacobian
from fastntk.solve.linalg import shifted
from fastntk.solve.solution import Solution

Head = Float[Tensor, "classes features"]
"""A head as a matrix, the bias its last column."""


def head_shortfall(network: Linearised, solution: Solution) -> Head | None:
    """``W(D; theta*) - W*`` from a solution over D; None where the head has no closed form there."""
    layout = network.layout
    moments = solution.head_moments(layout) if layout.head and network.of_logits else None
    if moments is None:
        return None
    (gram, moment), moved = moments, layout.head_of(solution.displacement)
    return _solved(gram, moment + moved @ gram, solution.ridge) - moved


def new_head(
    network: Linearised,
    parameters: Mapping[str, Tensor],
    initial: Mapping[str, Tensor],
    retain: Sequence[int],
    ridge: float,
    shortfall: Head,
) -> dict[str, Tensor]:
    """``theta_1`` with ``W_new`` for its head: a forward pass over the retained samples, and a small solve.

    Args:
        network: linearised at ``theta*``.
        parameters: ``theta_1``.
        initial: ``theta_0``.
        retain: the positions of R.
        ridge: a total.
        shortfall: ``W(D; theta*) - W*``.
    """
    layout = network.layout
    start, vector = layout.head_of(layout.flatten(initial)), layout.flatten(parameters)
    gram, moment = _moments(network, parameters, retain, start)
    vector[-start.numel() :] = (start + _solved(gram, moment, ridge) - shortfall).flatten()
    return layout.unflatten(vector, parameters)


def _solved(gram: Float[Tensor, "features features"], moment: Head, ridge: float) -> Head:
    """``moment (gram + ridge I)^-1``: with ``moment = sum (t - W_0 h) h'``, ``W(S; theta) - W_0``."""
    return torch.linalg.solve(shifted(gram, ridge), moment.T).T


def _moments(
    network: Linearised, parameters: Mapping[str, Tensor], positions: Sequence[int], start: Head
) -> tuple[Float[Tensor, "features features"], Head]:
    """``sum h h'`` and ``sum (t - W_0 h) h'`` at ``parameters``, over the samples at ``positions``."""
    layout = network.layout
    jacobian = PerSampleJacobian(network.jacobian.model, parameters, layout)
    moved = layout.head_of(layout.flatten(parameters)) - start
    gram, moment = start.new_zeros(start.shape[1], start.shape[1]), torch.zeros_like(start)
    for images, labels in network.images(positions):
        features, logits = jacobian.features(images.to(network.device))
        residual = network.loss.residual(logits, labels.to(logits.device))
        h = features.to(start)
        gram += h.T @ h
        moment += (residual.to(start) + h @ moved.T).T @ h
    return gram, moment
