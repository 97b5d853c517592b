"""How near models that were truly retrained the memory's answer to a request came, which nobody made."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.tuning.loss import predictions
from fastntk.tuning.outputs import margins

LIMIT_RATIO = {"logits": 1.5, "probabilities": 1.25}
"""The distance to retrained models over that between two of them, up to which a memory is trusted, by unit. That
between two retrained models scatters by some 6 % of itself in probabilities: 1.25 is what an answer at 1.15 may show
(docs/benchmarks.md)."""

LIMIT_GAP = 4.0
"""The points of accuracy between the answer and retrained models up to which a memory is trusted. As many as the two
lie apart themselves, or as chance makes of so few samples, are allowed too."""

LIMIT_UNSEEN = 3.0
"""Points between the accuracy on samples left out and on unseen ones, up to which a memory is trusted, or as many as
chance makes of so few."""

CHANCE = 1.96
"""Standard deviations that chance is granted."""

LIMIT_DOUBT = 3.0
"""Points of doubt up to which a request's accuracy is said to be known; see ``Audit.doubt``."""


@dataclass(frozen=True)
class Audit:
    """How near models that were truly retrained the memory's answer to a request came, which nobody made.

    It is measured on the drawn samples F. Distances are root mean square ones of logits, or with cross-entropy, under
    which logits have no scale of their own, of probabilities; the retrained models differ in the seed of their order of
    samples alone. ``left_out`` and ``unseen`` are measured on many more samples: a forgotten sample should be
    classified as rightly as one that was never seen.

    Attributes:
        samples: how many were drawn.
        accuracy: of the memory's answer, in percent.
        retrained: the same of the two retrained models.
        distances: of the answer to each of the two.
        deviation: the standard deviation that chance gives ``gap``, in points: over the samples, the root of the number
            that are right in one of answer and retrained model and wrong in the other.
        floor: the distance between the two: the least that any method can be asked for.
        departures: of the answer, on F and on retained samples; see ``Certificate``.
        gain: by which the step would be multiplied for the answer to be as sure of the labels as the retrained models;
            see ``fastntk.evidence.gain``. All but the next two is of the step as it is.
        accuracy_with_gain: of the answer so multiplied.
        distances_with_gain: of it to each of the two.
        seconds: that retraining took, both together.
        left_out: the share of members, in percent, that the linear prediction classifies rightly after forgetting each
            of them alone; None if there were no held-out samples to compare it with.
        unseen: the share of those that the network classifies rightly.
        compared: how many samples each of the two shares is of.
        unit: what distances are of: ``"logits"`` or ``"probabilities"``.
    """

    samples: int
    accuracy: float
    retrained: tuple[float, float]
    deviation: float
    distances: tuple[float, float]
    floor: float
    departures: tuple[float, float]
    gain: float
    accuracy_with_gain: float
    distances_with_gain: tuple[float, float]
    seconds: float
    left_out: float | None = None
    unseen: float | None = None
    compared: tuple[int, int] = (0, 0)
    unit: str = "logits"

    @property
    def ratio(self) -> float:
        """The mean of ``distances`` over ``floor``: 1 cannot be told from retraining."""
        return sum(self.distances) / 2 / self.floor if self.floor else float("inf")

    @property
    def gap(self) -> float:
        """``accuracy`` less the mean of ``retrained``, in points."""
        return self.accuracy - sum(self.retrained) / 2

    @property
    def allowed(self) -> float:
        """The largest gap that passes."""
        return max(LIMIT_GAP, abs(self.retrained[0] - self.retrained[1]), CHANCE * self.deviation)

    @property
    def allowed_unseen(self) -> float:
        """The largest difference of ``left_out`` and ``unseen`` that passes."""
        shares = zip((self.left_out or 0.0, self.unseen or 0.0), self.compared, strict=True)
        return max(LIMIT_UNSEEN, CHANCE * math.sqrt(sum(p * (100 - p) / max(count, 1) for p, count in shares)))

    @property
    def passed(self) -> bool:
        """Whether all are within their limits."""
        near = self.ratio <= LIMIT_RATIO[self.unit] and abs(self.gap) <= self.allowed
        return near and abs((self.left_out or 0.0) - (self.unseen or 0.0)) <= self.allowed_unseen

    @property
    def with_gain(self) -> "Audit":
        """The same of answers with the gain. Samples left out say nothing of these and are not in it."""
        answered = replace(self, accuracy=self.accuracy_with_gain, distances=self.distances_with_gain)
        return replace(answered, left_out=None, unseen=None, compared=(0, 0))

    def doubt(self, logits: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"]) -> float:
        """The points within which the accuracy of a retrained model should lie of an answer's.

        An answer with these logits is taken to lie as far from retrained models as on the drawn samples, at a root
        mean square distance ``d``, the mean of ``distances``, in all directions alike that change a prediction. Then a
        margin differs by ``d sqrt(2 / (C - 1))``, and the doubt is ``CHANCE`` times what
        ``accuracy_spread`` makes of that: 19 in 20 models lie within it if all of this holds; on the grid of
        docs/benchmarks.md four in five did. It is large for few samples and for margins near 0.
        """
        error = sum(self.distances) / 2 * math.sqrt(2 / max(logits.shape[1] - 1, 1))
        return CHANCE * accuracy_spread(margins(predictions(logits, self.unit), labels), error)

    def __str__(self) -> str:
        text = (
            f"audited on {self.samples:,} drawn samples: the answer lay {self.ratio:.2f} times as far from two "
            f"retrained models as they from each other, in {self.unit} (limit {LIMIT_RATIO[self.unit]:.2f}), accuracy "
            f"{self.accuracy:.1f} % against theirs of {sum(self.retrained) / 2:.1f} % (within {self.allowed:.1f} "
            f"points); the step times {self.gain:.2f} is as sure of their labels as they, at "
            f"{self.accuracy_with_gain:.1f} %"
        )
        if self.left_out is None:
            return text
        return (
            f"{text}; samples left out one by one are classified rightly in {self.left_out:.1f} %, unseen ones in "
            f"{self.unseen:.1f} % (within {self.allowed_unseen:.1f} points)"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        verdict = "passed" if self.passed else "failed"
        return {**asdict(self), "ratio": self.ratio, "gap": self.gap, "passed": self.passed, "verdict": verdict}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Audit":
        """The reverse of ``to_dict``."""
        given = (document[field.name] for field in fields(cls))
        values: list[Any] = [tuple(value) if isinstance(value, list) else value for value in given]
        return cls(*values)


def accuracy_spread(margins: Float[Tensor, " samples"], error: float) -> float:
    """The standard deviation, in points, of the accuracy of models whose margins scatter about these.

    ``100/n sqrt(sum_i p_i (1 - p_i))`` with ``p_i = Phi(m_i / error)``, the share of models that classify sample i
    rightly: the errors are taken to be normal, with this standard deviation, and independent. 0 for no samples.
    """
    right = torch.special.ndtr(margins.double() / max(error, torch.finfo(torch.float64).tiny))
    return 100 * float((right * (1 - right)).sum().sqrt()) / max(len(margins), 1)
