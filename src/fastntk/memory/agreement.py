"""How far the network does as its linearisation predicted."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.inputs.batches import hard
from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.products import tangent
from fastntk.memory.audit import Audit
from fastntk.tuning.outputs import model_at


def logits_around(
    network: Linearised, positions: Sequence[int], before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> tuple[Float[Tensor, "samples classes"], Float[Tensor, "samples classes"], Int[Tensor, " samples"]]:
    """The logits of at least one sample before and after a change of the parameters, and the labels; one reading."""
    old, new = (model_at(network.jacobian.model, parameters) for parameters in (before, after))
    parts = []
    with torch.no_grad():
        for images, labels in network.images(positions):
            x = images.to(network.device)
            parts.append((old(x), new(x), hard(labels)))
    logits_before, logits_after, all_labels = (torch.cat(each) for each in zip(*parts, strict=True))
    return logits_before, logits_after, all_labels


class Observed(NamedTuple):
    """Fields of a ``Certificate`` that a forward pass gives."""

    departure_requested: float
    departure_retained: float | None
    doubt: float | None


def observed(
    network: Linearised,
    change: Float[Tensor, " p"],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    requested: Sequence[int],
    witnesses: Sequence[int],
    predicted: Float[Tensor, "requested classes"] | None = None,
    audit: Audit | None = None,
) -> Observed:
    """How far the network departs from ``J change`` on the samples of a request, and on witnesses among the retained
    ones, and the audit's doubt of the former; see ``Certificate``.

    Both departures are 0 where no change is predicted on the request's samples (``predicted``, if it is known already);
    the second is None without witnesses, the doubt without an audit or samples.
    """
    nothing = Observed(0.0, 0.0 if witnesses else None, None)
    if not requested:
        return nothing
    count = len(requested)
    old, new, labels = logits_around(network, [*requested, *witnesses], before, after)
    doubt = audit.doubt(new[:count].cpu(), labels[:count]) if audit else None
    predicted = tangent(network, requested, change) if predicted is None else predicted
    size = rms(predicted)
    if not size:
        return nothing._replace(doubt=doubt)
    error = new - old - torch.cat([predicted, tangent(network, witnesses, change)])
    return Observed(rms(error[:count]) / size, rms(error[count:]) / size if witnesses else None, doubt)


def rms(vectors: Float[Tensor, "samples classes"]) -> float:
    """The root mean square length; 0 for no vectors."""
    return float(vectors.square().sum(1).mean().sqrt()) if len(vectors) else 0.0
