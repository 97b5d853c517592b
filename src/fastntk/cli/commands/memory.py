"""Preparing a memory, its folder, and what comes of it."""

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from fastntk.cli import options
from fastntk.cli.printing import forgetting, show, table_of
from fastntk.common.errors import InputError

if TYPE_CHECKING:
    from fastntk.cli.run import Run


def prepare(
    run: options.Folder,
    ridge: Annotated[
        str, typer.Option(help="'auto', or the total L2 pull toward the parameters before fitting.")
    ] = "auto",
    form: options.Form = "auto",
    classes: options.Classes = "auto",
    sums: options.Sums = "float64",
    precision: options.Precision = "full",
    class_probes: options.Probes = None,
    workers: options.Workers = 0,
    data: options.Moved = None,
    model: options.MovedModel = None,
    device: options.Device = "cpu",
    ready: Annotated[bool, typer.Option("--ready", help="Solve as well, which the first request waits for.")] = False,
    seed: Annotated[
        int, typer.Option(**options.SEED, help="Of the draw of retained samples that check every request.")
    ] = 0,
    as_json: options.Json = False,
) -> None:
    """One pass over the training data; from then on forgetting needs only the forgotten samples and a few others.

    The layerwise and matrix-free forms read what stays for every request too. In the primal and layerwise forms, if cut
    off, the same command goes on from what is on disk. Several processes share it when started as:
    torchrun --nproc-per-node=N -m fastntk prepare RUN.
    """
    from fastntk.cli.run import Run
    from fastntk.common import distributed
    from fastntk.common.launch import local_device

    numerics = options.numerics(sums, precision, class_probes, workers)
    opened = Run(run, local_device(device), data, model)
    with distributed.session(opened.device):
        memory = opened.prepare(
            ridge if ridge == "auto" else options.number(ridge), form, options.classes(classes), seed, numerics, ready
        )
        if distributed.rank():
            return
    document = {"run": str(run), "form": memory.form, "ridge": memory.ridge, "samples": len(memory.ids)}
    exactly = memory.state.core is not None
    found = f" ({memory.calibration or ('chosen on the core' if exactly and ridge == 'auto' else 'given')})"
    text = f"The memory holds {document['samples']:,} samples, {memory.form} form, ridge {memory.ridge:.4g}{found}."
    first = "First see that it forgets exactly" if exactly else "First see how near retraining it comes"
    following = f"Next: {forgetting(run, memory)}\n{first}: fastntk audit {quote(str(run))}"
    show(document, as_json, f"{text}\n{following}")


def plan(
    run: Annotated[
        Path | None,
        typer.Argument(parser=options.place, metavar="RUN", help="A run folder that holds a fitted model."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="In place of a run; with one: where its model lies now.")] = None,
    data: Annotated[
        str | None, typer.Option(help="In place of a run: what fit would be given; with one: where its data lie now.")
    ] = None,
    data_root: options.Root = None,
    select: options.Select = None,
    image_size: options.Size = None,
    loss: Annotated[str | None, typer.Option(help="In place of a run's: squared or cross-entropy.")] = None,
    form: options.Form = "auto",
    classes: options.Classes = "auto",
    sums: options.Sums = "float64",
    precision: options.Precision = "full",
    class_probes: options.Probes = None,
    workers: options.Workers = 0,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """What prepare would take, in every form: peak memory, disk, and a time from a calibration of some seconds, beside
    that of a retraining.

    For a run, or, before there is one, for a model and data: fastntk plan --model resnet18 --data DATA. For a fit that
    forgets exactly: --form convex --classes 4.
    """
    from fastntk.cli.run import Run
    from fastntk.cli.settings import Given
    from fastntk.common.machine import parse_device
    from fastntk.memory import plan as planning

    numerics = options.numerics(sums, precision, class_probes, workers)
    described = any(each is not None for each in (data_root, select, image_size, loss))
    if (run and described) or (not run and (model is None or data is None)):
        raise InputError("say what to plan for: either a run folder, or --model and --data with what goes with them.")
    if run:
        planned = Run(run, device, data, model).plan(form, options.classes(classes), numerics)
    else:
        given = Given(str(model), str(data), data_root, select or options.SELECTED, image_size)
        named = "cross-entropy" if loss is None else loss
        asked = {"form": form, "classes": options.classes(classes), "loss": options.loss(named, 0.0)}
        planned = planning.plan(*given.open(parse_device(device)), **asked, numerics=numerics)
    show(planned.to_dict(), as_json, planned.text())


def purge(
    run: options.Folder,
    data: options.Moved = None,
    model: options.MovedModel = None,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Remove the trace of every request that is answered and not yet purged. No image is read."""
    from fastntk.cli.run import Run
    from fastntk.memory.memory import by_itself

    opened = Run(run, device, data, model)
    memory = by_itself(run / "memory", opened.here.network(run)[0].to(opened.device))
    pending = sum(each.state == "answered" for each in memory.requests())
    seconds = opened.purge(memory)
    text = f"Purged {pending} requests in {seconds:.2f} s." if pending else "There was nothing to purge."
    show({"run": str(run), "purged": pending, "seconds": seconds}, as_json, text)


def ledger(run: options.Folder, as_json: options.Json = False) -> None:
    """Every request with its state: answered (its trace is still in the folder), purged, or re-anchored (refreshed)."""
    from fastntk.common.files import UNDERWAY
    from fastntk.memory.disk.folder import Folder

    requests, halfway = Folder(run / "memory").requests(), (run / UNDERWAY).exists()
    text = f"A refresh has begun and has not come to its end. What is left of it is done by: fastntk verify {run}"
    document = {"run": str(run), "refreshing": halfway, "requests": [each.to_dict() for each in requests]}
    show(document, as_json, table_of(requests), *([text] if halfway else []))


def verify(
    run: options.Folder,
    full: options.Full = False,
    data: options.Moved = None,
    model: options.MovedModel = None,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Check every file of the memory, that it belongs to the model and data, and that its solution is exact."""
    from fastntk.cli.run import Run

    memory, _ = Run(run, device, data, model).memory()
    state, solution = memory.state, memory.state.solution
    inexactness, limit, error = solution.inexactness(), solution.limit, state.error() if full else None
    pending = sum(each.state == "answered" for each in memory.requests())
    counts = {"run": str(run), "samples": len(memory.ids), "pending": pending}
    document = {**counts, "inexactness": inexactness, "error": error}
    text = (
        f"Every file is what was written; the memory belongs to the model and the data. {len(memory.ids):,} samples, "
        f"{pending} requests not yet purged.\nThe normal equations hold to {inexactness:.1e} "
        f"(limit {limit:.0e})."
    )
    if error is not None:
        text += f"\nSolved anew from the sums, the step differs by {error:.1e}, relative."
    show(document, as_json, text)
    if not inexactness <= limit:
        remedy = "Fit again." if state.core is not None else "Use: fastntk refresh RUN"
        raise InputError(f"the solution is not exact. {remedy}")


def refresh(
    run: options.Folder,
    exact_head: options.NewHead = None,
    gain: options.Gain = False,
    data: options.Moved = None,
    model: options.MovedModel = None,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Linearise anew at the answer to all requests, by one pass over the samples that are left.

    The answer is finished first, as it is when it is exported: later exports begin from it.
    """
    from fastntk.cli.run import Run

    refreshed(Run(run, device, data, model), as_json, exact_head, gain)


def refreshed(opened: "Run", as_json: bool, exact_head: bool | None, gain: bool, silent: bool = False) -> None:
    """Linearise anew, and say so."""
    seconds, memory = opened.refresh(exact_head, gain)
    if silent:
        return
    entry = memory.requests()[-1].certificate
    ways = {"the audit's gain": entry["gain"], "an exact head": entry["exact_head"]}
    added = " and ".join(name for name, done in ways.items() if done)
    at = f"the step with {added}" if added else "the step"
    document = {"run": str(opened.folder), "seconds": seconds, "ridge": memory.ridge, "samples": len(memory.ids)}
    text = f"Refreshed at {at}, on {len(memory.ids):,} samples in {seconds:.1f} s; ridge {memory.ridge:.4g}."
    show({**document, "gain": entry["gain"], "exact_head": entry["exact_head"]}, as_json, text)


def export(
    run: options.Folder,
    out: Annotated[Path | None, typer.Option(help="The file; by default unlearned.safetensors in the run.")] = None,
    hub: Annotated[
        Path | None,
        typer.Option(help="In place of a file: a folder that timm or transformers load by themselves."),
    ] = None,
    exact_head: Annotated[bool, typer.Option(help="Solve the head anew, over the retained images.")] = False,
    gain: options.Gain = False,
    left_out_gain: Annotated[
        str | None,
        typer.Option(
            callback=options.said,
            help="In place of --gain: the one by which members left out are as sure as these held-out images.",
        ),
    ] = None,
    data: options.Moved = None,
    model: options.MovedModel = None,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Write the whole model after all requests: a plain state dict, for load_state_dict(strict=True)."""
    from fastntk.cli.run import Run

    if gain and left_out_gain:
        raise InputError("there are two gains: leave out --gain or --left-out-gain.")
    if out and hub:
        raise InputError("--out is a file and --hub a folder: leave out one.")
    path = hub or out or run / "unlearned.safetensors"
    taken, load = Run(run, device, data, model).export(path, exact_head, gain, left_out_gain, hub is not None)
    told = "" if taken is None else f" The step was multiplied by {taken:.2f}."
    loaded = f"\nLoad it: {load}" if load else ""
    document = {"run": str(run), "out": str(path), "gain": taken, "load": load or None}
    show(document, as_json, f"Wrote {path}.{told}{loaded}")
