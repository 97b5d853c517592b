"""A gain on the step, so that what was forgotten looks like what was never seen.

The linear prediction says in which direction the network moves when a sample is taken out; how far rests on a ridge
that was found from the training data alone. Held-out data can tell: a member that is left out should be as sure of its
label as samples that were never seen are. With ``c_i = J_i (s(S - i) - s(S))`` (``fastntk.auditing.left_out``) and
``p_y`` the softmax's probability of the label, the gain g solves

    mean_i p_y(f(x_i; theta*) + g c_i) = mean p_y(f(x; theta)) over unseen x,

and the answer to all requests so far becomes ``theta* + g (s(R) - s(D))``. Where chance alone could tell the two means
apart (95 %), as it is where the network is linear in what is tuned, g is 1. Any other takes the exactness for the
linearised network away.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.certificate import CHANCE
from fastntk.errors import InputError

if TYPE_CHECKING:
    from fastntk.memory import Memory

LEAST, MOST = 0.5, 2.0
"""Gains beyond are not considered: where the linear prediction is off by more it is no guide."""


def calibrated(
    fitted: Float[Tensor, "members classes"],
    change: Float[Tensor, "members classes"],
    labels: Int[Tensor, " members"],
    unseen: Float[Tensor, "others classes"],
    unseen_labels: Int[Tensor, " others"],
) -> float:
    """The gain, to 0.01: 1 if chance could make the difference, else within ``LEAST`` and ``MOST``.

    Args:
        fitted: logits of the members.
        change: what leaving each of them out alone changes them by.
        labels: theirs.
        unseen: logits of samples that the network was not fitted to.
        unseen_labels: theirs.
    """
    wanted, left_out = _sureness(unseen, unseen_labels), _sureness(fitted + change, labels)
    error = (wanted.var() / len(wanted) + left_out.var() / len(left_out)).sqrt()
    if (left_out.mean() - wanted.mean()).abs() <= CHANCE * error:
        return 1.0
    gains = torch.linspace(LEAST, MOST, round(100 * (MOST - LEAST)) + 1, dtype=torch.float64)
    reached = torch.stack([_sureness(fitted + gain * change, labels).mean() for gain in gains])
    return float(gains[(reached - wanted.mean()).abs().argmin()])


def amplified(memory: "Memory", parameters: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """``theta* + g (theta - theta*)`` with the gain g of the memory's audit.

    Args:
        memory: audited with held-out data since it was linearised. It does not change.
        parameters: theta; None takes the memory's after all requests so far.

    Raises:
        InputError: there is no gain.
    """
    if memory.audit is None or memory.audit.gain is None:
        raise InputError(
            "a gain comes from an audit with held-out data. Audit the memory with some (audit RUN --test DATA)."
        )
    gain, anchor = memory.audit.gain, memory.anchor
    moved = memory.parameters if parameters is None else parameters
    return {name: anchor[name] + gain * (tensor - anchor[name]) for name, tensor in moved.items()}


def _sureness(logits: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"]) -> Float[Tensor, " samples"]:
    """The probability of the label."""
    return logits.double().softmax(1).gather(1, labels[:, None])[:, 0]
