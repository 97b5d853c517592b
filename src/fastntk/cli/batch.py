"""Many requests from one file: each answered and certified by itself, all purged together, and told in a summary.

A file is a table with the columns request, owner, ids and date (a CSV with such a header, or a line of JSON a request):
what a request is called, whose samples or which, and when it came, which may be left out. Certificates are written into
a folder, one a request that was answered; what has one is not asked again, so a batch that was cut off goes on.
"""

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastntk.cli.asked import read_ids
from fastntk.cli.options import text_of
from fastntk.cli.run import Run
from fastntk.common.errors import InputError
from fastntk.common.files import read_json, writable, write, write_json
from fastntk.common.progress import track
from fastntk.evidence.pages import page
from fastntk.inputs.ids import Id
from fastntk.inputs.images import Images
from fastntk.memory.memory import Memory

COLUMNS = "request", "owner", "ids", "date"
"""Of a file of requests."""

ANSWERED, GONE, UNKNOWN = "answered", "nothing of it was in the memory any more", "it names nothing in the data"
"""What became of a request."""


@dataclass(frozen=True)
class Asked:
    """A request of a file; ``owner`` and ``ids`` are empty where the other one is not."""

    request: str
    owner: str
    ids: str
    date: str

    @property
    def file(self) -> str:
        """Of its certificate."""
        return re.sub(r"[^\w.-]", "_", self.request) + ".json"


def read_requests(path: Path) -> list[Asked]:
    """The requests of a file, in its order.

    Raises:
        InputError: it cannot be read, a row has no name or names not exactly one of owner and ids, or two rows are
            called alike.
    """
    text = text_of(path)
    rows = _lines_of_json(text, path) if text.lstrip().startswith("{") else _table(text, path)
    found: dict[str, Asked] = {}
    for number, row in enumerate(rows, 1):
        odd = sorted(set(row) - set(COLUMNS))
        if odd:
            raise InputError(f"{path}: there is no column {odd[0]!r}; its columns are {', '.join(COLUMNS)}.")
        asked = Asked(*(str(row.get(name) or "").strip() for name in COLUMNS))
        if not asked.request or bool(asked.owner) == bool(asked.ids):
            raise InputError(f"{path}, request {number}: needs a name, and either an owner or ids.")
        if asked.file in found:
            raise InputError(f"{path}, request {number}: another one is called {asked.request!r} too, or nearly so.")
        found[asked.file] = asked
    if not found:
        raise InputError(f"{path} has no request in it.")
    return list(found.values())


def _table(text: str, path: Path) -> list[Mapping[str, Any]]:
    try:
        return [{key or "": value for key, value in row.items()} for row in csv.DictReader(text.splitlines())]
    except csv.Error as error:
        raise InputError(f"{path} cannot be read as a table ({error}).") from error


def _lines_of_json(text: str, path: Path) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(filter(str.strip, text.splitlines()), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, request {number} is no JSON ({error}).") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, request {number}: must be an object with {', '.join(COLUMNS)}.")
        ids = row.get("ids")
        rows.append({**row, "ids": ",".join(map(str, ids)) if isinstance(ids, list) else ids})
    return rows


def answer_all(
    opened: Run, asked: Sequence[Asked], out: Path, owners: Callable[[Images], Mapping[Id, str]]
) -> dict[str, Any]:
    """Answer every request that has no certificate in ``out`` yet, purge, and write ``summary.json`` and
    ``summary.html`` there; returns the former.

    Args:
        opened: the run.
        asked: the requests.
        out: a folder.
        owners: whose the images are; called if a request names an owner.

    Raises:
        InputError: the folder cannot be written, or a request cannot be answered: those before it are.
    """
    writable(out)
    memory, images = opened.memory()
    whose = owners(images) if any(each.owner for each in asked) else {}
    rows = [_answered(memory, images, whose, each, out) for each in track(asked, "requests")]
    summary = {"run": str(opened.folder), "made": _now(), "requests": rows, **_kept(memory, opened.purge(memory))}
    write_json(out / "summary.json", summary)
    write(out / "summary.html", lambda file: file.write_text(page("requests.html", title=_TITLE, **summary)))
    return summary


_TITLE = "Requests for deletion from a trained model"


def _answered(memory: Memory, images: Images, whose: Mapping[Id, str], asked: Asked, out: Path) -> dict[str, Any]:
    """What became of a request. Neither an owner nor an id is said."""
    told = {"request": asked.request, "date": asked.date, "by": "owner" if asked.owner else "ids"}
    path = out / asked.file
    if path.exists():
        return {**told, **read_json(path)["told"]}
    known, members = set(images.ids), set(memory.ids)
    named = [each for each in images.ids if whose.get(each) == asked.owner] if asked.owner else []
    named = named or ([each for each in read_ids(asked.ids, images) if each in known] if asked.ids else [])
    there = [each for each in named if each in members]
    if not there:
        return {**told, "became": GONE if named else UNKNOWN, "samples": 0}
    answer = memory.forget(there)
    entry = memory.requests()[-1]
    became = {"became": ANSWERED, "samples": len(there), "number": entry.number, "answered": entry.answered}
    became |= {"seconds": answer.seconds, "verdict": answer.certificate.verdict, "certificate": asked.file}
    write_json(path, {"told": became, "certificate": answer.certificate.to_dict()})
    return {**told, **became}


def _kept(memory: Memory, seconds: float) -> dict[str, Any]:
    """What is known of the memory after the purge, which took so many seconds."""
    pending = sum(each.state == "answered" for each in memory.requests())
    audit = memory.audit
    return {
        "purged": pending == 0,
        "purge_seconds": seconds,
        "samples_left": len(memory.ids),
        "form": memory.form,
        "audit": None if audit is None else {"text": str(audit), "passed": audit.passed},
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
