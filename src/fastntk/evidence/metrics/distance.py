"""How far two models' outputs lie apart."""

from jaxtyping import Float
from torch import Tensor


def logit_distance(left: Float[Tensor, "samples classes"], right: Float[Tensor, "samples classes"]) -> float:
    """``sqrt(mean_i |f(x_i) - g(x_i)|^2)``: the root mean square over samples of the distance between logit vectors.

    In logits; 0 only for equal outputs. Read it beside the distance between two models retrained with different
    seeds, which is the least that any method can be asked for.
    """
    return float((left - right).double().square().sum(1).mean().sqrt())


def probability_distance(left: Float[Tensor, "samples classes"], right: Float[Tensor, "samples classes"]) -> float:
    """``sqrt(mean_i |softmax(f(x_i)) - softmax(g(x_i))|^2)``, from 0 to ``sqrt(2)``.

    With cross-entropy logits have no scale of their own: a class that is never seen falls without bound.
    """
    return logit_distance(left.double().softmax(1), right.double().softmax(1))
