"""Models, what of them can be tuned, and fitting them."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fastntk.cli import options
from fastntk.cli.printing import Solved, forgetting, show, show_fit

if TYPE_CHECKING:
    from fastntk.tuning.fitting import Fit
    from fastntk.tuning.recipe import Recipe


def fit(
    run: options.Folder,
    model: options.Model,
    data: options.Data,
    data_root: options.Root = None,
    id_column: options.IdColumn = None,
    owners: options.Owners = None,
    core: options.Core = None,
    removal: options.Noise = None,
    weights: options.Weights = None,
    select: options.Select = None,
    image_size: options.Size = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 12,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="The first; it falls to 0 along a cosine.")] = 1e-3,
    loss: options.LossName = "cross-entropy",
    label_smoothing: options.Smoothing = 0.0,
    optimizer: options.Optimizer = "adam",
    weight_decay: options.Decay = 1e-4,
    decay_toward: options.DecayToward = "start",
    augment: options.Augment = None,
    mixup: options.Mixup = "off",
    validation: options.Validation = None,
    fitted: options.Fitted = None,
    head_start: options.HeadStart = None,
    device: options.Device = "cpu",
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Fine-tune the selected parameters of a model on labelled images; all else stays frozen.

    Several processes share every batch when it is started as: torchrun --nproc-per-node=N -m fastntk fit RUN ...
    """
    options.no_mixup(mixup)
    numbers = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size, "weight_decay": weight_decay}
    how = {"optimizer": optimizer, "decay_toward": decay_toward, "augment": augment or (), "seed": seed}
    recipe = options.recipe(**numbers, **how, loss=options.loss(loss, label_smoothing))
    images = {"data": data, "root": data_root, "id_column": id_column, "owners": owners, "core": core}
    network = {"model": model, "select": select or options.SELECTED, "size": image_size, "weights": weights}
    more = {"head_start": options.head_start(head_start, fitted), "removal": options.removal(removal, core)}
    done, solved = _fitted(run, device, {**images, **network, "fitted": fitted, **more}, recipe, validation)
    if done:
        show_fit(run, done, as_json, solved)


def _fitted(
    run: Path, device: str, named: Mapping[str, Any], recipe: "Recipe", validation: str | None
) -> "tuple[Fit | None, Solved | None]":
    """What the first of all processes did, and what it solved for if there is a core; None for the other processes."""
    from fastntk.cli.run import Run
    from fastntk.cli.settings import Given
    from fastntk.common import distributed
    from fastntk.common.launch import local_device
    from fastntk.jacobians.numerics import Numerics
    from fastntk.memory.exact import forgettable

    opened = Run(run, local_device(device))
    with distributed.session(opened.device):
        given = Given(**named)
        done, solved = opened.fit(given, recipe, validation), None
        if given.core:
            started = time.perf_counter()
            memory = opened.prepare("auto", "auto", "auto", 0, Numerics())
            others = len(forgettable(memory.state))
            solved = Solved(others, time.perf_counter() - started, forgetting(run, memory))
        return (None, None) if distributed.rank() else (done, solved)


def models(
    pattern: Annotated[str, typer.Argument(help="Only names that contain this.")] = "", as_json: options.Json = False
) -> None:
    """List the models that can be named, of timm, torchvision and (if it is installed) transformers."""
    from fastntk.inputs.makers import list_models

    names = list_models(pattern)
    show({"models": names}, as_json, "\n".join(names))


def tunables(
    model: Annotated[str, typer.Argument(help="As for fit.")],
    classes: Annotated[int, typer.Option(help="Of the head.")] = 10,
    image_size: options.Size = None,
    as_json: options.Json = False,
) -> None:
    """Show what of a model can be tuned, with the number of parameters of each selection."""
    from fastntk.inputs.models import load_model
    from fastntk.tuning.selectors import SELECTORS
    from fastntk.tuning.selectors import tunables as offered

    sizes = offered(load_model(model, classes, size=image_size)[0])
    table = Table("--select", "parameters", "what")
    for name, size in sizes.items():
        argument, package = SELECTORS[name].argument, SELECTORS.others.get(name)
        meaning = SELECTORS[name].meaning + (f" (of {package})" if package else "")
        table.add_row(name if argument is None else f"{name}:{argument}", f"{size:,}", meaning)
    show({"model": model, "parameters": sizes}, as_json, table)
