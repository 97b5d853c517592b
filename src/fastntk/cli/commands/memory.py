"""Preparing a memory, requests to it, and its folder."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from fastntk.cli import options
from fastntk.cli.printing import show, show_answer, table_of
from fastntk.common.errors import InputError

if TYPE_CHECKING:
    from fastntk.cli.asked import Copies
    from fastntk.cli.run import Run
    from fastntk.inputs.ids import Id
    from fastntk.inputs.images import Images
    from fastntk.memory.certificate import Answer
    from fastntk.memory.memory import Memory


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

    The layerwise and matrix-free forms read what stays for every request too. If cut off, the same command goes on from
    what is on disk. Several processes share it when started as: torchrun --nproc-per-node=N -m fastntk prepare RUN.
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
    found = f" ({memory.calibration})" if memory.calibration else " (given)"
    text = f"The memory holds {document['samples']:,} samples, {memory.form} form, ridge {memory.ridge:.4g}{found}."
    following = f"Next: fastntk forget {run} --ids 3,17\nFirst see how near retraining it comes: fastntk audit {run}"
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

    For a run, or, before there is one, for a model and data: fastntk plan --model resnet18 --data DATA.
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


def forget(
    run: options.Folder,
    ids: options.Ids = None,
    ids_file: options.IdsFile = None,
    class_name: Annotated[str | None, typer.Option(help="All samples of one class.")] = None,
    owner: options.Owner = None,
    match: options.Match = None,
    owners: options.Owners = None,
    copies: options.WithCopies = False,
    near: options.Near = None,
    requests: options.Requests = None,
    out: options.Certificates = None,
    dry_run: Annotated[bool, typer.Option(help="Show the verdict, change nothing.")] = False,
    defer_purge: options.Defer = False,
    refresh: options.Refresh = False,
    full: options.Full = False,
    certificate: options.CertificateFile = None,
    data: options.Moved = None,
    model: options.MovedModel = None,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Forget samples, then purge their trace from the memory. A few others are read to check the answer."""
    from fastntk.cli.run import Run

    named = {"--ids": ids, "--ids-file": ids_file, "--class-name": class_name, "--owner": owner, "--match": match}
    more = {"--full": full, "--certificate": certificate, "--defer-purge": defer_purge, "--refresh": refresh}
    modes = {"--dry-run": dry_run, "--requests": requests, "--out": out, "--owners": owners, "--near": near}
    _check_together(named, more, modes)
    options.check_out(certificate)
    opened = Run(run, device, data, model)
    if requests and out:
        _batch(opened, requests, out, owners, copies, as_json)
        return
    memory, images = opened.memory()
    chosen = _named(opened, memory, images, ids, ids_file, class_name, owner, match, owners)
    chosen, found = _with_copies(memory, chosen, copies, near)
    if dry_run:
        show_answer(run, memory.preview(chosen), None, as_json, "nothing was changed", found)
        return
    _answered(opened, memory, memory.forget(chosen, full=full), certificate, defer_purge, as_json, found)
    if refresh:
        _refreshed(opened, as_json, silent=as_json)  # one object has been printed


def _with_copies(memory: "Memory", chosen: "list[Id]", take: bool, near: float | None) -> "tuple[list[Id], Copies]":
    """What a request takes, and what is to be said of images that show the same, or within ``near`` the same."""
    from fastntk.cli import asked
    from fastntk.memory.copies import near_copies

    chosen, found = asked.with_copies(memory, chosen, take)
    return chosen, found if near is None else replace(found, near=near_copies(memory, chosen, near))


_ALONE = {"--requests": "answers, certifies and purges", "--dry-run": "only shows the verdict"}


def _check_together(named: Mapping[str, object], more: Mapping[str, object], modes: Mapping[str, object]) -> None:
    """Raises ``InputError`` for options of ``forget`` that do not go together."""
    if sum(given not in (None, []) for given in (*named.values(), modes["--requests"])) != 1:
        raise InputError(f"say what to forget by exactly one of {', '.join(named)}, --requests.")
    if modes["--owners"] and not (named["--owner"] or modes["--requests"]):
        raise InputError("--owners says whose the images are: it goes with --owner or --requests.")
    if bool(modes["--requests"]) != bool(modes["--out"]):
        raise InputError("--requests and --out, the folder for its certificates, go together.")
    mode = next((name for name in _ALONE if modes[name]), None)
    others = {**more, **{name: modes[name] for name in ("--dry-run", "--near") if modes["--requests"]}}
    odd = [name for name, value in others.items() if value not in (None, False)]
    if mode and odd:
        raise InputError(f"{mode} {_ALONE[mode]}: {', '.join(odd)} does not go with it.")
    if more["--refresh"] and more["--defer-purge"]:
        raise InputError("--refresh purges: leave out --defer-purge.")


def _batch(opened: "Run", requests: Path, out: Path, owners: str | None, copies: bool, as_json: bool) -> None:
    """All requests of a file."""
    from fastntk.cli import asked, batch

    wanted = batch.read_requests(requests)
    done = batch.answer_all(opened, wanted, out, lambda images: asked.owners(opened.here, images, owners), copies)
    heads = "request", "came", "what became of it", "samples", "copies too", "copies left", "gone before"
    table = Table(*heads, "not in the data", "verdict")
    for row in done["requests"]:
        counts = (str(row.get(name, "")) for name in ("samples", "copies_taken", "copies_left", "gone", "unknown"))
        table.add_row(*map(Text, (row["request"], row["date"], row["became"], *counts, row.get("verdict", ""))))
    purged = "Purged." if done["purged"] else f"Not all is purged: fastntk purge {opened.folder}"
    show(done, as_json, table, f"{purged} Wrote {out / 'summary.html'}, {out / 'summary.json'} and the certificates.")
    if any(row["became"] == batch.REFUSED for row in done["requests"]):
        raise InputError("some requests were refused, for the reasons above. The others are answered.")


def _named(
    opened: "Run",
    memory: "Memory",
    images: "Images",
    ids: str | None,
    ids_file: Path | None,
    class_name: str | None,
    owner: list[str] | None,
    match: list[str] | None,
    owners: str | None,
) -> "list[Id]":
    """The ids of a request, which exactly one of the options names."""
    from fastntk.cli import asked

    if class_name is not None:
        return asked.of_class(images, class_name, memory)
    if owner:
        return asked.of_owners(images, asked.owners(opened.here, images, owners), owner, memory)
    return asked.matching(images, match, memory) if match else asked.wanted(ids, ids_file, images)


def owners(
    run: options.Folder,
    said: Annotated[str | None, typer.Option("--owners", callback=options.said, help="In place of fit's.")] = None,
    data: options.Moved = None,
    model: options.MovedModel = None,
    as_json: options.Json = False,
) -> None:
    """Who owns samples of the training data, and how many of them are in the memory."""
    from fastntk.cli import asked
    from fastntk.cli.run import Run

    opened = Run(run, data=data, model=model)
    memory, images = opened.memory()
    found, members = asked.owners(opened.here, images, said), set(memory.ids)
    counts: dict[str, list[int]] = {}
    for each, name in found.items():
        count = counts.setdefault(name, [0, 0])
        count[0] += 1
        count[1] += each in members
    table = Table("owner", "samples", "in the memory")
    for name, count in sorted(counts.items(), key=lambda each: (-each[1][1], each[0])):
        table.add_row(Text(name), *(f"{number:,}" for number in count))
    listed = {name: {"samples": whole, "members": there} for name, (whole, there) in counts.items()}
    document = {"run": str(run), "owners": listed, "without": len(images) - len(found)}
    show(document, as_json, table, f"{document['without']:,} images have no owner.")


def remember(
    run: options.Folder,
    ids: options.Ids = None,
    ids_file: options.IdsFile = None,
    defer_purge: options.Defer = False,
    full: options.Full = False,
    certificate: options.CertificateFile = None,
    data: options.Moved = None,
    model: options.MovedModel = None,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Add samples that are in the data and not in the memory: new ones, or some that were forgotten."""
    from fastntk.cli.asked import wanted
    from fastntk.cli.run import Run

    if (ids is None) == (ids_file is None):
        raise InputError("say what to remember by exactly one of --ids and --ids-file.")
    options.check_out(certificate)
    opened = Run(run, device, data, model)
    memory, images = opened.memory()
    answer = memory.remember(wanted(ids, ids_file, images), full=full)
    _answered(opened, memory, answer, certificate, defer_purge, as_json)


def learn(
    run: options.Folder,
    data: Annotated[str, typer.Option(callback=options.said, help="New images, as for fit, of the run's classes.")],
    defer_purge: options.Defer = False,
    full: options.Full = False,
    certificate: options.CertificateFile = None,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Add new images to the memory: as exact as forgetting, and as fast. Their ids begin with where they come from."""
    from fastntk.cli.run import Run

    options.check_out(certificate)
    opened = Run(run, device)
    memory, answer = opened.learn(data)
    _answered(opened, memory, answer, certificate, defer_purge, as_json)


def purge(
    run: options.Folder,
    data: options.Moved = None,
    model: options.MovedModel = None,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Remove the trace of every request that is answered and not yet purged."""
    from fastntk.cli.run import Run

    opened = Run(run, device, data, model)
    memory, _ = opened.memory()
    pending = sum(each.state == "answered" for each in memory.requests())
    seconds = opened.purge(memory)
    text = f"Purged {pending} requests in {seconds:.2f} s." if pending else "There was nothing to purge."
    show({"run": str(run), "purged": pending, "seconds": seconds}, as_json, text)


def ledger(run: options.Folder, as_json: options.Json = False) -> None:
    """Every request with its state: answered (its trace is still in the folder), purged, or re-anchored (refreshed)."""
    from fastntk.memory.disk.folder import Folder

    requests = Folder(run / "memory").requests()
    show({"run": str(run), "requests": [each.to_dict() for each in requests]}, as_json, table_of(requests))


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
        raise InputError("the solution is not exact. Use: fastntk refresh RUN")


def refresh(
    run: options.Folder,
    data: options.Moved = None,
    model: options.MovedModel = None,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Linearise anew where the weights are now, by one pass over the samples that are left."""
    from fastntk.cli.run import Run

    _refreshed(Run(run, device, data, model), as_json)


def _refreshed(opened: "Run", as_json: bool, silent: bool = False) -> None:
    seconds, memory = opened.refresh()
    if silent:
        return
    document = {"run": str(opened.folder), "seconds": seconds, "ridge": memory.ridge, "samples": len(memory.ids)}
    show(document, as_json, f"Refreshed on {len(memory.ids):,} samples in {seconds:.1f} s; ridge {memory.ridge:.4g}.")


def export(
    run: options.Folder,
    out: Annotated[Path | None, typer.Option(help="The file; by default unlearned.safetensors in the run.")] = None,
    hub: Annotated[
        Path | None,
        typer.Option(help="In place of a file: a folder that timm or transformers load by themselves."),
    ] = None,
    exact_head: Annotated[bool, typer.Option(help="Solve the head anew, over the retained images.")] = False,
    gain: Annotated[
        bool, typer.Option(help="Multiply the step by the audit's gain (below 1: with a new head).")
    ] = False,
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


def _answered(
    opened: "Run",
    memory: "Memory",
    answer: "Answer",
    file: Path | None,
    defer_purge: bool,
    as_json: bool,
    copies: "Copies | None" = None,
) -> None:
    """Write the certificate of a request, then purge: its salt is kept, and the answer shown, even if that fails."""
    from fastntk.common.files import write_json

    seconds = None
    try:
        if file:
            write_json(file, answer.certificate.to_dict())
        seconds = None if defer_purge else opened.purge(memory)
    except InputError as error:
        raise InputError(f"{error} The request is answered, and not purged: fastntk purge {opened.folder}") from error
    finally:
        show_answer(opened.folder, answer, seconds, as_json, copies=copies)
