"""How far the network does as its linearisation predicted."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.inputs.batches import hard
from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.products import tangent
from fastntk.memory.audit import Audit
from fastntk.tuning.loss import predictions
from fastntk.tuning.outputs import accuracy, model_at


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

    departure_requested: float | None
    departure_retained: float | None
    still: float | None
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
    gone: Collection[int] | None = (),
) -> Observed:
    """How far the network departs from its linear prediction on the samples of a request, and on witnesses among the
    retained ones; see ``Certificate``.

    Both departures are 0 where no change is predicted on the request's samples; the second is None without witnesses.

    Args:
        network: linearised.
        change: of the parameters, from ``before`` to ``after``.
        before: the tuned parameters.
        after: the same after the request.
        requested: positions of its samples.
        witnesses: positions of some that are retained.
        predicted: ``J change`` on the requested, if it is known already.
        audit: gives the doubt; None for none.
        gone: the classes that no member is left of; None if that is not known.
    """
    nothing = Observed(0.0, 0.0 if witnesses else None, None if gone is None else 0.0, None)
    if not requested:
        return nothing
    count = len(requested)
    old, new, labels = logits_around(network, [*requested, *witnesses], before, after)
    nothing = nothing._replace(
        still=None if gone is None else _still(new[:count].cpu(), labels[:count], gone),
        doubt=audit.doubt(new[:count].cpu(), labels[:count]) if audit else None,
    )
    known = tangent(network, requested, change) if predicted is None else predicted
    moved = torch.cat([known, tangent(network, witnesses, change)])
    was, foreseen, now = (predictions(logits, network.loss.unit) for logits in (old, old + moved, new))
    size = rms((foreseen - was)[:count])
    if not size:
        return nothing
    error = now - foreseen
    retained = rms(error[count:]) / size if witnesses else None
    return nothing._replace(departure_requested=rms(error[:count]) / size, departure_retained=retained)


def _still(logits: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"], gone: Collection[int]) -> float:
    """The percentage of samples of the classes that are gone which are classified as these; 0 if there are none."""
    concerned = torch.isin(labels, torch.tensor(sorted(gone), dtype=labels.dtype))
    return accuracy(logits[concerned], labels[concerned]) if concerned.any() else 0.0


def rms(vectors: Float[Tensor, "samples classes"]) -> float:
    """The root mean square length; 0 for no vectors."""
    return float(vectors.square().sum(1).mean().sqrt()) if len(vectors) else 0.0
