"""How sure of the labels a model is."""

from jaxtyping import Float, Int
from torch import Tensor


def label_probability(logits: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"]) -> float:
    """``mean_i p_y`` with ``p = softmax(f(x_i))`` and y the label of sample i: how sure of the labels a model is."""
    return float(logits.double().softmax(1).gather(1, labels[:, None]).mean())
