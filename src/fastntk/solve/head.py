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
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from fastntk.common.errors import InputError
from fastntk.jacobians.jacobian import Layout, PerSampleJacobian
from fastntk.jacobians.linearised import Linearised
from fastntk.solve.iterative import MatrixFreeSolution
from fastntk.solve.primal import DualSolution, PrimalSolution

if TYPE_CHECKING:
    from fastntk.memory.memory import Memory

Head = Float[Tensor, "classes features"]
"""A head as a matrix, the bias its last column."""


def exact_head(
    memory: "Memory", parameters: Mapping[str, Tensor] | None = None, without: Sequence[int] = ()
) -> dict[str, Tensor]:
    """``theta_1`` with ``W_new`` for its head: a forward pass over the members, a solve of the size of its inputs.

    The memory does not change, and what it answers next starts from the step, not from this head; so take the exact
    head of the parameters that are to be used, whenever they are to be.

    Args:
        memory: with a data source that has all of its members.
        parameters: ``theta_1``; None takes the memory's after all requests so far.
        without: positions of members that are not in R although they are in the memory.

    Raises:
        InputError: the head is not tuned, what it puts out are not the logits, the loss is not the squared one, the
            memory is matrix-free, its classes are probed, or a member is missing.
    """
    if memory.short_of_head is None:
        raise InputError(
            "an exact head needs a tuned head that gives the logits, squared loss, and a memory in the primal or dual "
            "form without class probes. Tune the head (fastntk.tune(model, 'bn', 'head')) and prepare so."
        )
    linearised, layout = memory.linearised, memory.linearised.layout
    stepped, gone = parameters or memory.parameters, set(without)
    retain = [position for position in memory.present.nonzero()[:, 0].tolist() if position not in gone]
    missing = memory.members.missing(torch.tensor(retain, dtype=torch.long))
    if missing:
        raise InputError(
            f"an exact head needs all {len(retain):,} retained samples; the data source lacks {missing:,}."
        )
    start = _head(memory.initial, layout)
    gram, moment = _moments(linearised, stepped, retain, start)
    vector = layout.flatten(stepped)
    vector[-start.numel() :] = (start + _solved(gram, moment, memory.ridge) - memory.short_of_head).flatten()
    return layout.unflatten(vector, stepped)


def short_of_head(linearised: Linearised, solution: PrimalSolution | DualSolution | MatrixFreeSolution) -> Head | None:
    """``W(D; theta*) - W*`` from a solution over D; None where the head has no closed form there."""
    layout = linearised.layout
    if not layout.head or not linearised.of_logits or isinstance(solution, MatrixFreeSolution):
        return None
    moved = _as_head(solution.displacement, layout)
    if isinstance(solution, PrimalSolution):
        gram, moment = solution.sums.head.double(), _as_head(solution.sums.rhs, layout)
    else:
        features = solution.rows.jacobian.features.double()
        gram, moment = features.T @ features, solution.rows.residual.double().T @ features
    return _solved(gram, moment + moved @ gram, solution.ridge) - moved


def _as_head(vector: Float[Tensor, " p"], layout: Layout) -> Head:
    classes = layout.shapes[layout.head[0]][0]
    size = sum(layout.shapes[name].numel() for name in layout.head)
    return vector[-size:].view(classes, -1)


def _head(parameters: Mapping[str, Tensor], layout: Layout) -> Head:
    return _as_head(layout.flatten(parameters), layout)


def _solved(gram: Float[Tensor, "features features"], moment: Head, ridge: float) -> Head:
    """``moment (gram + ridge I)^-1``: with ``moment = sum (t - W_0 h) h'``, ``W(S; theta) - W_0``."""
    shifted = gram + ridge * torch.eye(len(gram)).to(gram)
    return torch.linalg.solve(shifted, moment.T).T


def _moments(
    linearised: Linearised, parameters: Mapping[str, Tensor], ids: Sequence[int], start: Head
) -> tuple[Float[Tensor, "features features"], Head]:
    """``sum h h'`` and ``sum (t - W_0 h) h'`` at ``parameters``, over the samples with the given ids."""
    network = PerSampleJacobian(linearised.jacobian.model, parameters, linearised.layout)
    moved = _head(parameters, linearised.layout) - start
    gram, moment = start.new_zeros(start.shape[1], start.shape[1]), torch.zeros_like(start)
    for images, labels in linearised.images(ids):
        features, logits = network.features(images.to(linearised.device))
        residual = linearised.loss.residual(logits, labels.to(logits.device))
        h = features.to(start)
        gram += h.T @ h
        moment += (residual.to(start) + h @ moved.T).T @ h
    return gram, moment
