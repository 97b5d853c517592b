"""One of everything that a package can add to fastntk: a selector, a method, a metric, a loss, data, and a rule."""

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from fastntk.methods import Problem, Unlearned
from fastntk.metrics import label_probability
from PIL import Image
from torch import Tensor, nn

from fastntk import InputError, Preprocessing
from fastntk.evidence.measures import Measure, Subject
from fastntk.inputs.images import Images
from fastntk.jacobians.rules.calls import PerSample, Rule
from fastntk.tuning.loss import Kept, Labels, Loss, shares
from fastntk.tuning.selectors import Selector


def _first_names(model: nn.Module, argument: str) -> list[str]:
    """The first modules that have parameters of their own, so many."""
    if not argument.isdecimal():
        raise InputError(f"'first' takes a whole number after its colon, not {argument!r}.")
    own = [name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
    chosen = set(own[: int(argument)])
    return [name for name, _ in model.named_parameters() if name.rpartition(".")[0] in chosen]


FIRST = Selector("the first layers, so many", _first_names, argument="1")


@dataclass(frozen=True)
class Shrink:
    """``theta_0 + (1 - share) (theta* - theta_0)``: back some of the way to before the fit, for all samples alike.

    Attributes:
        share: of the way.
    """

    prepared: ClassVar[bool] = True  # it asks the memory where the fit started
    share: float = 0.5

    def __call__(self, problem: Problem) -> Unlearned:
        """Answer the request, whatever it asks for."""
        anchor = problem.memory.anchor
        return Unlearned({name: anchor[name].lerp(start, self.share) for name, start in problem.initial.items()})


def _sure(subject: Subject) -> float:
    return 100 * label_probability(subject.logits["forget"], subject.labels["forget"])


SURE_OF_FORGOTTEN = Measure(
    "sure",
    _sure,
    "the mean probability of the forgotten images' labels, in percent",
    "near",
    ("forgotten",),
    decimals=1,
)


@dataclass(frozen=True)
class Sigmoid(Loss):
    """``sum_c log(1 + exp f_c) - t_c f_c``, every class for itself: ``r = t - s``, ``H = diag(s (1 - s))`` with s the
    sigmoid of f."""

    name: str = field(default="sigmoid", init=False)
    curved: ClassVar[bool] = True
    contrasted: ClassVar[bool] = False  # adding a number to all logits changes it
    unit: ClassVar[str] = "probabilities"

    def targets(self, labels: Labels, classes: int) -> Tensor:
        """1 for a sample's class, 0 for the others."""
        return shares(labels, classes)

    def residual(self, logits: Tensor, labels: Labels) -> Tensor:
        """``t - s``."""
        return self.targets(labels, logits.shape[1]).to(logits) - logits.sigmoid()

    def curve(self, vectors: Tensor, logits: Tensor, labels: Labels) -> Tensor:
        """``s (1 - s) v``."""
        return _curvature(logits) * vectors

    def root(self, logits: Tensor) -> Tensor:
        """``diag(sqrt(s (1 - s)))``."""
        return _curvature(logits).sqrt().diag_embed()

    def whitened(self, vectors: Tensor, logits: Tensor) -> Tensor:
        """``v / sqrt(s (1 - s))``."""
        return vectors / _curvature(logits).sqrt()

    def value_of(self, z: Tensor, kept: Kept) -> Tensor:
        """Of the classes that are kept."""
        return (F.softplus(z) - kept.targets * z).sum(1)

    def gradient_of(self, z: Tensor, kept: Kept) -> Tensor:
        """``s - t``."""
        return z.sigmoid() - kept.targets

    def root_of(self, z: Tensor, kept: Kept) -> Tensor:
        """As ``root``."""
        return self.root(z)

    def __call__(self, logits: Tensor, labels: Labels) -> Tensor:
        """The mean over a batch."""
        targets = self.targets(labels, logits.shape[1]).to(logits)
        return (F.softplus(logits) - targets * logits).sum(1).mean()


def _curvature(logits: Tensor) -> Tensor:
    s = logits.sigmoid()
    return (s * (1 - s)).clamp_min(torch.finfo(s.dtype).tiny)


def read_table(source: str, preprocessing: Preprocessing, split: str) -> Images:
    """``--data table:FILE.csv``: rows with a path, beside the file, a label, and, if there are splits, a split."""
    place = Path(source)
    try:
        with place.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("split", split) == split]
        classes = sorted({row["label"] for row in rows})
        labels, ids = [classes.index(row["label"]) for row in rows], [row["path"] for row in rows]
    except (OSError, KeyError) as error:
        raise InputError(f"{source} is no table with the columns path and label ({error}).") from error
    if not rows:
        raise InputError(f"{source} has no image of the split {split!r}.")
    return Images(_Files([place.parent / each for each in ids]), labels, classes, preprocessing, ids)


class _Files:
    """Images, each opened when it is asked for."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __getitem__(self, index: int) -> Image.Image:
        return Image.open(self.paths[index]).convert("RGB")


def _rms_norm(
    copies: PerSample,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    if weight is None or input.ndim <= len(normalized_shape) or not copies.fits(input, weight):
        return F.rms_norm(input, normalized_shape, weight, eps)
    own = copies.copied(weight)
    between = [1] * (input.ndim - 1 - len(normalized_shape))
    return F.rms_norm(input, normalized_shape, None, eps) * own.reshape(len(input), *between, *normalized_shape)


RMS_NORM = Rule(F.rms_norm, _rms_norm)
