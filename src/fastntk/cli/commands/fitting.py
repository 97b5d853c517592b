"""Models, what of them can be tuned, and fitting them."""

from typing import Annotated

import typer
from rich.table import Table

from fastntk.cli import options
from fastntk.cli.printing import show


def fit(
    run: options.Folder,
    model: options.Model,
    data: options.Data,
    data_root: options.Root = None,
    id_column: options.IdColumn = None,
    weights: options.Weights = None,
    select: options.Select = None,
    image_size: options.Size = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 12,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Adam's first; it falls to 0 along a cosine.")] = 1e-3,
    loss: options.LossName = "squared",
    label_smoothing: options.Smoothing = 0.0,
    device: options.Device = "cpu",
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Fine-tune the selected parameters of a model on labelled images; all else stays frozen.

    Several processes share every batch when it is started as: torchrun --nproc-per-node=N -m fastntk fit RUN ...
    """
    from fastntk.cli.run import Given, Run
    from fastntk.common import distributed
    from fastntk.common.launch import local_device
    from fastntk.tuning.fitting import Recipe

    recipe = Recipe(epochs, learning_rate, batch_size, seed=seed, loss=options.loss(loss, label_smoothing))
    opened = Run(run, local_device(device))
    with distributed.session(opened.device):
        given = Given(model, data, data_root, select or options.SELECTED, image_size, weights, id_column)
        done = opened.fit(given, recipe)
        if distributed.rank():
            return
    count = sum(tensor.numel() for tensor in done.initial.values())
    document = {"run": str(run), "tuned_parameters": count, "losses": done.losses, "seconds": done.seconds}
    text = (
        f"Tuned {count:,} parameters in {done.seconds:.1f} s; loss {done.losses[0]:.2f} in the first epoch, "
        f"{done.losses[-1]:.2f} in the last.\nNext: fastntk prepare {run}"
    )
    show(document, as_json, text)


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
        argument = SELECTORS[name].argument
        table.add_row(name if argument is None else f"{name}:{argument}", f"{size:,}", SELECTORS[name].meaning)
    show({"model": model, "parameters": sizes}, as_json, table)
