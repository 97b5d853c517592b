"""Labelled images from folders, .npz files, Hugging Face and torchvision datasets."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastntk.common.errors import InputError, reason
from fastntk.common.plugins import Registry
from fastntk.inputs.images import Images, Preprocessing, rgb
from fastntk.inputs.libraries import datasets, torchvision

READERS: Registry[Callable[[str, Preprocessing, str], Images]] = Registry(
    "data", {}, callable, "a function of the text after its name and a colon, a Preprocessing and a split, to Images"
)
"""Of other packages, by the names that come before a colon."""

_HUGGING_FACE = "dataset_info.json", "dataset_dict.json"  # one of which is in a folder that it saved


@contextmanager
def _decoding(what: str) -> Iterator[None]:
    """Whatever goes wrong inside is said of ``what``: decoders raise all kinds of exceptions."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{what} does not decode as an image ({reason(error)}). Replace or remove it.") from error


class _Folder:
    """The images of an ImageFolder, read when asked for."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        with _decoding(self.paths[index]), Image.open(self.paths[index]) as image:
            return rgb(image)


def load_data(
    source: str,
    preprocessing: Preprocessing,
    *,
    split: str = "train",
    root: Path | str | None = None,
    id_column: str | None = None,
) -> Images:
    """Read labelled images.

    Args:
        source: a folder of class folders (torchvision ImageFolder; those that begin with a dot are left out), whose
            samples' ids are their paths in it, or a folder that has train, val and test with such folders in each; an
            ``.npz`` with arrays ``x`` (uint8, ``[N, H, W]`` or ``[N, H, W, 3]``) and ``y`` (integers), or ``x_train``,
            ``y_train``, ``x_test``, ``y_test``, optionally ``classes`` (names); a folder that ``save_to_disk`` of
            Hugging Face datasets wrote, with one column of images and one of class labels; the name of a torchvision
            dataset, found under ``root`` (never downloaded); or ``NAME:REST``, NAME being another package's reader.
        preprocessing: as the model wants it.
        split: ``"train"`` or ``"test"``, where the source has both (a folder: test, or else val).
        root: the folder of a torchvision dataset.
        id_column: the column (of an ``.npz``, the array) that names each sample for good; by default its index does.

    Raises:
        InputError: nothing of that name, a file that cannot be read, arrays of the wrong kind or length, ids that are
            missing or not each their own.
    """
    path = Path(source)
    if _is_hugging_face(path):
        return _from_hugging_face(path, preprocessing, split, id_column)
    if path.suffix == ".npz":
        return _from_npz(path, preprocessing, split, id_column)
    if id_column is not None:
        raise InputError(f"{source} has no columns: ids can be taken from an .npz or a Hugging Face dataset.")
    if path.is_dir():
        return _from_folder(path, preprocessing, split)
    name, colon, rest = source.partition(":")
    if colon and name in READERS:
        return READERS[name](rest, preprocessing, split)
    if isinstance(getattr(torchvision().datasets, source, None), type):
        return _from_torchvision(source, preprocessing, split, root)
    more = f", nor NAME:... with one of {READERS.listed()} for a name" if READERS else ""
    raise InputError(
        f"{source!r} is neither a folder, an .npz file nor a torchvision dataset name such as 'CIFAR10'{more}."
    )


def read_column(source: str, name: str, split: str = "train") -> list[Any]:
    """What a column of a Hugging Face dataset, or an array of an ``.npz``, says of every image of a split.

    Raises:
        InputError: the source has no columns, or not this one, or it cannot be read.
    """
    path = Path(source)
    if _is_hugging_face(path):
        stored = _stored(path, split)
        _check_column(stored, name, path)
        return list(stored.with_format(None)[name][:])
    if path.suffix != ".npz":
        raise InputError(f"{source} has no columns, so there is no {name!r}.")
    (labels, column), _ = _arrays(path, split, ("y", name))
    _check_one_each(path, name, column, labels)
    return [_text(each) for each in column.tolist()]


def _text(value: Any) -> Any:
    """Bytes as text, and all else as it is."""
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else value


def _is_hugging_face(path: Path) -> bool:
    return any((path / name).is_file() for name in _HUGGING_FACE)


def _check_column(stored: Any, name: str, path: Path) -> None:
    if name not in stored.features:
        raise InputError(f"{path} has no column {name!r}; it holds {', '.join(stored.features)}.")


def _named(column: Sequence[Any], source: Path) -> list[int | str]:
    """Ids from a column: whole numbers or text, each of them once."""
    odd = [each for each in column if not isinstance(each, int | np.integer | str | bytes)]
    if odd:
        raise InputError(f"{source}: an id is a whole number or text, not {odd[0]!r}. Choose another column.")
    ids: list[int | str] = [each if isinstance(each, str) else int(each) for each in map(_text, column)]
    if len(set(ids)) < len(ids):
        twice = next(each for each, count in Counter(ids).items() if count > 1)
        raise InputError(f"{source}: the id {twice!r} occurs more than once. Choose a column whose values are unique.")
    return ids


def _stored(path: Path, split: str) -> Any:
    """A split of a Hugging Face dataset, with rows in it."""
    library = datasets()
    try:
        stored = library.load_from_disk(str(path))
    except Exception as error:  # whatever a damaged one leads the library into
        raise InputError(f"{path} cannot be read as a Hugging Face dataset ({reason(error)}).") from error
    if isinstance(stored, library.DatasetDict):
        if split not in stored:
            raise InputError(f"{path} has no split {split!r}; it holds {', '.join(stored)}.")
        stored = stored[split]
    if not len(stored):
        raise InputError(f"{path} has no rows. Give a dataset with images in it.")
    return stored


def _from_hugging_face(path: Path, preprocessing: Preprocessing, split: str, id_column: str | None) -> Images:
    library, stored = datasets(), _stored(path, split)
    image, label = (_column(stored, kind, path) for kind in (library.Image, library.ClassLabel))
    stored = stored.with_format(None).cast_column(image, library.Image(decode=True))
    ids = None
    if id_column is not None:
        _check_column(stored, id_column, path)
        ids = _named(stored[id_column][:], path)
    labels = stored[label][:]
    if None in labels:
        raise InputError(f"row {labels.index(None)} of {path} has no label. Remove it.")
    return Images(_Column(stored, image, path), labels, stored.features[label].names, preprocessing, ids)


def _column(stored: Any, kind: type, path: Path) -> str:
    """The one column of that kind."""
    found = [name for name, feature in stored.features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        encode = " Labels of another type: class_encode_column." if kind.__name__ == "ClassLabel" else ""
        raise InputError(f"{path} needs one {kind.__name__} column, not {len(found)}. Cast or remove columns.{encode}")
    return found[0]


class _Column:
    """One entry of every item of a dataset, read when asked for."""

    def __init__(self, dataset: Any, key: str | int, name: Path | str) -> None:
        self.dataset, self.key, self.name = dataset, key, name

    def __getitem__(self, index: int) -> Any:
        with _decoding(f"row {index} of {self.name}"):
            return rgb(self.dataset[index][self.key])


_UNNAMED = 10_000  # classes without names that are more than there are images
_SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}


def _from_folder(path: Path, preprocessing: Preprocessing, split: str) -> Images:
    folder = _of_split(path, split)
    classes = _folders(folder)
    if not classes:
        raise InputError(f"{folder} has no class folders in it. Give a folder with one folder of images a class.")
    places = {name: place for place, name in enumerate(classes)}
    listing = torchvision().datasets.folder
    samples = listing.make_dataset(str(folder), places, listing.IMG_EXTENSIONS, allow_empty=True)
    looped = {place for place in {Path(name).parent for name, _ in samples} if _loops(place, folder)}
    samples = [each for each in samples if Path(each[0]).parent not in looped]
    if not samples:
        raise InputError(f"{folder} has no images in its class folders ({', '.join(classes)}).")
    names, labels = zip(*samples, strict=True)
    odd = [name for name in names if not Path(name).is_file()]
    if odd:
        raise InputError(f"{odd[0]} is no file that can be read (a broken link, or a pipe). Remove it.")
    ids = [Path(name).relative_to(path).as_posix() for name in names]
    return Images(_Folder(list(names)), list(labels), classes, preprocessing, ids)


def _loops(place: Path, top: Path) -> bool:
    """Whether a folder inside ``top`` is reached by a link to one that it lies in."""
    above = place.relative_to(top).parts
    real = [top.joinpath(*above[:depth]).resolve() for depth in range(len(above) + 1)]
    return len(set(real)) < len(real)


def _folders(path: Path) -> list[str]:
    return sorted(each.name for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))


def _of_split(path: Path, split: str) -> Path:
    """A folder's own, or that of a split if splits are all that is in it."""
    found, known = _folders(path), [name for names in _SPLITS.values() for name in names]
    if "train" not in found or not set(found) <= set(known):
        return path
    return next((path / name for name in _SPLITS[split] if name in found), path / "train")


def _arrays(path: Path, split: str, names: Sequence[str]) -> tuple[list[np.ndarray], list[str] | None]:
    """Arrays of a split of an ``.npz``, and the names of its classes."""
    if not path.is_file():
        raise InputError(f"there is no file {path}.")
    try:
        opened = np.load(path, allow_pickle=False)
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array alone")
        with opened as archive:
            keys = [key if "x" in archive else f"{key}_{split}" for key in names]
            absent = [key for key in keys if key not in archive]
            if absent:
                raise InputError(f"{path} has no array {absent[0]!r}; it holds {', '.join(archive.files)}.")
            arrays = [archive[key] for key in keys]
            classes = _class_names(archive["classes"], path) if "classes" in archive else None
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"{path} is too large for the memory that is free. Give a folder of images.") from error
    except Exception as error:  # a zip file may be damaged, locked or packed in many ways
        raise InputError(
            f"{path} cannot be read as an .npz file ({reason(error)}). It may be truncated: copy it again."
        ) from error
    return arrays, classes


def _check_one_each(path: Path, name: str, column: np.ndarray, labels: np.ndarray) -> None:
    """Raises ``InputError`` unless a column has one entry an image."""
    if column.shape != labels.shape:
        raise InputError(f"{path}: {name} must have one entry an image, not {list(column.shape)}.")


def _from_npz(path: Path, preprocessing: Preprocessing, split: str, id_column: str | None) -> Images:
    (x, y, *column), names = _arrays(path, split, ("x", "y", *([id_column] if id_column else [])))
    if id_column:
        _check_one_each(path, id_column, column[0], y)
    if x.dtype != np.uint8 or not x.size or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] != 3):
        raise InputError(f"{path}: images must be uint8 [N, H, W] or [N, H, W, 3], not {x.dtype} {list(x.shape)}.")
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer) or len(x) != len(y) or not len(y):
        raise InputError(
            f"{path}: needs one integer label an image, not {y.dtype} {list(y.shape)} for {len(x)} images."
        )
    ids = _named(column[0].tolist(), path) if column else None
    if names is None and int(y.max()) >= max(len(y), _UNNAMED):
        raise InputError(
            f"{path}: label {int(y.max())} of {len(y)} images would make as many classes. Name them: classes."
        )
    return Images(x, y.tolist(), names or [str(c) for c in range(int(y.max()) + 1)], preprocessing, ids)


def _class_names(given: np.ndarray, path: Path) -> list[str]:
    listed = given.tolist() if given.ndim == 1 else []
    names = [each.decode(errors="replace") if isinstance(each, bytes) else str(each) for each in listed]
    if not names or len(set(names)) < len(names):
        raise InputError(f"{path}: classes must be a list of names, each its own, one a class.")
    return names


def _from_torchvision(name: str, preprocessing: Preprocessing, split: str, root: Path | str | None) -> Images:
    if not root:
        raise InputError(f"the torchvision dataset {name} needs the folder that it lies in.")
    make = getattr(torchvision().datasets, name)
    accepted = inspect.signature(make).parameters
    options: dict[str, Any] = {"train": split == "train"} if "train" in accepted else {}
    options |= {"split": split} if "split" in accepted else {}
    try:
        dataset = make(root=str(root), **options)
    except Exception as error:  # each of its datasets says in its own way that it is not there
        raise InputError(f"torchvision cannot open {name} under {root} ({reason(error)}).") from error
    labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if labels is None:
        raise InputError(f"torchvision's {name} has no list of labels. Export it to a folder of class folders.")
    labels = torch.as_tensor(labels).tolist()
    classes = getattr(dataset, "classes", None) or [str(c) for c in range(max(labels) + 1)]
    return Images(_Column(dataset, 0, name), labels, list(classes), preprocessing)
