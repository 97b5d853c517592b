"""The head solved exactly at the features that the step leads to.

The step is linear in the head ``W`` and in what comes before it, and so leaves out the product of their changes. With
what comes before the head where the step took it, the head's part of the anchored objective has a closed form again.
With ``h_i(theta)`` the head's inputs, and a 1 for the bias,

    W(S; theta) = argmin_W  1/2 sum_S |W h_i(theta) - t_i|^2 + ridge/2 |W - W_0|^2

    W_new = W* + W(R; theta_1) - W(D; theta*),    theta_1 = theta* + s(R) - s(D),

anchored, as the step is, at what ``W*`` itself falls short of. Where the head alone is tuned, it is the step.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fastntk.errors import InputError
from fastntk.jacobian import Layout, PerSampleJacobian
from fastntk.linearised import Linearised


def exact_head(
    linearised: Linearised,
    initial: Mapping[str, Tensor],
    stepped: Mapping[str, Tensor],
    retain: Sequence[int],
    everyone: Sequence[int],
    ridge: float,
) -> dict[str, Tensor]:
    """``theta_1`` with ``W_new`` for its head, by two forward passes and two solves of the size of the head's inputs.

    Args:
        linearised: at ``theta*``, over the training set.
        initial: ``theta_0``.
        stepped: ``theta_1``.
        retain: R, indices in the training set.
        everyone: D.
        ridge: the step's, a total.

    Raises:
        InputError: the head is not tuned, what it puts out are not the logits, or the loss is not the squared one.
    """
    layout, fitted = linearised.layout, linearised.jacobian.parameters
    if linearised.curved:
        raise InputError("an exact head is a closed form for squared loss alone.")
    if not layout.head:
        raise InputError("an exact head needs a tuned head that gives the logits: fastntk.tune(model, 'bn', 'head').")
    start = _head(initial, layout)
    new = _optimum(linearised, stepped, retain, start, ridge) - _optimum(linearised, fitted, everyone, start, ridge)
    vector = layout.flatten(stepped)
    vector[-start.numel() :] = (_head(fitted, layout) + new).flatten()
    return layout.unflatten(vector, stepped)


def _head(parameters: Mapping[str, Tensor], layout: Layout) -> Float[Tensor, "classes features"]:
    """The head as a matrix, the bias its last column."""
    classes = layout.shapes[layout.head[0]][0]
    size = sum(layout.shapes[name].numel() for name in layout.head)
    return layout.flatten(parameters)[-size:].view(classes, -1)


def _optimum(
    linearised: Linearised,
    parameters: Mapping[str, Tensor],
    ids: Sequence[int],
    start: Float[Tensor, "classes features"],
    ridge: float,
) -> Float[Tensor, "classes features"]:
    """``W(S; theta)`` of the samples with the given ids."""
    network = PerSampleJacobian(linearised.jacobian.model, parameters, linearised.layout)
    moved = _head(parameters, linearised.layout) - start
    gram = ridge * torch.eye(start.shape[1]).to(start)
    moment = torch.zeros_like(start)
    for images, labels in linearised.images(ids):
        features, logits = network.features(images.to(linearised.device))
        residual = linearised.loss.residual(logits, labels.to(logits.device))
        h = features.to(start)
        gram += h.T @ h
        moment += (residual.to(start) + h @ moved.T).T @ h  # (t - W_0 h) h'
    return start + torch.linalg.solve(gram, moment.T).T
