"""How far two models' predictions lie apart."""

from jaxtyping import Float
from torch import Tensor

from fastntk.tuning.outputs import accuracy


def divergence(
    left: Float[Tensor, "batch classes"], right: Float[Tensor, "batch classes"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """``mean_i KL(softmax(left_i / T) || softmax(right_i / T))`` of two models' logits, in nats."""
    logs = [(logits / temperature).log_softmax(1) for logits in (left, right)]
    return (logs[0].exp() * (logs[0] - logs[1])).sum(1).mean()


def kl_divergence(left: Float[Tensor, "samples classes"], right: Float[Tensor, "samples classes"]) -> float:
    """``mean_i KL(softmax(f(x_i)) || softmax(g(x_i)))`` in nats; 0 only for equal predictions."""
    return float(divergence(left.double(), right.double()))


def agreement(left: Float[Tensor, "samples classes"], right: Float[Tensor, "samples classes"]) -> float:
    """The share of samples that both models put into the same class, in percent."""
    return accuracy(left, right.argmax(1))
