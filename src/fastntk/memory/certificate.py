"""What is known of one request: what is exact, how far the network did as the linear prediction said, and how near
retrained models the memory's answers come."""

import hashlib
import hmac
import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.evidence.metrics import accuracy_spread, margins
from fastntk.jacobians.linearised import Linearised
from fastntk.memory.members import Id
from fastntk.tuning.outputs import at

LIMIT_REQUESTED, LIMIT_RETAINED = 0.5, 0.15
"""The departures, on the samples of the request and on retained ones, up to which an answer is trusted. They were
chosen on the models of docs/benchmarks.md: good answers stay below both, ridges that harm other classes exceed the
second. An audit that passed has seen a good answer at certain departures: up to ``BEYOND`` times these, answers of its
memory are trusted as well."""

BEYOND = 1.25
"""Departures differ by so much between requests of the same kind."""

LIMIT_RATIO, LIMIT_GAP = 1.5, 4.0
"""Of an audit: the distance to retrained models over that between two of them, and the points of accuracy between the
answer and them, up to which a memory is trusted. As many points as the two lie apart themselves, or as chance makes of
so few samples, are allowed too."""

LIMIT_UNSEEN = 3.0
"""Points between the accuracy on samples left out and on unseen ones, up to which a memory is trusted, or as many as
chance makes of so few."""

CHANCE = 1.96
"""Standard deviations that chance is granted."""

LIMIT_DOUBT = 3.0
"""Points of doubt up to which a request's accuracy is said to be known; see ``Audit.doubt``."""

VERDICTS = "trusted", "refresh needed", "retrain needed"
"""Of a certificate; see ``Certificate.verdict``."""


@dataclass(frozen=True)
class Audit:
    """How near models that were truly retrained the memory's answer to a request came, which nobody made.

    It is measured on the drawn samples F. Distances are root mean square ones of logits; the retrained models differ
    in the seed of their order of samples alone. ``left_out`` and ``unseen`` are measured on many more samples: a
    forgotten sample should be classified as rightly as one that was never seen.

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
        near = self.ratio <= LIMIT_RATIO and abs(self.gap) <= self.allowed
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
        ``fastntk.evidence.metrics.accuracy_spread`` makes of that: 19 in 20 models lie within it if all of this holds; on the
        grid of docs/benchmarks.md four in five did. It is large for few samples and for margins near 0.
        """
        error = sum(self.distances) / 2 * math.sqrt(2 / max(logits.shape[1] - 1, 1))
        return CHANCE * accuracy_spread(margins(logits, labels), error)

    def __str__(self) -> str:
        text = (
            f"audited on {self.samples:,} drawn samples: the answer lay {self.ratio:.2f} times as far from two "
            f"retrained models as they from each other (limit {LIMIT_RATIO:.2f}), accuracy {self.accuracy:.1f} % "
            f"against theirs of {sum(self.retrained) / 2:.1f} % (within {self.allowed:.1f} points); the step times "
            f"{self.gain:.2f} is as sure of their labels as they, at {self.accuracy_with_gain:.1f} %"
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


@dataclass(frozen=True)
class Certificate:
    """What is known of one request.

    The new parameters are exact for the network linearised at the anchor, with squared loss and the given ridge: they
    are those of training it on the samples that are then in the memory. ``residual`` says how exact: it is that of the
    normal equations, relative, ``|(G + ridge I) s - (b - ridge u)| / |b - ridge u|`` (primal; the dual's own in the
    dual form), and ``error``, where it was asked for, is the relative distance of the parameters' change since the
    anchor to that of solving anew from the stored sums.

    For the network itself the agreement is measured: ``departure = rms_S |f(theta_new) - f(theta_old) - J (theta_new -
    theta_old)| / rms_F |J (theta_new - theta_old)|`` with S the samples F of the request, or a fixed probe of retained
    ones; 0 is perfect agreement. The unit is in both cases the change that was predicted, and asked for, on F.

    Attributes:
        request: its id, random.
        kind: ``"forget"`` or ``"remember"``.
        samples: how many the request names.
        retained: how many others the memory then holds.
        ridge: a total.
        departure_requested: on F.
        departure_retained: on the probe; None where the data source has none of it.
        residual: of the normal equations.
        limit: of the residual, above which the solve is not trusted.
        moved: whether earlier requests have moved the parameters away from the anchor.
        before: SHA-256 of the tuned parameters' names and values before the request.
        after: the same after it.
        salt: of the hashes. It is in the certificate that the caller gets and nowhere in the memory's folder.
        hashes: HMAC-SHA-256 of each id under the salt: who has both can show that an id was in the request.
        error: to a full re-solve, or None.
        audit: of the memory, the latest one since it was linearised, or None.
        doubt: the points within which a retrained model's accuracy on F should lie of the answer's, by the audit
            (``Audit.doubt``). It is in no ledger: of a single sample it says how surely it is classified. None
            without an audit, and where nothing was forgotten.
    """

    request: str
    kind: str
    samples: int
    retained: int
    ridge: float
    departure_requested: float
    departure_retained: float | None
    residual: float
    limit: float
    moved: bool
    before: str
    after: str
    salt: str
    hashes: Sequence[str]
    error: float | None = None
    audit: Audit | None = None
    doubt: float | None = None

    @property
    def limits(self) -> tuple[float, float]:
        """Of the departures, on F and on retained samples."""
        if not (self.audit and self.audit.passed):
            return LIMIT_REQUESTED, LIMIT_RETAINED
        requested, retained = self.audit.departures
        return max(LIMIT_REQUESTED, BEYOND * requested), max(LIMIT_RETAINED, BEYOND * retained)

    @property
    def verdict(self) -> str:
        """One of ``VERDICTS``.

        Trusted is an answer whose solve is exact, whose departures are within their limits, and whose memory has not
        failed an audit. After a failed audit retraining is needed. Otherwise, if earlier requests have moved the
        parameters, a refresh linearises the network anew where they are now; if not, this request alone is too much
        for a linear prediction.
        """
        if not self.residual <= self.limit:
            return "refresh needed"
        if self.audit and not self.audit.passed:
            return "retrain needed"
        requested, retained = self.limits
        if self.departure_requested <= requested and (self.departure_retained or 0) <= retained:
            return "trusted"
        return "refresh needed" if self.moved else "retrain needed"

    @property
    def trusted(self) -> bool:
        """Whether the verdict is that."""
        return self.verdict == "trusted"

    @property
    def explanation(self) -> str:
        """The verdict with its reasons, in a sentence or two."""
        advice = {
            "trusted": "",
            "refresh needed": " Refresh the memory at the current weights, or retrain.",
            "retrain needed": " Retrain, or ask for fewer samples with a larger ridge.",
        }
        if self.audit and not self.audit.passed:
            passes = self.audit.gain > 1 and self.audit.with_gain.passed
            mended = " take the answer with the gain, which passes (export --gain)," if passes else ""
            advice["retrain needed"] = f" Retrain,{mended} or prepare with another ridge and audit again."
        audited = str(self.audit) if self.audit else "no audit has compared the memory's answers with retrained models"
        of_requested, of_retained = self.limits
        retained = "an unmeasured part" if self.departure_retained is None else f"{self.departure_retained:.0%}"
        return (
            f"{self.verdict}: the network departs from the linear prediction by {self.departure_requested:.0%} on the "
            f"samples of the request (limit {of_requested:.0%}) and {retained} on a probe of "
            f"retained ones (limit {of_retained:.0%}), in units of the change predicted for the former; the linear "
            f"solve is exact to {self.residual:.0e} (limit {self.limit:.0e}); {audited}.{self._doubt}"
            f"{advice[self.verdict]}"
        )

    @property
    def _doubt(self) -> str:
        if self.doubt is None:
            return ""
        known = "" if self.doubt <= LIMIT_DOUBT else ", which is too many to say how near it comes"
        return (
            f" On the samples of the request a retrained model's accuracy should lie within {self.doubt:.1f} points of "
            f"the answer's{known}."
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        made = {"hashes": list(self.hashes), "audit": self.audit.to_dict() if self.audit else None}
        return {**asdict(self), **made, "trusted": self.trusted, "verdict": self.verdict}

    def to_ledger(self) -> dict[str, Any]:
        """The same without the salt, as ids are often small numbers, which hashes with a known salt do not hide, and
        without what is said of the samples alone."""
        return {key: value for key, value in self.to_dict().items() if key not in ("salt", "doubt")}


@dataclass(frozen=True)
class Forgotten:
    """The answer to a request: the tuned parameters after it, the time it took, and how sure it is.

    ``model.load_state_dict(forgotten.parameters, strict=False)`` puts them into the model. ``seconds`` end when they
    are durable, if the memory is kept in a folder.
    """

    parameters: dict[str, Tensor]
    seconds: float
    certificate: Certificate


def hashed(ids: Iterable[Id], salt: str) -> list[str]:
    """HMAC-SHA-256 of each id under ``salt`` (hexadecimal)."""
    return [hmac.new(bytes.fromhex(salt), str(each).encode(), hashlib.sha256).hexdigest() for each in ids]


def new_salt() -> str:
    """128 random bits."""
    return secrets.token_hex(16)


def logits_around(
    linearised: Linearised, positions: Sequence[int], before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> tuple[Float[Tensor, "samples classes"], Float[Tensor, "samples classes"], Int[Tensor, " samples"]]:
    """The logits of at least one sample before and after a change of the parameters, and the labels; one reading."""
    old, new = (at(linearised.jacobian.model, parameters) for parameters in (before, after))
    parts = []
    with torch.no_grad():
        for images, labels in linearised.images(positions):
            x = images.to(linearised.device)
            parts.append((old(x), new(x), labels))
    logits_before, logits_after, all_labels = (torch.cat(each) for each in zip(*parts, strict=True))
    return logits_before, logits_after, all_labels


class Observed(NamedTuple):
    """Fields of a ``Certificate`` that a forward pass gives."""

    departure_requested: float
    departure_retained: float | None
    doubt: float | None


def observed(
    linearised: Linearised,
    change: Float[Tensor, " p"],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    requested: Sequence[int],
    probe: Sequence[int],
    predicted: Float[Tensor, "requested classes"] | None = None,
    audit: Audit | None = None,
) -> Observed:
    """How far the network departs from ``J change`` on the samples of a request, and on a probe, and the audit's doubt
    of the former; see ``Certificate``.

    Both departures are 0 where no change is predicted on the request's samples (``predicted``, if it is known already);
    the second is None for an empty probe, the doubt without an audit or samples.
    """
    nothing = Observed(0.0, 0.0 if probe else None, None)
    if not requested:
        return nothing
    count = len(requested)
    old, new, labels = logits_around(linearised, [*requested, *probe], before, after)
    doubt = audit.doubt(new[:count].cpu(), labels[:count]) if audit else None
    predicted = linearised.tangent(requested, change) if predicted is None else predicted
    size = rms(predicted)
    if not size:
        return nothing._replace(doubt=doubt)
    error = new - old - torch.cat([predicted, linearised.tangent(probe, change)])
    return Observed(rms(error[:count]) / size, rms(error[count:]) / size if probe else None, doubt)


def rms(vectors: Float[Tensor, "samples classes"]) -> float:
    """The root mean square length; 0 for no vectors."""
    return float(vectors.square().sum(1).mean().sqrt()) if len(vectors) else 0.0
