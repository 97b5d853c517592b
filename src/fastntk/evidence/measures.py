"""What is measured of a model beside retrained ones. A new measure is one function and one line in ``_OWN``,
or another package's entry point in ``fastntk.metrics``.

Reports, tables, pages and summaries iterate over ``MEASURES``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import mean
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from fastntk.common.plugins import Registry
from fastntk.evidence.methods import Problem
from fastntk.evidence.metrics import (
    accuracy,
    agreement,
    average_gap,
    kl_divergence,
    logit_distance,
    modified_entropy,
    probability_distance,
    taken_for_members,
    tug_of_war,
)
from fastntk.evidence.recovery import barrier, head_recovery, moved, relearn_steps, relearned_without
from fastntk.memory.audit import Audit

PARTS = ("retain", "forget", "test")
"""The sets of samples: those that stay, those that go, and those that no model was fitted to."""


@dataclass(frozen=True)
class Subject:
    """A model that is measured, and what is known of it.

    Attributes:
        logits: on each of ``PARTS``.
        labels: of each.
        retrained: the models retrained without the forgotten samples, but for this one, or None.
        pairs: every two of them, this one included if it is one; or None.
        seconds: that the model took to make, or None.
        bytes: that its method took at most, or None.
        problem: the request, or None.
        parameters: the model's tuned ones, or None.
        audit: of the memory that answered, or None.
    """

    logits: Mapping[str, Float[Tensor, "samples classes"]]
    labels: Mapping[str, Int[Tensor, " samples"]]
    retrained: "Sequence[Subject] | None" = None
    pairs: "Sequence[tuple[Subject, Subject]] | None" = None
    seconds: float | None = None
    bytes: int | None = None
    problem: Problem | None = None
    parameters: Mapping[str, Tensor] | None = None
    audit: Audit | None = None

    @property
    def forgotten(self) -> Int[Tensor, " samples"] | None:
        """The labels of the samples that go, or None if there is none to be looked at."""
        return self.labels["forget"] if len(self.labels["forget"]) else None


@dataclass(frozen=True)
class Measure:
    """A number of a subject.

    Attributes:
        heading: of its column.
        of: the number; None where it cannot be told.
        meaning: in a few words, for who reads the column.
        better: ``more``, ``less``, or as ``near`` the retrained models' as can be.
        needs: the subject's attributes without which it is None.
        decimals: that are shown.
        place: where its column is shown: on the ``terminal`` and on pages, on ``pages``, or nowhere by itself.
        costly: whether it takes long, so that it is measured only where that is asked for.
    """

    heading: str
    of: Callable[[Subject], float | None]
    meaning: str
    better: Literal["more", "less", "near"]
    needs: tuple[str, ...] = ()
    decimals: int = 2
    place: Literal["terminal", "pages", "nowhere"] = "pages"
    costly: bool = False

    def __call__(self, subject: Subject) -> float | None:
        """The number, or None where something that it needs is not known, or where it is not finite."""
        value = None if any(getattr(subject, need) is None for need in self.needs) else self.of(subject)
        return value if value is None or isfinite(value) else None

    def text(self, value: float | None) -> str:
        """The number as it is shown."""
        return "–" if value is None else f"{value:.{self.decimals}f}"


def measured_by_all(subject: Subject, thoroughly: bool = False) -> dict[str, float | None]:
    """All measures of a subject, by name; the costly ones are None unless it is to be measured ``thoroughly``."""
    return {name: measure(subject) if thoroughly or not measure.costly else None for name, measure in MEASURES.items()}


def shown(*places: str) -> dict[str, Measure]:
    """The measures that have a column in one of the places, by name."""
    return {name: measure for name, measure in MEASURES.items() if measure.place in places}


def _accuracy_on(part: str) -> Callable[[Subject], float]:
    return lambda subject: accuracy(subject.logits[part], subject.labels[part])


def _membership(subject: Subject) -> float | None:
    entropy = {part: modified_entropy(subject.logits[part], subject.labels[part]) for part in PARTS}
    if not all(each.isfinite().all() for each in entropy.values()):
        return None
    return taken_for_members(entropy["forget"], entropy["retain"], entropy["test"])


def _to_retrained(of: Callable[[Tensor, Tensor], float], part: str = "forget") -> Callable[[Subject], float]:
    """The mean over the retrained models of a number of their logits and the subject's."""
    return lambda subject: mean(of(each.logits[part], subject.logits[part]) for each in subject.retrained or ())


def _ratio(of: Callable[[Tensor, Tensor], float]) -> Callable[[Subject], float | None]:
    """The mean distance to the retrained models over the mean of their pairs."""
    distance = _to_retrained(of)

    def measure(subject: Subject) -> float | None:
        floor = mean(of(one.logits["forget"], other.logits["forget"]) for one, other in subject.pairs or ())
        return distance(subject) / floor if floor else None

    return measure


def _beside_retrained(
    of: Callable[[dict[str, float], dict[str, float]], float], *names: str
) -> Callable[[Subject], float]:
    """The mean over the retrained models of a number of several measures of the subject and of them."""

    def numbers(subject: Subject) -> dict[str, float]:
        return {name: MEASURES[name](subject) or 0.0 for name in names}

    return lambda subject: mean(of(numbers(subject), numbers(each)) for each in subject.retrained or ())


def _of_request(of: Callable[[Problem, Mapping[str, Tensor]], float | None]) -> Callable[[Subject], float | None]:
    """A number of the request and the subject's parameters."""
    return lambda subject: of(subject.problem, subject.parameters) if subject.problem and subject.parameters else None


def _moved(subject: Subject) -> float | None:
    problem, models = subject.problem, [each.parameters for each in subject.retrained or ()]
    if problem is None or subject.parameters is None or None in models:
        return None
    distance = mean(moved(problem, parameters) for parameters in models if parameters is not None)
    return moved(problem, subject.parameters) / distance if distance else None


def _doubt(subject: Subject) -> float | None:
    return subject.audit.doubt(subject.logits["forget"], subject.labels["forget"]) if subject.audit else None


_ACCURACIES = tuple(f"{part}_accuracy" for part in PARTS)
_COMPARED, _FORGOTTEN = ("retrained",), ("forgotten",)
_ON_FORGOTTEN = *_COMPARED, *_FORGOTTEN
_WITH_FLOOR, _ASKED = (*_ON_FORGOTTEN, "pairs"), ("problem", "parameters", "forgotten")

_OWN: dict[str, Measure] = {
    "retain_accuracy": Measure(
        "retain %", _accuracy_on("retain"), "accuracy on the retained images", "near", decimals=1, place="terminal"
    ),
    "forget_accuracy": Measure(
        "forget %", _accuracy_on("forget"), "accuracy on the forgotten images", "near", _FORGOTTEN, decimals=1,
        place="terminal",
    ),
    "test_accuracy": Measure(
        "test %", _accuracy_on("test"), "accuracy on the test images", "near", decimals=1, place="terminal"
    ),
    "forget_distance": Measure(
        "d forget",
        _to_retrained(logit_distance),
        "root mean square logit distance to a retrained model on the forgotten images, mean over them",
        "less",
        _ON_FORGOTTEN,
        place="terminal",
    ),
    "test_distance": Measure(
        "d test", _to_retrained(logit_distance, "test"), "the same on the test images", "less", _COMPARED,
        place="terminal",
    ),
    "distance_ratio": Measure(
        "ratio",
        _ratio(logit_distance),
        "d forget over the mean distance of two retrained models",
        "less",
        _WITH_FLOOR,
        place="terminal",
    ),
    "probability_ratio": Measure(
        "ratio p",
        _ratio(probability_distance),
        "the same with distances of probabilities, to be read where the loss is cross-entropy",
        "less",
        _WITH_FLOOR,
        place="terminal",
    ),
    "membership": Measure(
        "member %",
        _membership,
        "the share of the forgotten images that a membership attack takes for training images",
        "near",
        _FORGOTTEN,
        decimals=1,
        place="terminal",
    ),
    "average_gap": Measure(
        "gap",
        _beside_retrained(average_gap, *_ACCURACIES, "membership"),
        "the mean difference of the accuracies and of member to a retrained model's, in points, mean over them",
        "less",
        _ON_FORGOTTEN,
    ),
    "tug_of_war": Measure(
        "ToW", _beside_retrained(tug_of_war, *_ACCURACIES), "the tug of war of the accuracies, 1 at best", "more",
        _ON_FORGOTTEN,
    ),
    "forget_kl": Measure(
        "KL", _to_retrained(kl_divergence), "divergence of predictions on the forgotten images, in nats", "less",
        _ON_FORGOTTEN,
    ),
    "forget_agreement": Measure(
        "agree %", _to_retrained(agreement), "the share of forgotten images put into the same class", "more",
        _ON_FORGOTTEN,
        decimals=1,
    ),
    "relearn_steps": Measure(
        "relearn",
        _of_request(relearn_steps),
        "steps on the forgotten images alone until they are classified as before (–: not within 30)",
        "near",
        _ASKED,
    ),
    "head_recovery": Measure(
        "refit %",
        _of_request(head_recovery),
        "accuracy on half of the forgotten images of a new head fitted to the other half and retained images",
        "near",
        _ASKED,
        decimals=1,
    ),
    "relearned_without": Measure(
        "relearn R %",
        _of_request(relearned_without),
        "accuracy on the forgotten images that training on the retained ones alone gives back",
        "near",
        _ASKED,
        decimals=1,
        costly=True,
    ),
    "barrier": Measure(
        "barrier",
        _of_request(barrier),
        "the loss barrier on the line from the original, on retained images",
        "near",
        ("problem", "parameters"),
        decimals=3,
        costly=True,
    ),
    "moved": Measure(
        "moved",
        _moved,
        "how far the tuned parameters are from the original's, over the retrained models' mean",
        "near",
        ("problem", "parameters", "retrained"),
    ),
    "seconds": Measure(
        "seconds",
        lambda subject: subject.seconds,
        "training for the original and the retrained models; from a prepared memory for the others",
        "less",
        place="terminal",
    ),
    "peak_megabytes": Measure(
        "MB", lambda subject: (subject.bytes or 0) / 1e6, "the memory that it took at most", "less", ("bytes",)
    ),
    "doubt": Measure(
        "doubt",
        _doubt,
        "points within which a retrained model's accuracy on the forgotten images should lie, by the audit",
        "less",
        ("audit", "forgotten"),
        decimals=1,
        place="nowhere",
    ),
}  # fmt: skip

MEASURES: Registry[Measure] = Registry(
    "metrics", _OWN, lambda made: isinstance(made, Measure), "a fastntk.evidence.measures.Measure"
)
"""By name, in the order of their columns."""

RATIOS = {"logits": "distance_ratio", "probabilities": "probability_ratio"}
"""The measure that is the ratio in a unit."""
