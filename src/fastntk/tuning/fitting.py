"""Fitting the tuned parameters: shared by training, retraining and every method that fine-tunes."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fastntk.common import distributed
from fastntk.common.errors import InputError
from fastntk.common.machine import elapsed, settle
from fastntk.common.progress import track
from fastntk.inputs.batches import batches, checked
from fastntk.tuning.loss import Loss, SquaredLoss
from fastntk.tuning.parameters import snapshot, tuned


@dataclass(frozen=True)
class Recipe:
    """How to fit: Adam with a cosine schedule to zero.

    ``weight_decay`` is per sample and pulls toward the parameters before fitting, not toward zero: fitting minimises
    ``mean_i loss_i + weight_decay/2 |theta - theta_0|^2``. ``seed`` decides the order of the samples.
    """

    epochs: int = 12
    learning_rate: float = 1e-3
    batch_size: int = 32
    weight_decay: float = 1e-4
    seed: int = 0
    loss: Loss = SquaredLoss()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or self.learning_rate <= 0 or self.weight_decay < 0:
            raise InputError(
                "epochs and batch_size must be at least 1, learning_rate positive and weight_decay not negative; "
                f"got {self}."
            )


@dataclass(frozen=True)
class Fit:
    """What ``fit`` did: the tuned parameters before it, the mean loss of each epoch, the recipe and the time taken."""

    initial: dict[str, Tensor]
    losses: list[float]
    recipe: Recipe
    seconds: float


def fit(model: nn.Module, train: Dataset, recipe: Recipe = Recipe(), **changes: object) -> Fit:
    """Fit the tuned parameters of ``model`` to ``train``, in place, and leave the model in eval mode.

    The whole of the fit runs in eval mode: batch norm uses, and does not update, its running statistics (they would
    carry the data in a way that no step over parameters removes), and dropout is off. Like ``prepare``, it changes
    settings of this process (``fastntk.common.machine.settle``).

    In a job of several processes (``fastntk.common.distributed``) each takes its share of every batch, and gradients
    are averaged (DistributedDataParallel). All must be given the same model; all end with the same, and how many they
    are changes the order of additions only.

    Args:
        model: as ``tune`` left it; maps images to logits.
        train: a map-style dataset of ``(image, label)``.
        recipe: how; ``changes`` replace its fields: ``fit(model, train, epochs=5, seed=1)``.

    Returns:
        The parameters before the fit (``prepare`` needs them as ``initial``), losses and seconds.

    Raises:
        InputError: nothing is tuned, a label outside the classes, a pixel that is not finite, or a loss that became
            so.
    """
    settle()
    recipe = replace(recipe, **changes)  # type: ignore[arg-type]
    parameters = tuned(model)
    initial = snapshot(parameters)
    model.eval()
    device = next(iter(parameters.values())).device
    optimiser = torch.optim.Adam(parameters.values(), lr=recipe.learning_rate)
    generator = torch.Generator().manual_seed(recipe.seed)
    loader = batches(train, recipe.batch_size, generator, share=(distributed.rank(), distributed.size()))
    network = distributed.averaging(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda done: (1 + math.cos(math.pi * done / (recipe.epochs * len(loader)))) / 2
    )
    started, losses = time.perf_counter(), []
    for _ in track(range(recipe.epochs), "fitting, epochs"):
        losses.append(_epoch(network, loader, recipe, parameters, initial, optimiser, schedule, device))
    return Fit(initial, losses, recipe, elapsed(started, device))


def _epoch(
    model: nn.Module,
    loader: DataLoader,
    recipe: Recipe,
    parameters: Mapping[str, nn.Parameter],
    initial: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    device: torch.device,
) -> float:
    """One pass over the data; returns the mean loss a sample."""
    rank, size, count = distributed.rank(), distributed.size(), len(loader.dataset)  # type: ignore[arg-type]
    total = torch.zeros((), dtype=torch.float64, device=device)
    for step, (images, labels) in enumerate(loader):
        images = checked(images).to(device)
        whole = min(recipe.batch_size, count - step * recipe.batch_size)
        share = len(range(rank, whole, size)) / whole
        loss = recipe.loss(model(images), labels.to(device)) * share
        if not torch.isfinite(loss):
            raise InputError("the loss is no longer finite. Lower the learning rate.")
        optimiser.zero_grad(set_to_none=True)
        (loss * size).backward()  # the gradients' mean over the processes is taken
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - initial[name], alpha=recipe.weight_decay)
        optimiser.step()
        schedule.step()
        total += loss.detach() * whole
    distributed.sum_([total])
    return float(total) / count
