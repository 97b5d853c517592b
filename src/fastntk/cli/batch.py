"""Many requests from one file: each answered and certified by itself, all purged together, and told in a summary.

A file is a table with the columns request, owner, ids and date (a CSV with such a header, or a line of JSON a request):
what a request is called, whose samples or which, and when it came, which may be left out. Beside the summary there is a
folder of certificates, one a request that was answered; what has one is not asked again, so a batch that was cut off
goes on. Before a request is answered its file says that it is to be, and as the how-manieth of the memory's ledger: an
answer that is durable and whose certificate is not written yet is found again. A file has the request and its ids as
hashes under a salt of its own.
"""

import csv
import io
import json
import logging
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastntk.cli.asked import absent_members, nameable, owned, read_ids, with_copies
from fastntk.cli.options import text_of
from fastntk.cli.run import Run
from fastntk.common.errors import InputError
from fastntk.common.files import held, lock_of, read_json, writable, write, write_json
from fastntk.common.machine import now
from fastntk.common.progress import track
from fastntk.evidence.pages import page
from fastntk.inputs.ids import Id
from fastntk.inputs.images import Images
from fastntk.memory.memory import Memory
from fastntk.memory.request import hashed
from fastntk.memory.state import approximation

log = logging.getLogger(__name__)

ANSWERED, REFUSED = "answered", "refused, and nothing was changed for it"
GONE, UNKNOWN = "nothing of it was in the memory any more", "it names nothing in the data"
"""What became of a request."""

_COLUMNS = "request", "owner", "ids", "date"
_LONGEST = 80  # letters of a request's name in that of its certificate
_TITLE = "Requests for deletion from a trained model"


@dataclass(frozen=True)
class Asked:
    """A request of a file; ``owner`` and ``ids`` are empty where the other one is not. Of ``lines``, each is an id."""

    request: str
    owner: str
    ids: str
    date: str
    lines: bool = False

    @property
    def file(self) -> str:
        """Of its certificate."""
        plain = re.sub(r"[^\w.-]", "_", self.request)[:_LONGEST]
        digest = sha256(self.request.encode(errors="surrogateescape")).hexdigest()[:8]
        return f"{plain if plain == self.request else f'{plain}-{digest}'}.json"

    def hashed(self, salt: str) -> str:
        """All that it says, to know it again by: as ids are in a certificate, and no name can be tried without the
        salt."""
        return hashed([repr(astuple(self))], salt)[0]


def read_requests(path: Path) -> list[Asked]:
    """The requests of a file, in its order.

    Raises:
        InputError: it cannot be read, a row has no name or names not exactly one of owner and ids, or two rows are
            called alike, or an id has a line break.
    """
    text = text_of(path)
    rows = _lines_of_json(text, path) if text.lstrip().startswith("{") else _table(text, path)
    found: dict[str, Asked] = {}
    for number, row in enumerate(rows, 1):
        odd = sorted(set(row) - set(_COLUMNS))
        if odd:
            raise InputError(f"{path}: there is no column {odd[0]!r}; its columns are {', '.join(_COLUMNS)}.")
        listed = row.get("ids") if isinstance(row.get("ids"), list) else None
        if any("\n" in str(each) for each in listed or ()):
            raise InputError(f"{path}, request {number}: an id has a line break. Name that sample by its owner.")
        values = {**row, "ids": "\n".join(map(str, listed))} if listed is not None else row
        texts = ["" if values.get(name) is None else str(values[name]).strip() for name in _COLUMNS]
        asked = Asked(texts[0], texts[1], texts[2], texts[3], lines=listed is not None)
        if not asked.request or bool(asked.owner) == bool(asked.ids):
            raise InputError(f"{path}, request {number}: needs a name, and either an owner or ids.")
        said = asked.request + asked.owner + asked.date
        if any("\ud800" <= each <= "\udfff" for each in said):  # what stands for bytes that are no UTF-8
            raise InputError(f"{path}, request {number}: not all of it is text in UTF-8. Save the file as that.")
        if asked.request in found:
            raise InputError(f"{path}, request {number}: another one is called {asked.request!r} too.")
        found[asked.request] = asked
    if not found:
        raise InputError(f"{path} has no request in it.")
    return list(found.values())


def _table(text: str, path: Path) -> list[Mapping[str, Any]]:
    try:
        rows = list(csv.DictReader(io.StringIO(text.lstrip("\r\n"), newline=""), strict=True))
    except csv.Error as error:
        raise InputError(f"{path} cannot be read as a table ({error}).") from error
    rows = [row for row in rows if any(row.values())]  # spreadsheets end with lines of nothing
    if any(None in row for row in rows):
        raise InputError(f"{path}: a row has more entries than there are columns. Put what has commas into quotes.")
    return list(rows)


def _lines_of_json(text: str, path: Path) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(filter(str.strip, text.splitlines()), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, request {number} is no JSON ({error}).") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, request {number}: must be an object with {', '.join(_COLUMNS)}.")
        rows.append(row)
    return rows


def answer_all(
    opened: Run,
    asked: Sequence[Asked],
    out: Path,
    owners: Callable[[Images, Sequence[Id]], Mapping[Id, str]],
    copies: bool = False,
) -> dict[str, Any]:
    """Answer every request that has no certificate in ``out`` yet, purge, and write ``summary.json`` and
    ``summary.html`` there; returns the former. A request that is refused does not keep the others.

    Args:
        opened: the run.
        asked: the requests.
        out: a folder.
        owners: whose the images are, and members that are absent from them; called if a request names an owner.
        copies: whether what shows the same image as a sample of a request is taken with it.

    Raises:
        InputError: the folder cannot be written, another process writes it, or it has the certificate of another
            request under a name.
    """
    writable(out / "certificates")
    with held(lock_of(out), out):
        memory, images = opened.memory()
        everyone = nameable(images, memory)
        by_owner = any(each.owner for each in asked)
        whose = owners(images, absent_members(images, memory)) if by_owner else {}
        for each in asked:
            _check_own(memory, each, out)
        unowned = len(set(memory.ids) - set(whose)) if by_owner else None
        rows = [_told(memory, everyone, whose, each, out, copies) for each in track(asked, "requests")]
        members = set(memory.ids)
        for each, row in zip(asked, rows, strict=True):
            if row["became"] == ANSWERED and (back := len(members.intersection(_named(everyone, whose, each)[0]))):
                row["back"] = back  # who was remembered since
        seconds = opened.purge(memory)
        summary = {"run": str(opened.folder), "made": now(), "requests": rows, "unowned": unowned}
        summary |= _kept(memory, seconds)
        write_json(out / "summary.json", summary)
        write(out / "summary.html", lambda file: file.write_text(page("requests.html", title=_TITLE, **summary)))
        return summary


def _check_own(memory: Memory, asked: Asked, out: Path) -> None:
    """Raises ``InputError`` if the certificate under a request's name is of another one, or of another memory."""
    path = out / "certificates" / asked.file
    if not path.exists():
        return
    known = read_json(path)
    own = "salt" in known and known.get("asked") == asked.hashed(known["salt"])
    if own and "certificate" in known:
        hashes = known["certificate"]["hashes"]
        own = any(each.certificate.get("hashes") == hashes for each in memory.requests())
    if not own:
        raise InputError(
            f"{path} is not of the request {asked.request!r} as it stands in the file, or not of this memory. Choose "
            "another folder for --out, or another name for the request."
        )


def _told(
    memory: Memory, everyone: Sequence[Id], whose: Mapping[Id, str], asked: Asked, out: Path, copies: bool
) -> dict[str, Any]:
    """What became of a request. Neither an owner nor an id is said."""
    path = out / "certificates" / asked.file
    told: dict[str, Any] = {"request": asked.request, "date": asked.date, "by": "owner" if asked.owner else "ids"}
    known = read_json(path) if path.exists() else {}
    if (entry := _entered(memory, known)) is None:
        named, unknown = _named(everyone, whose, asked)
        members = set(memory.ids)
        there = [each for each in named if each in members]
        told |= {"unknown": unknown, "gone": len(named) - len(there), "samples": len(there)}
        if not there:
            return {**told, "became": GONE if named else UNKNOWN}
        try:
            known = _answered(memory, there, copies, asked, told, path)
        except InputError as error:
            path.unlink(missing_ok=True)
            log.warning("request %s: %s", asked.request, error)
            return {**told, "became": REFUSED}
        entry = _entered(memory, known)
        write_json(path, {**known, "number": entry.number})
    if "certificate" not in known:
        write_json(path, {**known, "certificate": dict(entry.certificate)})
    more = {"number": entry.number, "answered": entry.answered, "seconds": entry.seconds}
    said = {"verdict": entry.certificate["verdict"], "certificate": asked.file}
    return {**told, **known["told"], "became": ANSWERED, **more, **said}


def _answered(
    memory: Memory, there: list[Id], copies: bool, asked: Asked, told: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """What is known of a request, which is being answered, before in the file at ``path`` and after.

    Raises:
        InputError: it is refused.
    """
    salt, (there, found) = secrets.token_hex(16), with_copies(memory, there, copies)
    left = None if found.same is None else len(found.same)
    named = {"asked": asked.hashed(salt), "salt": salt, "hashes": hashed(there, salt)}
    told = {**told, "copies_taken": found.taken, "copies_left": left}
    known = {**named, "told": told, "number": len(memory.requests()) + 1}
    write_json(path, known)
    return {**known, "certificate": memory.forget(there).certificate.to_dict()}


def _entered(memory: Memory, known: Mapping[str, Any]) -> Any:
    """The ledger's entry of a request that was begun, if it was answered; None if not, or if none was begun.

    That of a certificate has its hashes. Of a request that was only begun, somebody else's may have its number: it was
    answered only if none of its samples is in the memory any more.
    """
    if not known:
        return None
    entries = [each for each in memory.requests() if each.kind == "forget"]
    if "certificate" in known:
        hashes = known["certificate"]["hashes"]
        return next(each for each in entries if each.certificate["hashes"] == hashes)
    if not set(known["hashes"]).isdisjoint(hashed(memory.ids, known["salt"])):
        return None
    return next((each for each in entries if each.number == known["number"]), None)


def _named(everyone: Sequence[Id], whose: Mapping[Id, str], asked: Asked) -> tuple[list[Id], int]:
    """The ids that a request names, of data and members, and how many of those that it names are of neither."""
    if asked.owner:
        return owned(whose, asked.owner), 0
    try:
        named = list(dict.fromkeys(read_ids(asked.ids, everyone, lines=asked.lines)))
    except InputError:  # separators alone
        return [], 0
    known = set(everyone)
    found = [each for each in named if each in known]
    return found, len(named) - len(found)


def _kept(memory: Memory, seconds: float) -> dict[str, Any]:
    """What is known of the memory after the purge, which took so many seconds."""
    audit = memory.audit
    return {
        "purged": all(each.state != "answered" for each in memory.requests()),
        "purge_seconds": seconds,
        "samples_left": len(memory.ids),
        "exact": memory.state.core is not None,
        "form": memory.form,
        "approximation": approximation(memory.state),
        "audit": None if audit is None else {"text": str(audit), "passed": audit.passed},
    }
