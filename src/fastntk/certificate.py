"""What is known of one request: what is exact, and how far the network did as the linear prediction said."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Subset

from fastntk.linearised import Linearised
from fastntk.outputs import at, logits_of

LIMIT_FORGOTTEN, LIMIT_RETAINED = 0.5, 0.15
"""The departures, on the forgotten and on the retained samples, up to which an answer is trusted. They were chosen on
the models of docs/benchmarks.md: good answers stay below both, ridges that harm other classes exceed the second."""


@dataclass(frozen=True)
class Certificate:
    """What is known of one request.

    The new parameters are exact for the network linearised at the anchor, with squared loss and the given ridge: they
    are those of training it on the retained samples alone. For the network itself the agreement is measured:
    ``departure = rms_S |f(theta_new) - f(theta_old) - J (theta_new - theta_old)| / rms_F |J (theta_new - theta_old)|``
    with S the forgotten samples F, or a fixed probe of retained ones; 0 is perfect agreement. The unit is in both cases
    the change that was predicted, and asked for, on the forgotten samples. In the matrix-free form the linear solve is
    not exact either: ``residual`` is the relative residual of its normal equations (None in the other forms).
    """

    forgotten: int
    retained: int
    ridge: float
    departure_forgotten: float
    departure_retained: float
    residual: float | None = None

    @property
    def trusted(self) -> bool:
        """Whether both departures are within their limits."""
        return self.departure_forgotten <= LIMIT_FORGOTTEN and self.departure_retained <= LIMIT_RETAINED

    @property
    def verdict(self) -> str:
        """The measurement in a sentence."""
        measured = (
            f"the network departs from the linear prediction by {self.departure_forgotten:.0%} on the forgotten "
            f"samples (limit {LIMIT_FORGOTTEN:.0%}) and {self.departure_retained:.0%} on a probe of retained ones "
            f"(limit {LIMIT_RETAINED:.0%}), in units of the change predicted for the forgotten ones"
        )
        if self.trusted:
            return f"trusted: {measured}."
        return f"not trusted: {measured}. Retrain, or forget fewer samples with a larger ridge."

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "trusted": self.trusted, "verdict": self.verdict}


def change_of_logits(
    linearised: Linearised, ids: Sequence[int], before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> Float[Tensor, "samples classes"]:
    """What a change of the parameters really does to the logits of at least one sample."""
    model, subset = linearised.jacobian.model, Subset(linearised.train, ids)
    old, new = (logits_of(at(model, where), subset, linearised.device) for where in (before, after))
    return new - old


def rms(vectors: Float[Tensor, "samples classes"]) -> float:
    """The root mean square length; 0 for no vectors."""
    return float(vectors.square().sum(1).mean().sqrt()) if len(vectors) else 0.0
