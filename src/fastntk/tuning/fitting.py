"""Fitting the tuned parameters: shared by training, retraining and every method that fine-tunes."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from fastntk.common import distributed
from fastntk.common.errors import InputError
from fastntk.common.machine import elapsed, settle
from fastntk.common.progress import track
from fastntk.inputs.augmentations import augmented
from fastntk.inputs.batches import batches, check_any, checked, hard, labels_of
from fastntk.inputs.called import suited, uncached
from fastntk.inputs.checks import check_logits, taking
from fastntk.tuning.loss import check_labels
from fastntk.tuning.outputs import accuracy, logits_of
from fastntk.tuning.parameters import snapshot, tuned
from fastntk.tuning.recipe import MOMENTUM, Recipe


@dataclass(frozen=True)
class Fit:
    """What ``fit`` did.

    Attributes:
        initial: the tuned parameters before it.
        losses: the mean loss of each epoch, while it learned.
        recipe: how.
        seconds: that it took.
        accuracies: on the training samples, in percent, of each epoch, while it learned.
        validation: on the validation samples, after each epoch; empty without any.
        shrinkage: what weight decay toward zero alone would have left of the parameters: for ``prepare``.
        assumed: of the initial parameters, where they were rebuilt (``fastntk.rebuilt_start``).
    """

    initial: dict[str, Tensor]
    losses: list[float]
    recipe: Recipe
    seconds: float
    accuracies: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    shrinkage: float = 1.0
    assumed: list[str] = field(default_factory=list)


def fit(
    model: nn.Module, train: Dataset, recipe: Recipe = Recipe(), *, validation: Dataset | None = None, **changes: object
) -> Fit:
    """Fit the tuned parameters of ``model`` to ``train``, in place, and leave the model in eval mode.

    The whole of the fit runs in eval mode: batch norm uses, and does not update, its running statistics (they would
    carry the data in a way that no step over parameters removes), and dropout is off. Like ``prepare``, it changes
    settings of this process (``fastntk.common.machine.settle``); under autocast it fits in mixed precision.

    In a job of several processes (``fastntk.common.distributed``) each takes its share of every batch, and gradients
    are averaged (DistributedDataParallel). All must be given the same model; all end with the same, and how many they
    are changes the order of additions only.

    Args:
        model: as ``tune`` left it; maps images to logits.
        train: a map-style dataset of ``(image, label)``.
        recipe: how; ``changes`` replace its fields: ``fit(model, train, epochs=5, seed=1)``.
        validation: samples on which the accuracy is measured after every epoch.

    Returns:
        The parameters before the fit (``prepare`` needs them as ``initial``), losses, accuracies and seconds.

    Raises:
        InputError: nothing is tuned, a label outside the classes, a pixel that is not finite, or a loss that became
            so.
    """
    settle(autocast=True)
    recipe = replace(recipe, **changes)  # type: ignore[arg-type]
    parameters = tuned(model)
    initial = snapshot(parameters)
    uncached(model.eval())
    device = next(iter(parameters.values())).device
    epochs = _Epochs(recipe, model, train, parameters, initial, device)
    held_out = torch.empty(0) if validation is None else _validated(model, validation, device)
    started = time.perf_counter()
    losses, accuracies, validated = [], [], []
    for epoch in track(range(recipe.epochs), "fitting, epochs"):
        loss, right = epochs.run(epoch)
        losses.append(loss)
        accuracies.append(right)
        if validation is not None:
            validated.append(accuracy(logits_of(model, validation, device).cpu(), held_out))
    left = recipe.shrinkage(epochs.count)
    return Fit(initial, losses, recipe, elapsed(started, device), accuracies, validated, left)


def _validated(model: nn.Module, validation: Dataset, device: torch.device) -> Tensor:
    """The labels of validation samples, of which the model can take the first.

    Raises:
        InputError: it cannot, there is none, or one is of a class that the model does not know.
    """
    check_any(validation, "validation")
    labels = labels_of(validation)
    check_labels(labels, logits_of(model, Subset(validation, [0]), device).shape[1])
    return labels


class _Epochs:
    """The passes of one fit."""

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        train: Dataset,
        parameters: Mapping[str, nn.Parameter],
        initial: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        self.recipe, self.parameters, self.initial, self.device = recipe, parameters, initial, device
        self.count = len(train)  # type: ignore[arg-type]
        check_any(train, "training")
        generator = torch.Generator().manual_seed(recipe.seed)
        self.loader = batches(train, recipe.batch_size, generator, share=(distributed.rank(), distributed.size()))
        self.network = distributed.averaging(model)
        free, rate = parameters.values(), recipe.learning_rate
        sgd = recipe.optimizer == "sgd"
        self.optimiser = torch.optim.SGD(free, rate, MOMENTUM) if sgd else torch.optim.Adam(free, rate)
        steps = recipe.steps(self.count)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, lambda done: recipe.rate(done, steps))

    @torch.enable_grad()
    def run(self, epoch: int) -> tuple[float, float]:
        """One pass over the data: the mean loss a sample, and the percentage that were classified rightly."""
        rank, size, batch = distributed.rank(), distributed.size(), self.recipe.batch_size
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for step, (images, labels) in enumerate(self.loader):
            first, whole = step * batch, min(batch, self.count - step * batch)
            mine = range(rank, whole, size)
            seeds = [self._seed(epoch, first + place) for place in mine or range(1)]
            x, y = augmented(checked(images), self.recipe.augment, seeds).to(self.device), labels.to(self.device)
            with taking(x):
                logits = self.network(suited(self.network, x))
            check_logits(logits, len(x))
            loss = self.recipe.loss(logits, y) * (len(mine) / whole)
            if not torch.isfinite(loss):
                raise InputError("the loss is no longer finite. Lower the learning rate.")
            self.optimiser.zero_grad(set_to_none=True)
            (loss * size).backward()  # the gradients' mean over the processes is taken
            self._pull()
            self.optimiser.step()
            self.schedule.step()
            uncached(self.network)
            right = (logits.argmax(1) == hard(y)).sum() if mine else torch.zeros((), device=self.device)
            total += torch.stack([loss.detach() * whole, right.to(loss)])
        distributed.sum_([total])
        if not all(torch.isfinite(parameter).all() for parameter in self.parameters.values()):
            raise InputError("the parameters are no longer finite. Lower the learning rate.")
        return float(total[0]) / self.count, 100 * float(total[1]) / self.count

    def _seed(self, epoch: int, place: int) -> int:
        """Of the augmentation of the sample that is drawn at a place of an epoch."""
        return (self.recipe.seed * self.recipe.epochs + epoch) * self.count + place

    def _pull(self) -> None:
        """Weight decay: a part of the gradient, or adamw's own move."""
        recipe, rate = self.recipe, float(self.schedule.get_last_lr()[0])
        for name, parameter in self.parameters.items():
            held = parameter.detach()
            away = held - self.initial[name] if recipe.decay_toward == "start" else held.clone()
            if recipe.optimizer == "adamw":
                held.sub_(away, alpha=rate * recipe.weight_decay)
            elif parameter.grad is not None:
                parameter.grad.add_(away, alpha=recipe.weight_decay)
