"""Membership inference by a population attack: can who was forgotten be told from who was never seen?

The attack is fixed: a sample's score is its modified entropy, and a threshold on it, learned from retained samples
(members) and test samples (no members), says who is a member. Source: Song and Mittal 2021, "Systematic evaluation of
privacy risks of machine learning models" (arXiv 2003.10595).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def modified_entropy(
    logits: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"]
) -> Float[Tensor, " samples"]:
    """``-(1 - p_y) log p_y - sum_{c != y} p_c log(1 - p_c)`` with ``p = softmax(f(x))``, in nats.

    Small for a confident and right prediction, as members have it; unlike entropy, large for a confident wrong one.
    """
    logs = logits.double().log_softmax(1)
    # log(1 - p_c); for the likeliest class, whose p_c may be all but 1, as the log of the others' sum
    top = logs.argmax(1, keepdim=True)
    others = torch.log1p(-logs.exp()).scatter(1, top, logs.scatter(1, top, -torch.inf).logsumexp(1, keepdim=True))
    own = labels[:, None]
    right = others.gather(1, own).exp() * logs.gather(1, own)
    wrong = (logs.exp() * others).scatter(1, own, 0.0)
    return -(right[:, 0] + wrong.sum(1))


def threshold(members: Float[Tensor, " m"], strangers: Float[Tensor, " n"]) -> float:
    """The score up to which a sample is best taken for a member, by balanced accuracy on samples that are known."""
    from sklearn.metrics import roc_curve  # a second to import, which no request should wait for

    false, true, cuts = roc_curve(*_labelled(members, strangers))
    return -float(cuts[(true - false).argmax()])


def taken_for_members(
    asked: Float[Tensor, " k"], members: Float[Tensor, " m"], strangers: Float[Tensor, " n"]
) -> float:
    """The share of ``asked`` that the attack takes for members, in percent, with the threshold from the other two."""
    return 100 * float((asked <= threshold(members, strangers)).double().mean())


def attack_auc(asked: Float[Tensor, " k"], strangers: Float[Tensor, " n"]) -> float:
    """The chance that a random one of ``asked`` looks more like a member than a random stranger; 0.5 tells nothing."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(*_labelled(asked, strangers)))


def _labelled(members: Tensor, strangers: Tensor) -> tuple[Tensor, Tensor]:
    """Labels (1 for members), and scores that are larger for who looks like one."""
    return torch.cat([torch.ones(len(members)), torch.zeros(len(strangers))]), -torch.cat([members, strangers])
