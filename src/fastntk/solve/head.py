"""The head solved exactly at the features that the step leads to.

The step is linear in the head ``W`` and in what comes before it, and so leaves out the product of their changes. With
what comes before the head where the step took it, the head's part of the anchored objective is a small convex problem
again, which has a closed form for squared loss.
With ``h_i(theta)`` the head's inputs, and a 1 for the bias,

    W(S; theta) = argmin_W  sum_S l(W h_i(theta), t_i) + ridge/2 |W - W_0|^2

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
from fastntk.solve.convex import head_step
from fastntk.solve.linalg import shifted

Head = Float[Tensor, "classes features"]
"""A head as a matrix, the bias its last column."""


def head_shortfall(gram: Float[Tensor, "features features"], moment: Head, displacement: Head, ridge: float) -> Head:
    """``W(S; theta*) - W*`` for squared loss, from ``sum h h'`` and ``sum r h'`` over S and ``W* - W_0``."""
    return ridge_step(gram, moment + displacement @ gram, ridge) - displacement


def new_head(
    network: Linearised,
    parameters: Mapping[str, Tensor],
    center: Mapping[str, Tensor],
    retain: Sequence[int],
    ridge: float,
    shortfall: Head,
) -> dict[str, Tensor]:
    """``theta_1`` with ``W_new`` for its head: a forward pass over the retained samples, and a small solve.

    Args:
        network: linearised at ``theta*``.
        parameters: ``theta_1``.
        center: where the ridge pulls to, ``theta_0`` as a rule.
        retain: the positions of R.
        ridge: a total.
        shortfall: ``W(D; theta*) - W*``.
    """
    layout = network.layout
    start, vector = layout.head_of(layout.flatten(center)), layout.flatten(parameters)
    here = layout.head_of(vector)
    if network.keep is None:
        gram, moment = _moments(network, parameters, retain, start)
        wanted = start + ridge_step(gram, moment, ridge)
    else:
        rows = network.at(parameters).head_rows(retain)
        wanted = here + head_step(rows, network.loss, (here - start).flatten(), ridge).view_as(here)
    vector[-start.numel() :] = (wanted - shortfall).flatten()
    return layout.unflatten(vector, parameters)


def ridge_step(gram: Float[Tensor, "features features"], moment: Head, ridge: float) -> Head:
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
