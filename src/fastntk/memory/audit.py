"""How near models that were truly retrained the memory's answer to a request came, which nobody made."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.tuning.outputs import margins

LIMIT_RATIO = {"logits": 1.5, "probabilities": 1.25}
"""The distance to retrained models over that between two of them, up to which a memory is trusted, by unit. That
between two retrained models scatters by some 6 % of itself in probabilities: 1.25 is what an answer at 1.15 may show
(docs/benchmarks-cross-entropy.md)."""

LIMIT_GAP = 4.0
"""The points of accuracy between the answer and retrained models up to which a memory is trusted. As many as the two
lie apart themselves, or as chance makes of so few samples, are allowed too."""

LIMIT_UNSEEN = 3.0
"""Points between the accuracy on samples left out and on unseen ones, up to which a memory is trusted, or as many as
chance makes of so few."""

CHANCE = 1.96
"""Standard deviations that chance is granted."""

SURE = 0.95
"""Of retrained models, whose accuracy lies within a doubt."""

LIMITS_GAIN = 0.5, 2.0
"""Gains beyond are not considered: where the linear prediction is off by more it is no guide."""

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
        errors: how much larger a retrained model's logit margin of a sample is than the answer's: the mean over F and
            both models, and the standard deviation; None in an audit of before these were kept.
        errors_with_gain: the same of the answer with the gain.
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
    errors: tuple[float, float] | None = None
    errors_with_gain: tuple[float, float] | None = None

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
        answered = replace(answered, errors=self.errors_with_gain)
        return replace(answered, left_out=None, unseen=None, compared=(0, 0))

    def doubt(self, logits: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"]) -> float | None:
        """The points within which the accuracy of a retrained model should lie of an answer's, in 19 of 20 cases.

        A retrained model's margins are taken to differ from those of an answer with these logits as they did on the
        drawn samples: normally, independently, with ``errors``. See ``accuracy_doubt``. None in an audit without them.
        """
        return None if self.errors is None else accuracy_doubt(margins(logits, labels), *self.errors)

    @property
    def _at_an_end(self) -> str:
        """How the step so multiplied is sure of the labels."""
        least, most = LIMITS_GAIN
        if least < self.gain < most:
            return " is"
        return f", the {'least' if self.gain <= least else 'most'} that is tried, comes nearest to being"

    def __str__(self) -> str:
        text = (
            f"audited on {self.samples:,} samples: the answer lay {self.ratio:.2f} times as far from two "
            f"retrained models as they from each other, in {self.unit} (limit {LIMIT_RATIO[self.unit]:.2f}), accuracy "
            f"{self.accuracy:.1f} % against theirs of {sum(self.retrained) / 2:.1f} % (within {self.allowed:.1f} "
            f"points); the step times {self.gain:.2f}{self._at_an_end} as sure of their labels as they, at "
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


def accuracy_doubt(margins: Float[Tensor, " samples"], shift: float, scatter: float) -> float:
    """The least ``100 k / n`` points within which the accuracies of ``SURE`` of models lie of that of n margins.

    A model's margins are those, ``m_i``, plus normal errors with mean ``shift`` and standard deviation ``scatter``, all
    independent. Then it classifies sample i rightly with ``p_i = Phi((m_i + shift) / scatter)``, and the number that it
    has right has the Poisson binomial distribution of these: k is the least with

        P(|number right - #{m_i > 0}| <= k) >= SURE.

    A class that models surely do not know has none, ten samples have steps of 10 points. 0 for no samples.
    """
    right = torch.special.ndtr((margins.double() + shift) / max(scatter, torch.finfo(torch.float64).tiny))
    parts = [np.array([1 - p, p]) for p in right.tolist()] or [np.ones(1)]
    while len(parts) > 1:  # neighbours together: a product of polynomials
        paired = [np.convolve(one, other) for one, other in zip(parts[::2], parts[1::2], strict=False)]
        parts = [*paired, *parts[2 * len(paired) :]]
    below, own, count = np.concatenate([[0.0], parts[0].cumsum()]), int((margins > 0).sum()), len(margins)
    for k in range(count):
        if below[min(own + k, count) + 1] - below[max(own - k, 0)] >= SURE:
            return 100 * k / count
    return 100.0 if count else 0.0
