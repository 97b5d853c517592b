"""What is known of one request: what is exact, how far the network did as the linear prediction said, and how near
retrained models the memory's answers come."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, cast

from torch import Tensor

from fastntk.common.errors import InputError
from fastntk.memory.audit import LIMIT_DOUBT, Audit

LIMIT_REQUESTED, LIMIT_RETAINED = 0.5, 0.15
"""The departures, on the samples of the request and on retained ones, up to which an answer is trusted. They were
chosen on the models of docs/benchmarks.md: good answers stay below both, ridges that harm other classes exceed the
second. An audit that passed has seen a good answer at certain departures: up to ``BEYOND`` times these, answers of its
memory are trusted as well."""

BEYOND = 1.25
"""Departures differ by so much between requests of the same kind."""

LIMIT_STILL = 5.0
"""Percent of the samples of a class that no member is left of which may still be classified as it: a model that never
saw the class has none."""

_OF_SAMPLES = "salt", "doubt", "still", "copies", "lost"
"""What a certificate says that is in no ledger."""

LEFT = 1e-6
"""Of the ridge: the norm of the gradient that is left which noise for certified removal is drawn for."""

HEAD_NEEDED = "exact head needed"

_FIRST = "before a first request is answered"

VERDICTS = "exact", "trusted", HEAD_NEEDED, "refresh needed", "retrain needed"
"""Of a certificate; see ``Certificate.verdict``."""


class Removal(NamedTuple):
    """What certified removal is asked for: ``P[A] <= e^eps P'[A] + delta`` for every set A of weights, and likewise the
    other way round."""

    eps: float
    delta: float

    def check(self) -> None:
        """Raises ``InputError`` if no noise is known to be enough: the theorem's is, up to an eps of 1."""
        if not (0 < self.eps <= 1 and 0 < self.delta < 1):
            raise InputError(
                "certified removal needs eps above 0 and at most 1, and delta between 0 and 1, not "
                f"{self.eps} and {self.delta}."
            )


def gradient_allowed(ridge: float) -> float:
    """Of the gradient, by noise for certified removal."""
    return LEFT * ridge


@dataclass(frozen=True)
class Certificate:
    """What is known of one request.

    The step is exact for the network linearised at the anchor, with its loss (in the convex form, else with the squared
    one, and of another the quadratic approximation there) and the given ridge: since the anchor it is what training it
    on the samples that are then in the memory differs by from training it on all. ``inexactness`` is the relative
    residual of the normal equations, ``|(G + ridge I) s - (b - ridge u)| / |b - ridge u|`` (primal; the dual's own in
    the dual form), and ``error``, where it was asked for, is the relative distance of the step ``s(R)`` to that of
    solving anew.

    For the network itself the agreement is measured: ``departure = rms_S |g(f(theta_new)) - g(f(theta_old) + J
    (theta_new - theta_old))| / rms_F |g(f(theta_old) + J (theta_new - theta_old)) - g(f(theta_old))|`` with S the
    samples F of the request, or witnesses, a few of the retained, and with g the identity for squared loss and the
    softmax for cross-entropy; 0 is perfect agreement. It is in both cases a share of the change that was predicted on
    F.

    Attributes:
        request: its id, random.
        kind: ``"forget"`` or ``"remember"``.
        samples: how many the request names.
        retained: how many others the memory then holds.
        ridge: a total.
        departure_requested: on F; None where none of its images is there any more.
        departure_retained: on the witnesses; None where the data source has none of it.
        inexactness: of the solve.
        limit: of the inexactness, above which the solve is not trusted.
        moved: whether earlier requests have moved the parameters away from the anchor.
        before: SHA-256 of the tuned parameters' names and values before the request.
        after: the same after it.
        salt: of the hashes. It is in the certificate that the caller gets and nowhere in the memory's folder.
        hashes: HMAC-SHA-256 of each id under the salt: who has both can show that an id was in the request.
        error: to a full re-solve, or None.
        audit: of the memory, the latest one since it was linearised, or None.
        unit: what departures are of: ``"logits"`` or ``"probabilities"``.
        tail: ``sum |t - p|`` of a sample over the classes that the solution keeps no rows of (``State.tail``).
        has_head: whether the answer can be finished with an exact head.
        still: the percentage of the samples of classes that no member is left of which the answer still classifies as
            these; None where the data do not offer all labels, which the verdict takes for none. It is in no ledger.
        doubt: the points within which a retrained model's accuracy on F should lie of the answer's, by the audit
            (``Audit.doubt``). It is in no ledger: of a single sample it says how surely it is classified. None
            without an audit, and where nothing was forgotten.
        copies: how many of the samples that stay have the very pixels of one that was forgotten; None where nothing
            was, and where a memory was prepared before that was kept. It is in no ledger: beside the folder it would
            tell something of an image that is gone.
        lost: how many samples of F the data source has no image of any more: nothing is measured on these. It is in no
            ledger.
        exact: whether the weights are those of the same procedure on what stays (``fastntk.memory.exact``).
        gradient: in an exact fit, the norm of what is left of the objective's gradient. The parameters are within that
            over the ridge of the optimum, in norm, since the objective is convex beyond the ridge. Else None.
        removal: the (eps, delta) that the fit's noise was drawn for (``fastntk.fit_exact``); None without noise.
        allowed: of the gradient, by that noise.
        form: of the memory.
        approximation: what stands in place of the loss's optimum over the rows as they are, or nothing: one step over
            the generalised Gauss-Newton matrix, or rows that are rounded.
    """

    request: str
    kind: str
    samples: int
    retained: int
    ridge: float
    departure_requested: float | None
    departure_retained: float | None
    inexactness: float
    limit: float
    moved: bool
    before: str
    after: str
    salt: str
    hashes: Sequence[str]
    error: float | None = None
    audit: Audit | None = None
    unit: str = "logits"
    tail: float = 0.0
    has_head: bool = False
    still: float | None = None
    doubt: float | None = None
    copies: int | None = None
    lost: int = 0
    exact: bool = False
    gradient: float | None = None
    removal: Removal | None = None
    allowed: float | None = None
    form: str = ""
    approximation: str = ""

    @property
    def certified(self) -> bool:
        """Whether this is a certified removal: there is noise, and no more of the gradient is left than it is for."""
        known = self.kind == "forget" and self.gradient is not None and self.allowed is not None
        return known and cast(float, self.gradient) <= cast(float, self.allowed)

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

        Trusted is an answer whose solve is exact, whose departures are within their limits, that leaves nothing of a
        class which is gone, and whose memory has not failed an audit. What is left of a class alone takes an exact head
        (``fastntk.exact_head``), if the memory has one. After a failed audit retraining is needed. Otherwise, if
        earlier requests have moved the parameters, a refresh linearises the network anew where they are now; if not,
        this request alone is too much for a linear prediction.
        """
        if self.exact:
            return "exact" if self.inexactness <= self.limit else "retrain needed"
        if not self.inexactness <= self.limit:
            return "refresh needed"
        if self.audit and not self.audit.passed:
            return "retrain needed"
        requested, retained = self.limits
        known = math.inf if self.departure_requested is None else self.departure_requested
        if known <= requested and (self.departure_retained or 0) <= retained:
            if (self.still or 0) <= LIMIT_STILL:
                return "trusted"
            if self.has_head:
                return HEAD_NEEDED
        return "refresh needed" if self.moved else "retrain needed"

    @property
    def trusted(self) -> bool:
        """Whether the verdict is that."""
        return self.verdict in ("exact", "trusted")

    @property
    def explanation(self) -> str:
        """The verdict with its reasons, in a sentence or two."""
        if self.exact:
            return self._exactly
        advice = {
            "trusted": "",
            HEAD_NEEDED: " Finish the answer with an exact head (export --exact-head), or retrain.",
            "refresh needed": " Refresh the memory at the current weights, or retrain.",
            "retrain needed": f" Retrain, ask for fewer samples, or, {_FIRST}, prepare with a larger ridge.",
        }
        if self.audit and not self.audit.passed:
            passes = self.audit.gain > 1 and self.audit.with_gain.passed
            mended = " take the answer with the gain, which passes (export --gain)," if passes else ""
            advice["retrain needed"] = f" Retrain,{mended} or, {_FIRST}, prepare with another ridge and audit again."
        audited = str(self.audit) if self.audit else "no audit has compared the memory's answers with retrained models"
        of_requested, of_retained = self.limits
        requested, retained = (
            "an unmeasured part" if each is None else f"{each:.0%}"
            for each in (self.departure_requested, self.departure_retained)
        )
        gone = ""
        if self.lost:
            gone = f" (of {self.lost:,} the image is gone: an audit alone says what the answer is worth on these)"
        return (
            f"{self.verdict}: the network departs from the linear prediction by {requested} on the samples of the "
            f"request{gone} (limit {of_requested:.0%}) and {retained} on witnesses among the retained ones "
            f"(limit {of_retained:.0%}), in {self.unit}, as a share of the change predicted for the former; the linear "
            f"solve is exact to {self.inexactness:.0e} of its gradient over all {self.retained:,} others (limit "
            f"{self.limit:.0e}){self._left}; {audited}.{self._doubt}"
            f"{advice[self.verdict]}"
        )

    @property
    def _exactly(self) -> str:
        left, away = self.gradient or 0.0, (self.gradient or 0.0) / self.ridge
        now = self.retained if self.kind == "forget" else self.retained + self.samples
        return (
            f"{self.verdict}: the weights are those that the same fit gives on the {now:,} samples that there are "
            f"now, by construction and not by a measurement. Of the gradient {left:.1e} is left, so they are within "
            f"{away:.1e} of that optimum, in the norm of all tuned parameters (the solve is exact to "
            f"{self.inexactness:.0e}, limit {self.limit:.0e}){self._left}.{self._removed}"
        )

    @property
    def _removed(self) -> str:
        if self.removal is None or self.kind != "forget":
            return ""
        asked = f"({self.removal.eps:g}, {self.removal.delta:g})-certified removal"
        if self.certified:
            return f" By the noise in the objective it is an {asked}: at most {self.allowed:.1e} was to be left."
        return f" It is no {asked}, for which at most {self.allowed:.1e} was to be left. Fit with a larger ridge."

    @property
    def _left(self) -> str:
        """What the solve is no optimum of, what is known of classes that are left out, and of one that is gone."""
        apart = f"{100 * self.tail:.1f} points a sample"
        out = f", by {self.approximation}" if self.approximation else ""
        out += f", without classes whose probabilities and targets differ by {apart} in sum" if self.tail else ""
        if self.still is None and self.kind == "forget":
            return f"{out}; whether a class is left without samples is not known, as the data do not offer all labels"
        if not self.still:
            return out
        return (
            f"{out}; of the samples of a class that nobody is left of, {self.still:.0f} % are still taken for it "
            f"(limit {LIMIT_STILL:.0f} %, retrained models have none)"
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
        made["removal"] = {**self.removal._asdict(), "certified": self.certified} if self.removal else None
        return {**asdict(self), **made, "trusted": self.trusted, "verdict": self.verdict}

    def to_ledger(self) -> dict[str, Any]:
        """The same without the salt, as ids are often small numbers, which hashes with a known salt do not hide, and
        without what is said of the samples alone."""
        return {key: value for key, value in self.to_dict().items() if key not in _OF_SAMPLES}


@dataclass(frozen=True)
class Answer:
    """The answer to a request: the tuned parameters after it, the time it took, and how sure it is.

    ``model.load_state_dict(answer.parameters, strict=False)`` puts them into the model. ``seconds`` end when they
    are durable, if the memory is kept in a folder.
    """

    parameters: dict[str, Tensor]
    seconds: float
    certificate: Certificate
