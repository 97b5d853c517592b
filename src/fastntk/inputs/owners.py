"""Whose each sample is, which is what a deletion request names."""

import csv
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from fastntk.common.errors import InputError
from fastntk.inputs.ids import Id, by_name, composed
from fastntk.inputs.images import Images
from fastntk.inputs.sources import read_column

log = logging.getLogger(__name__)


def owners_of(spec: str, source: str, images: Images, absent: Sequence[Id] = ()) -> dict[Id, str]:
    """The owner of every sample that has one, by its id.

    Args:
        spec: a ``FILE.csv`` with a header, then an id and an owner in every row; a regular expression with one group,
            which an id's owner is, such as ``^[^/]+/([^/]+)/``, of an image that was learned by what its id is in its
            own source; or the column (of an ``.npz``, the array) of the source that names it.
        source: where the images come from, as ``load_data`` takes it.
        images: of it, and of others that were learned.
        absent: other samples, which the source does not have any more: a column says nothing of them, which is said.

    Raises:
        InputError: the file or column cannot be read, an id has two owners, the expression is none or has not one
            group, or nobody owns anything.
    """
    if spec.lower().endswith(".csv"):
        found = _from_file(Path(spec), [*images.ids, *absent])
    elif "(" in spec:
        found = _by_pattern(spec, images, absent)
    else:
        found = _by_column(spec, source, images)
        if absent:
            log.warning(
                "the images of %d members are not in the data: whose they are is not known, and requests by owner "
                "leave them where they are",
                len(absent),
            )
    if not found:
        raise InputError(f"{spec!r} gives none of the {len(images):,} images an owner.")
    for learned, ids in images.by_source.items():
        if learned and (lacking := sum(each not in found for each in ids)):
            log.warning("%d of %d images learned from %s have no owner by %r", lacking, len(ids), learned, spec)
    return found


def _by_column(name: str, source: str, images: Images) -> dict[Id, str]:
    found: dict[Id, str] = {}
    for learned, ids in images.by_source.items():
        try:
            column = read_column(learned or source, name)
        except InputError as error:
            if not learned:
                raise
            log.warning("%s", error)
            continue
        if len(column) != len(ids):
            raise InputError(f"{learned or source} has {len(column):,} rows, and there are {len(ids):,} images of it.")
        found |= {each: str(owner) for each, owner in zip(ids, column, strict=True) if owner not in (None, "")}
    return found


def _from_file(path: Path, ids: Sequence[Id]) -> dict[Id, str]:
    """Rows of images that are not in the data any more are left out, and counted: they may have been removed."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header, *rows = list(csv.reader(file, strict=True)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a table of ids and owners ({error}).") from error
    known, found, strange = by_name(ids), dict[Id, str](), 0
    if header and known.get(composed(header[0].strip())) is not None:
        raise InputError(f"{path} has no header: its first row names an image. Begin it with: id,owner")
    for number, row in enumerate(rows, 2):
        if not row:
            continue
        if len(row) < 2:
            raise InputError(f"{path}, row {number}: needs an id and an owner, not {row!r}.")
        name, owner = row[0], row[1].strip()
        each = known.get(name, known.get(composed(name.strip())))
        strange += each is None
        if each is not None and found.setdefault(each, owner) != owner:
            raise InputError(f"{path}, row {number}: {name!r} has an owner already. Give each sample one.")
    if strange:
        log.warning("%s: %d of %d rows name no image of the data", path, strange, len(rows))
    return {each: owner for each, owner in found.items() if owner}


def _by_pattern(pattern: str, images: Images, absent: Sequence[Id]) -> dict[Id, str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise InputError(f"{pattern!r} is no regular expression ({error}).") from error
    if expression.groups != 1:
        raise InputError(f"{pattern!r} must have one group, which is the owner, not {expression.groups}.")
    begins = [f"{Path(learned).name}/" if learned else "" for learned in images.by_source]
    named = [(each, begin) for begin, ids in zip(begins, images.by_source.values(), strict=True) for each in ids]
    longest = sorted(begins, key=len, reverse=True)  # of whom nothing is known but the id
    named += [(each, begin) for each in absent for begin in longest if str(each).startswith(begin)]
    found: dict[Id, str] = {}
    for each, begin in named:
        match = expression.search(str(each).removeprefix(begin))
        if match and match[1]:
            found.setdefault(each, match[1])
    return found
