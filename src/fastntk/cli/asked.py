"""Which samples a request on the command line asks for."""

import unicodedata

from fastntk.common.errors import InputError
from fastntk.inputs.ids import Id
from fastntk.inputs.images import Images
from fastntk.memory.memory import Memory


def of_class(images: Images, class_name: str, memory: Memory) -> list[Id]:
    """The ids of a class's samples that are in the memory.

    Raises:
        InputError: there is no such class, or none of its samples is left.
    """
    if class_name not in images.classes:
        raise InputError(f"there is no class {class_name!r}. The classes are: {', '.join(images.classes)}.")
    members = (images.labels == images.classes.index(class_name)).nonzero()[:, 0].tolist()
    known = set(memory.ids)
    ids = [images.ids[index] for index in members if images.ids[index] in known]
    if not ids:
        raise InputError(f"no sample of class {class_name!r} is in the memory: it was forgotten already.")
    return ids


def read_ids(text: str, images: Images, lines: bool = False) -> list[Id]:
    """The ids that a text names, one a line; where a line is none, by commas between (or spaces, if all are numbers),
    but not of a file, of which every line is one (``lines``).

    What is no id of ``images`` stays as it is, for the memory to refuse. Letters may be composed or not.

    Raises:
        InputError: it names none.
    """
    known = {_composed(str(each)): each for each in images.ids} | {str(each): each for each in images.ids}
    found: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):
        if line in known or _composed(line.strip()) in known or lines:
            found.append(line if line in known else line.strip())
            continue
        words = [word.strip() for word in line.split(",")]
        numbers = all(part.isdecimal() for word in words for part in word.split())
        found += [part for word in words for part in word.split()] if numbers else words
    ids = [
        known.get(each, known.get(_composed(each), int(each) if each.isdecimal() else each)) for each in found if each
    ]
    if not ids:
        raise InputError("the request names no sample.")
    return ids


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)
