"""A gain on the step, so that what was forgotten looks as it does after retraining.

The linear prediction says in which direction the parameters move when samples are taken out; how far rests on a ridge
that was found from the training data alone. An audit has two retrained models to compare with. With F its drawn
samples, theta its answer to them, theta* the anchor and ``p_y`` the softmax's probability of a sample's label, the gain
g solves

    mean_F p_y(f(x; theta* + g (theta - theta*))) = mean_F p_y(f(x; retrained)), the mean of both retrained models,

and the answer to all requests so far becomes ``theta* + g (s(R) - s(D))``. Any gain but 1 takes the exactness for the
linearised network away. One below 1 draws the parameters back towards those that knew the samples (on three models of
docs/nearer.md a third of a class or more came back), so it is for an exact head to follow; alone, it is taken for 1.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from statistics import mean
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from fastntk.common.errors import InputError
from fastntk.evidence.metrics import label_probability
from fastntk.inputs.images import labels_of
from fastntk.tuning.outputs import at, logits_of

if TYPE_CHECKING:
    from fastntk.memory.memory import Memory

LEAST, MOST = 0.5, 2.0
"""Gains beyond are not considered: where the linear prediction is off by more it is no guide."""


def calibrated(
    memory: "Memory",
    answer: Mapping[str, Tensor],
    forget: Dataset,
    retrained: Sequence[Float[Tensor, "samples classes"]],
) -> float:
    """The gain, to 0.01, within ``LEAST`` and ``MOST``.

    Args:
        memory: whose answer it is.
        answer: theta, the parameters after forgetting ``forget``.
        forget: F.
        retrained: logits on F of models that were trained without it.
    """
    from scipy.optimize import brentq  # a second to import

    device, labels = memory.linearised.device, labels_of(forget)
    wanted = mean(label_probability(logits, labels) for logits in retrained)

    @cache  # the ends are asked for twice
    def excess(gain: float) -> float:
        logits = logits_of(at(memory.model, multiplied(memory, answer, gain)), forget, device).cpu()
        return label_probability(logits, labels) - wanted

    if excess(LEAST) <= 0:
        return LEAST
    if excess(MOST) >= 0:
        return MOST
    return round(brentq(excess, LEAST, MOST, xtol=0.002), 2)


def amplified(
    memory: "Memory", parameters: Mapping[str, Tensor] | None = None, least: float = 1.0
) -> dict[str, Tensor]:
    """``theta* + max(g, least) (theta - theta*)`` with the gain g of the memory's audit.

    Args:
        memory: audited since it was linearised. It does not change.
        parameters: theta; None takes the memory's after all requests so far.
        least: a smaller gain is taken for this one; 0 where an exact head follows.

    Raises:
        InputError: there is no audit.
    """
    if memory.audit is None:
        raise InputError(
            "a gain comes from an audit, and this memory has had none since it was linearised: fastntk audit RUN."
        )
    gain = max(memory.audit.gain, least)
    return multiplied(memory, memory.parameters if parameters is None else parameters, gain)


def multiplied(memory: "Memory", parameters: Mapping[str, Tensor], gain: float) -> dict[str, Tensor]:
    """``theta* + gain (theta - theta*)`` with theta the ``parameters``."""
    anchor = memory.anchor
    return {name: anchor[name] + gain * (tensor - anchor[name]) for name, tensor in parameters.items()}
