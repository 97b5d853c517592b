"""Requests to a memory: to forget, to remember and to learn; and whose samples there are."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from fastntk.cli import options
from fastntk.cli.commands.memory import refreshed
from fastntk.cli.printing import show, show_answer
from fastntk.common.errors import InputError

if TYPE_CHECKING:
    from fastntk.cli.asked import Copies
    from fastntk.cli.run import Run
    from fastntk.inputs.ids import Id
    from fastntk.memory.certificate import Answer
    from fastntk.memory.memory import Memory


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
    exact_head: options.NewHead = None,
    gain: options.Gain = False,
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
    more = {"--full": full, "--certificate": certificate, "--defer-purge": defer_purge}
    anchor = {"--refresh": refresh, "--gain": gain, "--exact-head": exact_head}
    modes = {"--dry-run": dry_run, "--requests": requests, "--out": out, "--owners": owners, "--near": near}
    _check_together(named, {**more, **anchor}, modes)
    options.check_certificate(certificate, run)
    opened = Run(run, device, data, model)
    if requests and out:
        _batch(opened, requests, out, owners, copies, as_json)
        return
    memory, chosen, found = _chosen(opened, named, owners, copies, near)
    if dry_run:
        show_answer(run, memory.preview(chosen), None, as_json, "nothing was changed", found)
        return
    _check_refresh(memory, chosen, anchor)
    _answered(opened, memory, memory.forget(chosen, full=full), certificate, defer_purge, as_json, found)
    if refresh:
        _anchored_anew(opened, exact_head, gain, silent=as_json)  # as JSON, one object has been printed


def _anchored_anew(opened: "Run", exact_head: bool | None, gain: bool, silent: bool) -> None:
    """Refresh after an answer; where that fails, the error says that the answer stands."""
    try:
        refreshed(opened, False, exact_head, gain, silent)
    except InputError as error:
        done = f"The request is answered and purged, the refresh not at its end: fastntk refresh {opened.folder}"
        raise InputError(f"{error} {done}") from error


def _chosen(
    opened: "Run", named: Mapping[str, Any], owners: str | None, take: bool, near: float | None
) -> "tuple[Memory, list[Id], Copies]":
    """The memory, what a request takes, which exactly one of the options ``named`` names, and what is to be said of
    images that show the same, or within ``near`` the same."""
    from fastntk.cli import asked
    from fastntk.memory.copies import near_copies

    memory, images = opened.memory()
    with _telling_of_unpurged(opened, memory):
        if named["--class-name"] is not None:
            chosen = asked.of_class(images, named["--class-name"], memory)
        elif named["--owner"]:
            whose = asked.owners_said(opened.here, images, asked.absent_members(images, memory), owners)
            chosen = asked.of_owners(whose, named["--owner"], memory)
        elif named["--match"]:
            chosen = asked.matching(images, named["--match"], memory)
        else:
            chosen = asked.wanted(named["--ids"], named["--ids-file"], asked.nameable(images, memory))
        chosen, found = asked.with_copies(memory, chosen, take)
        return memory, chosen, found if near is None else replace(found, near=near_copies(memory, chosen, near))


@contextmanager
def _telling_of_unpurged(opened: "Run", memory: "Memory") -> Iterator[None]:
    """An error says too that a request before is answered and not purged: it may be the same one, which was cut off."""
    try:
        yield
    except InputError as error:
        if any(each.state == "answered" for each in memory.requests()):
            done = "A request before this one is answered, and its trace not purged yet: fastntk purge"
            raise InputError(f"{error} {done} {opened.folder}") from error
        raise


def _check_refresh(memory: "Memory", chosen: "list[Id]", anchor: Mapping[str, Any]) -> None:
    """Raises ``InputError`` for a refresh that would be refused: before anything is forgotten."""
    from fastntk.memory.finish import ways
    from fastntk.memory.prepare import check_enough

    if anchor["--refresh"]:
        state = memory.state
        state.check_anchored("there is no anchor to be moved: leave out --refresh")
        ways(state, anchor["--gain"], anchor["--exact-head"])
        staying = state.members.without(state.members.positions(chosen, lost=True))
        check_enough(len(staying.ids))
        state.with_members(staying).check_complete()


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
    if not more["--refresh"] and (more["--gain"] or more["--exact-head"] is not None):
        raise InputError("--gain and --exact-head go with --refresh. Later: fastntk refresh, or fastntk export.")
    if more["--refresh"] and more["--defer-purge"]:
        raise InputError("--refresh purges: leave out --defer-purge.")


def _batch(opened: "Run", requests: Path, out: Path, owners: str | None, copies: bool, as_json: bool) -> None:
    """All requests of a file."""
    from fastntk.cli import asked, batch

    wanted = batch.read_requests(requests)
    done = batch.answer_all(opened, wanted, out, partial(asked.owners_said, opened.here, spec=owners), copies)
    heads = "request", "came", "what became of it", "samples", "copies too", "copies left", "gone before"
    table = Table(*heads, "not in the data", "verdict")
    for row in done["requests"]:
        counts = (str(row.get(name, "")) for name in ("samples", "copies_taken", "copies_left", "gone", "unknown"))
        table.add_row(*map(Text, (row["request"], row["date"], row["became"], *counts, row.get("verdict", ""))))
    purged = "Purged." if done["purged"] else f"Not all is purged: fastntk purge {opened.folder}"
    show(done, as_json, table, f"{purged} Wrote {out / 'summary.html'}, {out / 'summary.json'} and the certificates.")
    if any(row["became"] == batch.REFUSED for row in done["requests"]):
        raise InputError("some requests were refused, for the reasons above. The others are answered.")


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
    absent, members = asked.absent_members(images, memory), set(memory.ids)
    found = asked.owners_said(opened.here, images, absent, said)
    counts: dict[str, list[int]] = {}
    for each, name in found.items():
        count = counts.setdefault(name, [0, 0])
        count[0] += 1
        count[1] += each in members
    table = Table("owner", "samples", "in the memory")
    for name, count in sorted(counts.items(), key=lambda each: (-each[1][1], each[0])):
        table.add_row(Text(name), *(f"{number:,}" for number in count))
    listed = {name: {"samples": whole, "members": there} for name, (whole, there) in counts.items()}
    document = {"run": str(run), "owners": listed, "without": len(images) + len(absent) - len(found)}
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
    options.check_certificate(certificate, run)
    opened = Run(run, device, data, model)
    memory, images = opened.memory()
    answer = memory.remember(wanted(ids, ids_file, images.ids), full=full)
    _answered(opened, memory, answer, certificate, defer_purge, as_json)


def learn(
    run: options.Folder,
    data: Annotated[str, typer.Option(callback=options.said, help="New images, as for fit, of the run's classes.")],
    defer_purge: options.Defer = False,
    full: options.Full = False,
    certificate: options.CertificateFile = None,
    fitted_to: options.FittedTo = None,
    model: options.MovedModel = None,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Add new images to the memory, as exact as forgetting. Their ids begin with where they come from."""
    from fastntk.cli.run import Run

    options.check_certificate(certificate, run)
    opened = Run(run, device, fitted_to, model)
    memory, answer = opened.learn(data, full)
    _answered(opened, memory, answer, certificate, defer_purge, as_json)


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
