"""The losses that there are: squared and cross-entropy, and those of other packages."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fastntk.common.errors import InputError
from fastntk.common.plugins import Registry
from fastntk.tuning.loss import Kept, Labels, Loss, contrasts, shares


def _numbers(what: str, given: Iterable[Any]) -> tuple[float, ...]:
    """Numbers of any kind as Python's own. Raises ``InputError`` for what is none."""
    try:
        return tuple(float(each) for each in given)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} must be numbers, not {given!r}.") from error


@dataclass(frozen=True)
class SquaredLoss(Loss):
    """Squared loss on centred, scaled targets: ``1/2 |f(x) - t|^2`` per sample.

    ``t = scale * (q - 1/C)`` with q the label, ``onehot(y)`` or a soft one. The Gauss-Newton matrix of this loss is
    ``sum J'J``, which is what makes one unlearning step enough; see docs/how-it-works.md. ``scale`` is in logits. A
    scale of 1 trains badly with Adam's usual learning rates (58 % against 88 % on CIFAR-10); 10
    tests as well as cross-entropy.
    """

    curved: ClassVar[bool] = False  # its Hessian is the identity
    contrasted: ClassVar[bool] = False
    unit: ClassVar[str] = "logits"
    scale: float = 10.0
    name: str = field(default="squared", init=False)

    def __post_init__(self) -> None:
        [scale] = _numbers("the scale of squared loss", [self.scale])
        if not 0 < scale < float("inf"):
            raise InputError(f"the scale of squared loss must be a positive number, not {scale}.")
        object.__setattr__(self, "scale", scale)

    def targets(self, labels: Labels, classes: int) -> Float[Tensor, "batch classes"]:
        """The target logits ``t_i`` of samples with the given labels. Raises like ``shares``."""
        return self.scale * (shares(labels, classes) - 1 / classes)

    def residual(self, logits: Float[Tensor, "batch classes"], labels: Labels) -> Float[Tensor, "batch classes"]:
        """``r_i = t_i - f(x_i)``, the negative gradient of the loss with respect to the logits."""
        return self.targets(labels, logits.shape[1]).to(logits) - logits

    def root(self, logits: Float[Tensor, "batch classes"]) -> None:
        """L is the identity."""

    def curve(
        self, vectors: Float[Tensor, "batch classes"], logits: Float[Tensor, "batch classes"], labels: Labels
    ) -> Float[Tensor, "batch classes"]:
        """``H_i v_i``: themselves."""
        return vectors

    def value_of(self, z: Float[Tensor, "samples outputs"], kept: Kept) -> Float[Tensor, " samples"]:
        """``1/2 |z - t|^2`` of the logits that are kept."""
        return (z - kept.targets).square().sum(1) / 2

    def gradient_of(self, z: Float[Tensor, "samples outputs"], kept: Kept) -> Float[Tensor, "samples outputs"]:
        """``z - t``."""
        return z - kept.targets

    def root_of(self, z: Float[Tensor, "samples outputs"], kept: Kept) -> Float[Tensor, "samples outputs outputs"]:
        """The identity."""
        return torch.eye(z.shape[1]).to(z).expand(len(z), -1, -1)

    def whitened(
        self, vectors: Float[Tensor, "batch classes"], logits: Float[Tensor, "batch classes"]
    ) -> Float[Tensor, "batch classes"]:
        """``L^+ v_i``: themselves."""
        return vectors

    def __call__(self, logits: Float[Tensor, "batch classes"], labels: Labels) -> Float[Tensor, ""]:
        """The mean over the batch of ``1/2 |f(x_i) - t_i|^2``."""
        return self.residual(logits, labels).square().sum(1).mean() / 2


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """``-sum_c t_c log p_c`` per sample, with ``p = softmax(f(x))``: ``r = t - T p``, ``H = T (diag(p) - pp')``.

    ``t_c = w_c ((1 - smoothing) q_c + smoothing / C)`` with q the label, ``onehot(y)`` or a soft one, and T the sum of
    t: what ``torch.nn.functional.cross_entropy`` has, but for the mean, which is over samples and not over weights.
    ``H = L L'`` with ``L = sqrt(T) (I - p 1') diag(sqrt(p))``. One Gauss-Newton step of it goes less far than one of
    squared loss: where the fit is sure of itself, H all but vanishes. The convex form of a memory
    (``fastntk.solve.convex``) solves it whole.

    Attributes:
        smoothing: of the labels.
        weights: w, one a class; empty for 1 each.

    Raises:
        InputError: the smoothing is not at least 0 and below 1, or a weight is not positive.
    """

    curved: ClassVar[bool] = True
    contrasted: ClassVar[bool] = True
    unit: ClassVar[str] = "probabilities"
    smoothing: float = 0.0
    weights: Sequence[float] = ()
    name: str = field(default="cross-entropy", init=False)

    @property
    def weighted(self) -> bool:
        """Whether classes have weights."""
        return bool(self.weights)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", _numbers("the weights of classes", self.weights))
        object.__setattr__(self, "smoothing", *_numbers("label smoothing", [self.smoothing]))
        if not 0 <= self.smoothing < 1:
            raise InputError(f"label smoothing must be at least 0 and below 1, not {self.smoothing}.")
        if not all(0 < weight < float("inf") for weight in self.weights):
            raise InputError(f"the weights of classes must be positive numbers, not {self.weights}.")

    def targets(self, labels: Labels, classes: int) -> Float[Tensor, "batch classes"]:
        """``t_i`` of samples with the given labels.

        Raises:
            InputError: like ``shares``, or there are not as many weights as classes.
        """
        smoothed = (1 - self.smoothing) * shares(labels, classes) + self.smoothing / classes
        if not self.weights:
            return smoothed
        if len(self.weights) != classes:
            raise InputError(f"the loss has {len(self.weights)} weights, and the model {classes} classes.")
        return smoothed * torch.tensor(self.weights).to(smoothed)

    def residual(self, logits: Float[Tensor, "batch classes"], labels: Labels) -> Float[Tensor, "batch classes"]:
        """``r_i = t_i - T_i p_i``, the negative gradient of the loss with respect to the logits."""
        targets = self.targets(labels, logits.shape[1]).to(logits)
        return targets - targets.sum(1, keepdim=True) * logits.softmax(1)

    def curve(
        self, vectors: Float[Tensor, "batch classes"], logits: Float[Tensor, "batch classes"], labels: Labels
    ) -> Float[Tensor, "batch classes"]:
        """``H_i v_i``."""
        p, totals = logits.softmax(1), self.targets(labels, logits.shape[1]).to(logits).sum(1, keepdim=True)
        weighed = p * vectors
        return totals * (weighed - p * weighed.sum(1, keepdim=True))

    def value_of(self, y: Float[Tensor, "samples outputs"], kept: Kept) -> Float[Tensor, " samples"]:
        """``T logsumexp(z, tail) - t'z``, which is the loss up to a number that does not depend on y."""
        z = kept.logits(y)
        return kept.total * _with_tail(z, kept) - (kept.targets * z).sum(1)

    def gradient_of(self, y: Float[Tensor, "samples outputs"], kept: Kept) -> Float[Tensor, "samples outputs"]:
        """``V'(T p - t)`` with ``p = exp(z - logsumexp(z, tail))``."""
        slope = kept.total[:, None] * _probabilities(kept.logits(y), kept) - kept.targets
        return slope @ contrasts(slope.shape[1]).to(slope)

    def root_of(self, y: Float[Tensor, "samples outputs"], kept: Kept) -> Float[Tensor, "samples outputs outputs"]:
        """L with ``L L' = V'H V``: by the QR decomposition of ``H^1/2' V`` with
        ``H^1/2 = sqrt(T) (I - b p 1') diag(sqrt(p))`` and ``b = (1 - sqrt(1 - s)) / s`` where the kept p sum to s."""
        p = _probabilities(kept.logits(y), kept)
        s = p.sum(1).clamp(torch.finfo(p.dtype).tiny, 1)
        b = ((1 - (1 - s).clamp_min(0).sqrt()) / s)[:, None, None]
        root = (torch.eye(p.shape[1]).to(p) - b * p[:, :, None]) * p.sqrt()[:, None, :]
        upper = torch.linalg.qr(root.mT @ contrasts(p.shape[1]).to(p), mode="r").R
        return kept.total.sqrt()[:, None, None] * upper.mT

    def root(self, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes classes"]:
        """``L_i``, where every class weighs 1."""
        p = logits.softmax(1)
        return (torch.eye(p.shape[1]).to(p) - p[:, :, None]) * p.sqrt()[:, None, :]

    def whitened(
        self, vectors: Float[Tensor, "batch classes"], logits: Float[Tensor, "batch classes"]
    ) -> Float[Tensor, "batch classes"]:
        """``v_i / sqrt(p_i)``. ``L`` times it is ``v_i``, if that sums to 0, as a gradient does; and where ``v_i`` is
        ``L'z``, it is z, up to what is the same for every class."""
        return vectors * (-logits.log_softmax(1) / 2).exp()

    def __call__(self, logits: Float[Tensor, "batch classes"], labels: Labels) -> Float[Tensor, ""]:
        """The mean over the samples of the batch."""
        targets = self.targets(labels, logits.shape[1]).to(logits)
        return -(targets * logits.log_softmax(1)).sum(1).mean()


def _probabilities(z: Float[Tensor, "samples kept"], kept: Kept) -> Float[Tensor, "samples kept"]:
    return (z - _with_tail(z, kept)[:, None]).exp()


def _with_tail(z: Float[Tensor, "samples kept"], kept: Kept) -> Float[Tensor, " samples"]:
    """``logsumexp(z, tail)``: of all logits."""
    return torch.logaddexp(z.logsumexp(1), kept.tail)


LOSSES: Registry[type[Loss]] = Registry(
    "losses",
    {"squared": SquaredLoss, "cross-entropy": CrossEntropy},
    lambda made: isinstance(made, type) and issubclass(made, Loss) and is_dataclass(made),
    "a dataclass and fastntk.tuning.loss.Loss",
)
"""By name."""


def loss_from(record: Mapping[str, Any]) -> Loss:
    """The reverse of ``dataclasses.asdict``, also by way of JSON. Raises ``InputError`` for an unknown loss."""
    kind = type(loss_named(record["name"]))
    return kind(**{each.name: record[each.name] for each in fields(kind) if each.init})


_NAME = "loss"


def loss_numbers(loss: Loss) -> dict[str, Tensor]:
    """A loss as tensors by name: its own, in bytes, and its fields."""
    own = {each.name: getattr(loss, each.name) for each in fields(loss) if each.init}
    numbers = {f"{_NAME}.{name}": torch.tensor(value, dtype=torch.float64) for name, value in own.items()}
    return {_NAME: torch.tensor(list(loss.name.encode()), dtype=torch.uint8), **numbers}


def loss_of(numbers: Mapping[str, Tensor]) -> Loss:
    """The reverse of ``loss_numbers``."""
    kind = type(loss_named(bytes(numbers[_NAME].tolist()).decode()))
    own = {each.name: numbers[f"{_NAME}.{each.name}"].tolist() for each in fields(kind) if each.init}
    return kind(**own)


def loss_named(name: str) -> Loss:
    """The loss of that name, as it is by default.

    Raises:
        InputError: there is none.
    """
    if not isinstance(name, str) or name not in LOSSES:
        raise InputError(f"the loss is one of {LOSSES.listed()}, not {name!r}.")
    return LOSSES[name]()
