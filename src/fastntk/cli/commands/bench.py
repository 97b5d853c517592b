"""The command line's ``bench``."""

from pathlib import Path
from typing import Annotated

import typer

from fastntk.cli import options
from fastntk.cli.printing import show
from fastntk.common.errors import InputError


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
    from fastntk.cli.run import parse_device
    from fastntk.evidence.bench import drawing, grid
    from fastntk.evidence.bench.config import read_config
    from fastntk.evidence.bench.results import Results
    from fastntk.evidence.bench.summary import methods_of, summarise

    if (config is None) == (summary is None):
        raise InputError("say either which CONFIG.yaml to run or, with --summary, which results to draw.")
    if summary and methods:
        raise InputError("--methods goes with a CONFIG.yaml to run, not with --summary.")
    folder = summary or out
    if config:
        results = grid.run(read_config(config, methods), folder, parse_device(device))
    else:
        if not (folder / "results.sqlite").is_file():
            raise InputError(f"there are no results in {folder}. Run a configuration first.")
        results = Results(folder / "results.sqlite")
    cells = results.cells()
    if not cells:
        raise InputError(f"the results in {folder} hold no request yet. Run a configuration first.")
    if ours not in (names := methods_of(cells)):
        raise InputError(f"no request in {folder} was answered by {ours!r}. Name one of {', '.join(names)} by --ours.")
    found = summarise(cells, ours)
    text = drawing.draw(results, cells, found, ours, folder)
    show(found, as_json, f"{text}\nWrote {folder / 'tables.md'} and {folder / 'tables.html'}.")
