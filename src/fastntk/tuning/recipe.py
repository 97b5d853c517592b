"""How a model is fitted, and where weight decay alone would lead."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastntk.common.errors import InputError
from fastntk.common.seeds import check_seed
from fastntk.common.typed import check_types
from fastntk.inputs.augmentations import check_augmentations
from fastntk.tuning.loss import Loss
from fastntk.tuning.losses import CrossEntropy

_OPTIMIZERS = "adam", "adamw", "sgd"

MOMENTUM = 0.9
"""Of sgd."""

_TOWARD = "start", "zero"

_MOST = 1_000_000  # of any number: beyond, it is a slip of the keyboard


@dataclass(frozen=True)
class Recipe:
    """How to fit: an optimiser whose rate falls to zero along a cosine.

    Attributes:
        epochs: passes over the data.
        learning_rate: the first.
        batch_size: samples a step.
        weight_decay: per sample, ``w``. adam and sgd minimise ``mean_i loss_i + w/2 |theta - c|^2``; adamw moves by
            ``-rate w (theta - c)`` beside every step of adam, which is not scaled by the size of the gradients.
        seed: of the order of the samples, and of their augmentation.
        loss: of a sample.
        optimizer: adam, adamw or sgd, which has a momentum of 0.9.
        decay_toward: c: ``"start"``, the parameters before fitting, or ``"zero"``.
        augment: names of ``fastntk.inputs.augmentations``, done to every image whenever it is seen.

    Raises:
        InputError: a number is out of range, a name unknown, or the decay is adam's and toward zero: divided by the
            size of the gradients it is no pull of a known strength.
    """

    epochs: int = 12
    learning_rate: float = 1e-3
    batch_size: int = 32
    weight_decay: float = 1e-4
    seed: int = 0
    loss: Loss = CrossEntropy()  # noqa: RUF009 (frozen)
    optimizer: str = "adam"
    decay_toward: str = "start"
    augment: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "augment", tuple(self.augment))
        check_types(self)
        check_seed(self.seed)
        rates = 0 < self.learning_rate <= _MOST and 0 <= self.weight_decay <= _MOST
        if not (1 <= self.epochs <= _MOST and 1 <= self.batch_size <= _MOST and rates):
            raise InputError(
                "epochs and batch_size must be at least 1, learning_rate positive and weight_decay not negative, and "
                f"each finite: at most {_MOST:,}; got {self}."
            )
        if self.optimizer not in _OPTIMIZERS:
            raise InputError(f"the optimizer is one of {', '.join(_OPTIMIZERS)}, not {self.optimizer!r}.")
        if self.decay_toward not in _TOWARD:
            raise InputError(f"weight decay is toward {' or '.join(_TOWARD)}, not {self.decay_toward!r}.")
        if self.optimizer == "adam" and self.decay_toward == "zero" and self.weight_decay:
            raise InputError(
                "adam divides its weight decay by the size of the gradients, so that toward zero it is a pull of no "
                "known strength. Take adamw, whose decay is its own, or decay toward the start."
            )
        check_augmentations(self.augment)

    def steps(self, samples: int) -> int:
        """How many there are in all."""
        return self.epochs * -(-samples // self.batch_size)

    def rate(self, done: int, steps: int) -> float:
        """The share of the learning rate after so many of all steps."""
        return (1 + math.cos(math.pi * done / steps)) / 2

    def shrinkage(self, samples: int) -> float:
        """What the decay alone would leave of every parameter; 1 where it pulls toward the start. See ``shrinkage``."""
        if self.decay_toward == "start":
            return 1.0
        steps = self.steps(samples)
        rates = (self.learning_rate * self.rate(done, steps) for done in range(steps))
        return shrinkage(rates, self.weight_decay, MOMENTUM if self.optimizer == "sgd" else 0.0)


def shrinkage(learning_rates: Iterable[float], weight_decay: float, momentum: float = 0.0) -> float:
    """What weight decay toward zero alone would leave of a parameter, as a share of it: s in ``[0, 1]``.

    Fitting pulls toward ``s theta_0``, where the parameters would be if the data had no say: ``prepare(shrinkage=s)``.

        v <- momentum v + weight_decay c,    c <- c - rate v,    from c = 1, v = 0

    Args:
        learning_rates: of all steps, in order.
        weight_decay: ``torch.optim.AdamW``'s (momentum 0), or ``torch.optim.SGD``'s.
        momentum: of SGD.

    Raises:
        InputError: nothing is left: the decay alone would take the parameters to zero or beyond.
    """
    left, velocity = 1.0, 0.0
    for rate in learning_rates:
        velocity = momentum * velocity + weight_decay * left
        left -= rate * velocity
    if not 0 < left <= 1:
        raise InputError(f"weight decay alone would leave {left:.3g} of the parameters. Take a smaller one.")
    return left
