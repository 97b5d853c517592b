"""Who makes the model of a name: timm, torchvision, transformers, or a file of the user's."""

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastntk.common.errors import InputError, reason
from fastntk.inputs.heads import head_modules, head_parameters
from fastntk.inputs.images import Preprocessing
from fastntk.inputs.libraries import timm, torchvision, transformers

LIBRARIES = ("timm", "torchvision", "transformers")


class Logits(nn.Module):
    """A transformers classifier as a function from images to logits.

    Args:
        model: the classifier.
        bgr: whether it takes its channels the other way round.
    """

    def __init__(self, model: nn.Module, bgr: bool = False) -> None:
        super().__init__()
        self.model, self.bgr = model, bgr

    def forward(self, images: Tensor) -> Tensor:
        """``[batch, 3, side, side]`` to ``[batch, C]``."""
        return self.model(pixel_values=images.flip(1) if self.bgr else images).logits


Make = Callable[[int, int | None, bool], tuple[nn.Module, Preprocessing]]
"""Classes, side or None, and whether the library's own weights are wanted, to a model and its preprocessing."""


def resolved(name: str) -> tuple[str, str]:
    """The library whose model it is, or ``"file"`` for a function of the user's, and the name that it has there.

    Raises:
        InputError: nobody has it.
    """
    if name.rpartition(":")[0].endswith(".py"):
        return "file", name
    library, slash, short = name.partition("/")
    if not slash:
        library, short = "", name
    elif library not in LIBRARIES:
        raise InputError(f"unknown library {library!r} in {name!r}. Use one of {', '.join(LIBRARIES)}, as 'timm/NAME'.")
    if library == "transformers":
        return library, short
    if library != "torchvision" and short in timm().list_models():
        return "timm", short
    if library != "timm" and short in torchvision().models.list_models(module=torchvision().models):
        return "torchvision", short
    nobody = f"{library} has no" if library else "neither timm nor torchvision has a"
    raise InputError(f"{nobody} model {short!r}.{_similar(short)}")


def maker(name: str) -> Make:
    """Who makes the model of that name. Raises like ``resolved``."""
    library, short = resolved(name)
    make = _MAKERS[library]
    return lambda *how: make(short, *how)


def list_models(pattern: str = "") -> list[str]:
    """The names that ``load_model`` knows and that contain ``pattern``, with their library."""
    known = [f"timm/{name}" for name in timm().list_models()]
    known += [f"torchvision/{name}" for name in torchvision().models.list_models(module=torchvision().models)]
    try:
        auto = transformers().models.auto
        known += [f"transformers/{name}" for name in auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES]
    except InputError:  # it is not installed
        pass
    return [name for name in known if pattern in name]


def _similar(name: str) -> str:
    from difflib import get_close_matches

    known = {each.partition("/")[2] for each in list_models()}
    close = get_close_matches(name, sorted(known), 3, 0.5)
    return f" Did you mean {', '.join(close)}?" if close else ""


def _from_timm(name: str, classes: int, size: int | None, pretrained: bool) -> tuple[nn.Module, Preprocessing]:
    model = timm().create_model(name, num_classes=classes, pretrained=pretrained)
    config = model.pretrained_cfg
    if size and config.get("fixed_input_size"):
        model = timm().create_model(name, num_classes=classes, pretrained=pretrained, img_size=size)
    return model, Preprocessing(size or config["input_size"][-1], tuple(config["mean"]), tuple(config["std"]))


def _from_torchvision(name: str, classes: int, size: int | None, pretrained: bool) -> tuple[nn.Module, Preprocessing]:
    models = torchvision().models
    recipe = models.get_model_weights(name)["DEFAULT"].transforms()
    options: dict[str, Any] = {"image_size": size} if size and name.startswith("vit_") else {}
    model = drawn = models.get_model(name, num_classes=classes, **options)
    if pretrained:
        model = models.get_model(name, weights="DEFAULT", **options)
        for head in head_modules(drawn):
            model.set_submodule(head, drawn.get_submodule(head))
    return model, Preprocessing(size or recipe.crop_size[0], tuple(recipe.mean), tuple(recipe.std))


def _from_transformers(name: str, classes: int, size: int | None, pretrained: bool) -> tuple[nn.Module, Preprocessing]:
    auto = transformers()
    stored = pretrained or (Path(name) / "config.json").is_file()
    try:
        config = auto.AutoConfig.from_pretrained(name) if stored else auto.AutoConfig.for_model(name)
        config.num_labels = classes
        config.architectures = config.architectures or []  # which some types of transformers fail without
        if size and hasattr(config, "image_size"):
            config.image_size = size
        processor = processor_of(name if stored else None, config)
        preprocessing, bgr = _preprocessing(processor, config, size), getattr(processor, "do_flip_channel_order", False)
        if not stored:
            return Logits(auto.AutoModelForImageClassification.from_config(config), bgr), preprocessing
        model, found = auto.AutoModelForImageClassification.from_pretrained(
            name, config=config, ignore_mismatched_sizes=True, output_loading_info=True, dtype=torch.float32
        )
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"transformers has no image classifier {name!r} ({reason(error)}). Give a folder that "
            "save_pretrained wrote, model and image processor, or one of its types, as 'transformers/vit'."
        ) from error
    wrapped = Logits(model, bgr)
    lacking = {
        each[0] if isinstance(each, tuple) else each
        for key in ("missing_keys", "mismatched_keys")
        for each in found[key]
    }
    lacking -= {name.removeprefix("model.") for name in head_parameters(wrapped)}
    if lacking:
        raise InputError(
            f"the weights in {name} do not fit the model: {sorted(lacking)[0]!r} is missing or of another shape "
            f"({len(lacking)} such). If a side of {size} pixels was asked for, leave it out."
        )
    return wrapped, preprocessing


def processor_of(name: str | None, config: Any) -> Any:
    """The image processor that was saved with a transformers model, or the default one of its type."""
    if name is not None:
        return transformers().AutoImageProcessor.from_pretrained(name)
    kinds = transformers().models.auto.image_processing_auto.IMAGE_PROCESSOR_MAPPING[type(config)]
    return next(iter(kinds.values()))()


def _preprocessing(processor: Any, config: Any, size: int | None) -> Preprocessing:
    """As the processor does it.

    Raises:
        InputError: it does what ``Preprocessing`` cannot say.
    """
    normal, bgr = getattr(processor, "do_normalize", True), getattr(processor, "do_flip_channel_order", False)
    scale = getattr(processor, "rescale_factor", 1 / 255) if getattr(processor, "do_rescale", True) else 1.0
    if abs(255 * scale - 1) > 1e-6 or getattr(processor, "rescale_offset", False) or (normal and bgr):
        raise InputError(
            f"{type(processor).__name__} scales or flips pixels in a way that is not done here. Wrap the model in a "
            "function of your own: FILE.py:FUNCTION."
        )
    own = getattr(config, "image_size", None)
    own = own[0] if isinstance(own, tuple | list) else own
    own = own or processor.size.get("height") or processor.size.get("shortest_edge")
    mean, std = (tuple(processor.image_mean), tuple(processor.image_std)) if normal else ((0.0,) * 3, (1.0,) * 3)
    if normal and getattr(processor, "include_top", False):  # EfficientNet's: divided by std once more
        std = tuple(each**2 for each in std)
    return Preprocessing(int(size or own), mean, std)


def _from_file(name: str, classes: int, size: int | None, pretrained: bool) -> tuple[nn.Module, Preprocessing]:
    """What a user's own function makes."""
    file, _, function = name.rpartition(":")
    path = Path(file)
    if pretrained:
        raise InputError(f"{path} says itself what its model starts from: leave 'pretrained' out, or name a file.")
    if not path.is_file():
        raise InputError(f"there is no file {path} with a model in it.")
    spec = importlib.util.spec_from_file_location(f"fastntk_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    with _running(path):
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    make = getattr(module, function, None)
    if not callable(make):
        raise InputError(f"{path} has no function {function!r}.")
    with _running(path):
        made = make(classes)
    model, own = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not (isinstance(model, nn.Module) and isinstance(own, Preprocessing)):
        raise InputError(f"{function} of {path} must return a module and its fastntk.Preprocessing.")
    return model, Preprocessing(size or own.size, own.mean, own.std)


@contextmanager
def _running(path: Path) -> Iterator[None]:
    """The user's file, which may import from beside it.

    Raises:
        InputError: it fails; the message names its last line that was reached.
    """
    beside = str(path.resolve().parent)
    sys.path.insert(0, beside)
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, InputError):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
        place = f", line {lines[-1]}" if lines else ""
        raise InputError(f"{path}{place} fails ({type(error).__name__}: {error}).") from error
    finally:
        sys.path.remove(beside)


_MAKERS: dict[str, Callable[..., tuple[nn.Module, Preprocessing]]] = {
    "file": _from_file,
    "timm": _from_timm,
    "torchvision": _from_torchvision,
    "transformers": _from_transformers,
}
