"""Which samples a request on the command line asks for."""

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path

from fastntk.cli.options import text_of
from fastntk.cli.settings import Settings
from fastntk.common.errors import InputError
from fastntk.inputs.ids import Id, by_name, composed
from fastntk.inputs.images import Images
from fastntk.inputs.owners import owners_of
from fastntk.inputs.sources import load_data
from fastntk.memory.certificate import HEAD_NEEDED
from fastntk.memory.copies import copies
from fastntk.memory.memory import Memory

log = logging.getLogger(__name__)

_OUTPUTS = "unlearned*.safetensors", "report.json", "report.html", "forgotten.svg"

_NAMED = 20  # copies in a text


def absent_members(images: Images, memory: Memory) -> list[Id]:
    """The members whose images are not in the data any more. A request that names one is answered where the solution
    holds its rows, and else refused: nobody is passed over."""
    here = set(images.ids)
    return [each for each in memory.ids if each not in here]


def nameable(images: Images, memory: Memory) -> list[Id]:
    """The ids that a request may name: of the data, and of members that are absent from it."""
    return [*images.ids, *absent_members(images, memory)]


def of_class(images: Images, class_name: str, memory: Memory) -> list[Id]:
    """The ids of a class's samples that are in the memory; of members that are absent from the data the class is not
    known, which is said.

    Raises:
        InputError: there is no such class, or none of its samples is left.
    """
    if class_name not in images.classes:
        raise InputError(f"there is no class {class_name!r}. The classes are: {', '.join(images.classes)}.")
    if count := len(absent_members(images, memory)):
        log.warning(
            "the images of %d members are not in the data: whether they are of class %r is not known, and they stay",
            *(count, class_name),
        )
    places = (images.labels == images.classes.index(class_name)).nonzero()[:, 0].tolist()
    return _members([images.ids[place] for place in places], memory, f"of class {class_name!r}")


def owned(owners: Mapping[Id, str], name: str) -> list[Id]:
    """The ids of an owner's samples, in whichever form of Unicode the name is written."""
    wanted = composed(name)
    return [each for each, owner in owners.items() if composed(owner) == wanted]


def of_owners(owners: Mapping[Id, str], names: Sequence[str], memory: Memory) -> list[Id]:
    """The ids of some owners' samples that are in the memory.

    Raises:
        InputError: one of them owns nothing, or nothing that is in the memory still.
    """
    found: dict[Id, None] = {}
    for name in names:
        theirs = owned(owners, name)
        if not theirs:
            raise InputError(f"no sample of the data is owned by {name!r}. fastntk owners RUN lists who owns some.")
        found |= dict.fromkeys(_members(theirs, memory, f"owned by {name!r}"))
    return list(found)


def owners_said(
    settings: Settings, images: Images, absent: Sequence[Id] = (), spec: str | None = None
) -> dict[Id, str]:
    """Whose a run's images are, and the members that are absent from them, as ``fit`` was told or as ``spec`` says.

    Raises:
        InputError: neither says it, or what they name cannot be read.
    """
    if not (said := spec or settings.owners):
        raise InputError("nobody said whose the images are. Say it: --owners owners.csv, a column, or a pattern.")
    return owners_of(said, settings.data, images, absent)


def core_of(images: Images, spec: str) -> list[Id] | Images:
    """A core: the ids that a pattern matches, as ``*/public/*``, or that a file names, one a line, in the data's order;
    or other images, which a folder or an ``.npz`` holds.

    Raises:
        InputError: there are none, or all, or an id is not of ``images``, or what is named cannot be read.
    """
    place = Path(spec)
    if place.is_dir() or place.suffix == ".npz":
        return _where_known(load_data(spec, images.preprocessing), images.classes)
    named = _of_file(place, images) if place.is_file() else {i for i in images.ids if fnmatchcase(str(i), spec)}
    if not named:
        raise InputError(f"the core {spec!r} is no file or folder, and matches no sample's id.")
    if len(named) == len(images):
        raise InputError(f"the core {spec!r} is all of the data, and nobody could be forgotten. Name fewer.")
    return [each for each in images.ids if each in named]


def _of_file(place: Path, images: Images) -> set[Id]:
    """The ids that a core's file names."""
    if not (text := text_of(place)).strip():
        raise InputError(f"the core's file {place} names no sample.")
    ids, known = read_ids(text, images.ids, lines=True), set(images.ids)
    if unknown := [each for each in ids if each not in known]:
        raise InputError(f"the core names {unknown[0]!r}, which is not in the data ({len(unknown)} such).")
    return set(ids)


def _where_known(others: Images, classes: Sequence[str]) -> Images:
    """Other images under these classes if they have no others, else under their own."""
    return others.under(classes) if set(others.classes) <= set(classes) else others


def matching(images: Images, patterns: Sequence[str], memory: Memory) -> list[Id]:
    """The ids in the memory that match one of some patterns, as ``*/alice/*`` matches paths.

    Raises:
        InputError: a pattern matches no sample, or none that is in the memory still.
    """
    found, known = dict[Id, None](), nameable(images, memory)
    for pattern in patterns:
        those = [each for each in known if fnmatchcase(str(each), pattern)]
        if not those:
            raise InputError(f"no sample's id matches {pattern!r}.")
        found |= dict.fromkeys(_members(those, memory, f"that matches {pattern!r}"))
    return list(found)


def _members(ids: Sequence[Id], memory: Memory, what: str) -> list[Id]:
    known = set(memory.ids)
    found = [each for each in ids if each in known]
    if not found:
        raise InputError(f"no sample {what} is in the memory: they were forgotten already.")
    return found


@dataclass(frozen=True)
class Copies:
    """What stays, and shows the same image as what was forgotten.

    Attributes:
        same: members with the very same pixels; None if that is not known.
        near: members within the asked distance, with theirs.
        taken: how many were taken too.
    """

    same: list[Id] | None
    near: dict[Id, float]
    taken: int = 0

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        near = [{"id": each, "distance": far} for each, far in self.near.items()]
        return {"copies_taken": self.taken, "copies_left": self.same, "near": near}

    def text(self) -> str:
        """For people; empty if there is nothing to say."""
        told = [f"{self.taken} copies, the same pixel by pixel, were taken too."] if self.taken else []
        if self.same is None:
            told.append("Whether others show the same images is not known: the memory is of an older version.")
        elif self.same:
            told.append(f"Pixel by pixel the same, and staying (--with-copies takes them): {_listed(self.same)}.")
        if self.near:
            near = [f"{each} ({far:.2f})" for each, far in self.near.items()]
            told.append(f"Near, and staying (distance; two at random are 1 apart): {_listed(near)}.")
        return "\n".join(told)


def _listed(names: Sequence[object]) -> str:
    shown = ", ".join(map(str, names[:_NAMED]))
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def with_copies(memory: Memory, ids: list[Id], take: bool) -> tuple[list[Id], Copies]:
    """Some samples, with those that show the very same image if these are to be taken too, and what was found.

    Raises:
        InputError: they are to be taken, and not known.
    """
    same = copies(memory, ids)
    if not take:
        return ids, Copies(same, {})
    if same is None:
        raise InputError("the memory was prepared before copies were known. Refresh it: fastntk refresh RUN")
    return [*ids, *same], Copies([], {}, taken=len(same))


def wanted(ids: str | None, file: Path | None, known: Iterable[Id]) -> list[Id]:
    """The ids that a user gave as a text, or in a file, of those that are ``known``.

    Raises:
        InputError: they name no sample, or the file cannot be read.
    """
    return read_ids(ids or "", known) if file is None else read_ids(text_of(file), known, lines=True)


_NUMBER = re.compile("0|[1-9][0-9]{0,17}")


def read_ids(text: str, known: Iterable[Id], lines: bool = False) -> list[Id]:
    """The ids that a text names, one a line; where a line is none, by commas between (or spaces, if all are numbers),
    but not of a file, of which every line is one (``lines``).

    What is none of the ``known`` ids stays as it is, for the memory to refuse. Letters may be composed or not.

    Raises:
        InputError: it names none.
    """
    names = by_name(known)
    found: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):
        if line in names or composed(line.strip()) in names or lines:
            found.append(line if line in names else line.strip())
            continue
        words = [word.strip() for word in line.split(",")]
        numbers = all(part.isdecimal() for word in words for part in word.split())
        found += [part for word in words for part in word.split()] if numbers else words
    ids = [
        names.get(each, names.get(composed(each), int(each) if _NUMBER.fullmatch(each) else each))
        for each in found
        if each
    ]
    if not ids:
        raise InputError("the request names no sample.")
    return ids


def forgotten(images: Images, memory: Memory, named: list[Id] | None = None) -> list[Id]:
    """The ids of the samples that were forgotten and are in the data still: those that are named, or what of the data
    is not in the memory, apart from what was never in it: where that stands among the data, no member has left.

    Raises:
        InputError: nothing was forgotten, a named sample is a member or not in the data, or it cannot be told who was
            forgotten and who was never a member.
    """
    requests = memory.requests()
    gone = sum(each.certificate["samples"] for each in requests if each.kind == "forget")  # type: ignore[misc]
    if not gone:
        raise InputError("nothing has been forgotten in this run yet. Use: fastntk forget RUN --ids ...")
    members, known = set(memory.ids), set(images.ids)
    for each in named or ():
        if each in members or each not in known:
            where = "in the memory" if each in members else "not in the data"
            raise InputError(f"sample {each!r} is {where}: only what was forgotten, and is in the data, can be shown.")
    if named is not None:
        return named
    joined = sum(each.certificate["samples"] for each in requests if each.kind == "remember")  # type: ignore[misc]
    learned = sum(len(ids) for source, ids in images.by_source.items() if source)
    refreshed = any(each.kind == "refresh" for each in requests)
    strangers = [] if joined or refreshed else _strangers(images, memory)
    found = [each for each in images.ids if each not in members and each not in strangers]
    if len(found) > gone or (found and (joined != learned or (refreshed and len(found) < gone))):
        raise InputError(
            f"{len(found)} images of the data are not in the memory, and {gone} were forgotten: some may never have "
            "been in it. Say which were forgotten: --ids or --ids-file."
        )
    log.info(
        "shown as forgotten: %d images of the data that are not in the memory, of %d that were forgotten; %d others "
        "were never in it",
        *(len(found), gone, len(strangers)),
    )
    return found


def _strangers(images: Images, memory: Memory) -> set[Id]:
    """Who was never in the memory: between the members before and after, nobody has left.

    Raises:
        InputError: fewer have left there than there are images.
    """
    place = {each: position for position, each in enumerate(memory.state.members.by_position)}
    found: set[Id] = set()
    before, waiting = -1, list[Id]()
    for each in [*images.ids, None]:
        if each is not None and each not in place:
            waiting.append(each)
            continue
        here = len(memory.state.members.by_position) if each is None else place[each]
        left = here - before - 1
        if 0 < left < len(waiting):
            raise InputError(
                f"{len(waiting)} images of the data are where {left} were forgotten: some were never in the memory. "
                "Say which were forgotten: --ids or --ids-file."
            )
        if left <= 0:
            found.update(waiting)
        before, waiting = here, []
    return found


def warn_of_heads(memory: Memory, exact_head: bool) -> None:
    """Of requests since the latest refresh that a head should be solved for, and is not."""
    unfinished = (each for each in memory.requests() if each.certificate.get("verdict") == HEAD_NEEDED)
    if not exact_head and any(each.state != "re-anchored" for each in unfinished):
        log.warning("a request's verdict is %r: without it, part of a class is still taken for it", HEAD_NEEDED)


def warn_of_outputs(folder: Path, memory: Memory) -> None:
    """Of what export and evaluate have written into a run, under their usual names, before its latest request or
    refresh: it tells of who has left since."""
    left = [each.answered for each in memory.requests() if each.kind in ("forget", "refresh")]
    latest = datetime.fromisoformat(left[-1]).timestamp() if left else -math.inf
    there = (each for name in _OUTPUTS for each in folder.glob(name) if each.lstat().st_mtime < latest)
    if names := ", ".join(sorted(each.name for each in there)):
        log.warning(
            "%s holds what tells of samples that have left since: %s. Delete it, or write it anew.", folder, names
        )
