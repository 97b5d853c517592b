"""How far two models' predictions lie apart."""

from jaxtyping import Float
from torch import Tensor


def kl_divergence(left: Float[Tensor, "samples classes"], right: Float[Tensor, "samples classes"]) -> float:
    """``mean_i KL(softmax(f(x_i)) || softmax(g(x_i)))`` in nats; 0 only for equal predictions."""
    p, q = left.double().log_softmax(1), right.double().log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


def agreement(left: Float[Tensor, "samples classes"], right: Float[Tensor, "samples classes"]) -> float:
    """The share of samples that both models put into the same class, in percent."""
    return 100 * float((left.argmax(1) == right.argmax(1)).double().mean())
