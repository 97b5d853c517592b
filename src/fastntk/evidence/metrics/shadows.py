"""Whether unlearned models, as a distribution over seeds, differ from retrained ones: with many models of each.

Every argument holds one statistic of every model and forgotten sample: in the sources ``fastntk.metrics.log_odds``.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

Margins = Float[Tensor, "models samples"]


def klom(unlearned: Margins, retrained: Float[Tensor, "others samples"], bins: int = 10) -> Float[Tensor, " samples"]:
    """``KL(unlearned || retrained)`` of a sample's margins, in nats, per sample.

    Both distributions are histograms of ``bins`` equal bins over the range of both, with half a model added to each
    bin, so that few models give a finite value. That value is not 0 for equal distributions, but shrinks with more
    models: compare with two halves of the retrained ones. ``published_klom`` is what the source has.
    """
    p, q = ((counts + 0.5) / (counts + 0.5).sum(1, keepdim=True) for counts in _counts(unlearned, retrained, bins))
    return (p * (p / q).log()).sum(1)


def published_klom(unlearned: Margins, retrained: Float[Tensor, "others samples"]) -> Float[Tensor, " samples"]:
    """The same as published: margins from -100 to 100, 20 bins, and 1e-5 for a share of the retrained models that is
    less.

    With few models nearly every bin of the one kind is empty in the other, and the floor is all that is measured: take
    a hundred of each. Source: Georgiev et al. 2024, "Attribute-to-delete" (arXiv 2410.23232), and the code that goes
    with it, which leaves the largest margin of each sample out.
    """
    p, q = (
        counts / counts.sum(1, keepdim=True)
        for counts in _counts(unlearned.clamp(-100, 100), retrained.clamp(-100, 100), 20)
    )
    q = torch.where(p > 0, q.clamp_min(1e-5), q)
    return torch.xlogy(p, p / (q / q.sum(1, keepdim=True)).clamp_min(1e-300)).sum(1)


def _counts(one: Margins, other: Float[Tensor, "others samples"], bins: int) -> Iterator[Float[Tensor, "samples bins"]]:
    """How many models of each kind are in each of the equal bins over the range of both."""
    both = torch.cat([one, other])
    low, high = both.amin(0), both.amax(0)
    width = (high - low).clamp_min(torch.finfo(both.dtype).tiny)
    for margins in (one, other):
        places = ((margins - low) / width * bins).long().clamp(0, bins - 1)
        yield torch.nn.functional.one_hot(places, bins).sum(0).double()


def ulira(unlearned: Margins, retrained: Float[Tensor, "others samples"]) -> Float[Tensor, "all samples"]:
    """1 where an attacker who knows both distributions places a model rightly by one sample, 0 where not.

    The first rows are the unlearned models, then the retrained. For each model and sample a normal distribution is
    fitted to the margins of the other models of either kind, and the likelier kind is named; ties count a half. The
    mean is 0.5 where the kinds are the same. Source: Hayes et al. 2024, "Inexact unlearning needs more careful
    evaluations to avoid a false sense of privacy" (arXiv 2403.01218), leaving one model out. Where models differ in
    their seeds alone, and not in their training data too, as there, the two kinds are easier to tell.

    Raises:
        ValueError: there are fewer than three models of a kind.
    """
    if min(len(unlearned), len(retrained)) < 3:
        raise ValueError("three models of each kind are needed: two to fit a distribution to, and one to ask about.")
    rows = []
    for own, other in ((unlearned, retrained), (retrained, unlearned)):
        for place in range(len(own)):
            left = torch.cat([own[:place], own[place + 1 :]])
            ratio = _log_density(own[place], left) - _log_density(own[place], other)
            rows.append((ratio.sign().double() + 1) / 2)
    return torch.stack(rows)


def _log_density(value: Float[Tensor, " samples"], models: Float[Tensor, "some samples"]) -> Float[Tensor, " samples"]:
    """Of the normal distribution fitted to the models' values, sample by sample."""
    spread = models.std(0).clamp_min(1e-6)
    return torch.distributions.Normal(models.mean(0), spread).log_prob(value)
