"""How often, and by how much, the right class wins."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def accuracy(logits: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"]) -> float:
    """The share of samples whose largest logit is their label's, in percent; NaN for no samples."""
    return 100 * float((logits.argmax(1) == labels).double().mean())


def label_probability(logits: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"]) -> float:
    """``mean_i p_y`` with ``p = softmax(f(x_i))`` and y the label of sample i: how sure of the labels a model is."""
    return float(logits.double().softmax(1).gather(1, labels[:, None]).mean())


def margins(logits: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"]) -> Float[Tensor, " samples"]:
    """Per sample: the label's logit less the largest other one; positive where the sample is classified rightly."""
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -float("inf"))
    return own[:, 0] - others.amax(1)


def accuracy_spread(margins: Float[Tensor, " samples"], error: float) -> float:
    """The standard deviation, in points, of the accuracy of models whose margins scatter about these.

    ``100/n sqrt(sum_i p_i (1 - p_i))`` with ``p_i = Phi(m_i / error)``, the share of models that classify sample i
    rightly: the errors are taken to be normal, with this standard deviation, and independent. 0 for no samples.
    """
    right = torch.special.ndtr(margins.double() / max(error, torch.finfo(torch.float64).tiny))
    return 100 * float((right * (1 - right)).sum().sqrt()) / max(len(margins), 1)
