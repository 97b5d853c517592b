"""A gain on the step, so that what was forgotten looks as it does after retraining.

With F an audit's drawn samples, theta the memory's answer to them, theta* the anchor and ``p_y`` the softmax's
probability of a sample's label, the gain g solves

    mean_F p_y(f(x; theta* + g (theta - theta*))) = mean_F p_y(f(x; retrained)), the mean of both retrained models.

``fastntk.memory.finish`` says what is made of it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from statistics import mean

from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from fastntk.evidence.metrics import label_probability
from fastntk.inputs.batches import labels_of
from fastntk.memory.audit import LIMITS_GAIN
from fastntk.memory.finish import multiplied
from fastntk.memory.state import State
from fastntk.tuning.outputs import logits_of, model_at

LEAST, MOST = LIMITS_GAIN


def found(
    state: State,
    answer: Mapping[str, Tensor],
    forget: Dataset,
    retrained: Sequence[Float[Tensor, "samples classes"]],
) -> float:
    """The gain, to 0.01, within ``LEAST`` and ``MOST``.

    Args:
        state: of the memory whose answer it is.
        answer: theta, the parameters after forgetting ``forget``.
        forget: F.
        retrained: logits on F of models that were trained without it.
    """
    device, labels = state.network.device, labels_of(forget)
    wanted = mean(label_probability(logits, labels) for logits in retrained)

    @cache  # the ends are asked for twice
    def excess(gain: float) -> float:
        logits = logits_of(model_at(state.model, multiplied(state, answer, gain)), forget, device).cpu()
        return label_probability(logits, labels) - wanted

    return solved(excess)


def solved(excess: Callable[[float], float]) -> float:
    """The gain, to 0.01, at which an excess of probability that falls with it is 0; within ``LEAST`` and ``MOST``."""
    from scipy.optimize import brentq  # a second to import

    if excess(LEAST) <= 0:
        return LEAST
    if excess(MOST) >= 0:
        return MOST
    return round(brentq(excess, LEAST, MOST, xtol=0.002), 2)
