"""Models by name from timm and torchvision, with a new head, local weights and the model's own preprocessing."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastntk.compat import timm, torchvision
from fastntk.errors import InputError
from fastntk.tunable import head_name


@dataclass(frozen=True)
class Preprocessing:
    """What turns an image into the model's input: side in pixels, then ``(x / 255 - mean) / std`` per channel."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def load_model(
    name: str, classes: int, *, weights: Path | str | None = None, size: int | None = None, seed: int = 0
) -> tuple[nn.Module, Preprocessing]:
    """A model with a new head of ``classes`` classes, in eval mode, and the preprocessing it expects.

    Args:
        name: a timm name, or a torchvision name that timm does not have; ``torchvision/resnet18`` and ``timm/resnet18``
            say which where both have it.
        classes: C.
        weights: a local state dict (.safetensors, or .pt/.pth of tensors only) whose head is ignored if it has other
            classes; ``"pretrained"`` lets the library download its own; None keeps random weights.
        size: the side of the input images in pixels; by default the model's own.
        seed: of the head, N(0, 0.01^2) with bias 0, and of random weights.

    Raises:
        InputError: unknown name, a file that cannot be read, or weights that do not fit (the message names the tensor).
    """
    if classes < 2:
        raise InputError(f"a classifier needs at least 2 classes, got {classes}.")
    library, _, short = name.rpartition("/")
    if library not in ("", "timm", "torchvision"):
        raise InputError(f"unknown library {library!r} in {name!r}. Use 'timm/NAME', 'torchvision/NAME' or 'NAME'.")
    pretrained = weights == "pretrained"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if library != "torchvision" and short in timm().list_models():
            model, preprocessing = _from_timm(short, classes, size, pretrained)
        elif library != "timm" and short in torchvision().models.list_models(module=torchvision().models):
            model, preprocessing = _from_torchvision(short, classes, size, pretrained)
        else:
            raise InputError(f"neither timm nor torchvision has a model {name!r}.{_similar(short)}")
    if weights is not None and not pretrained:
        load_weights(model, read_weights(Path(weights)))
    reset_head(model, seed)
    return model.eval().to(memory_format=torch.channels_last), preprocessing  # type: ignore[call-overload]


def _similar(name: str) -> str:
    from difflib import get_close_matches

    known = {*timm().list_models(), *torchvision().models.list_models(module=torchvision().models)}
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
    model = models.get_model(name, weights="DEFAULT" if pretrained else None, **options)
    head = model.get_submodule(head_name(model))
    parent, _, child = head_name(model).rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Linear(head.in_features, classes))
    return model, Preprocessing(size or recipe.crop_size[0], tuple(recipe.mean), tuple(recipe.std))


def reset_head(model: nn.Module, seed: int) -> None:
    """Draw the head anew, in place: weights N(0, 0.01^2), bias 0."""
    head = model.get_submodule(head_name(model))
    assert isinstance(head, nn.Linear)  # head_name finds no other
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 0.01)
        if head.bias is not None:
            head.bias.zero_()


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict file, without running code from it.

    Raises:
        InputError: the file is missing, truncated, or holds something other than tensors by name.
    """
    if not path.is_file():
        raise InputError(f"there is no weights file {path}.")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} cannot be read as weights ({reason}). It may be truncated: copy it again.") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise InputError(f"{path} is not a state dict: a mapping of names to tensors. Save model.state_dict().")
    return dict(state)


def load_weights(model: nn.Module, state: Mapping[str, Tensor], *, with_head: bool = False) -> None:
    """Copy a state dict into ``model``, in place.

    Unless ``with_head``, the head may be missing or of another shape and then stays as it is.

    Raises:
        InputError: another tensor is missing, too many or of another shape.
    """
    head = None if with_head else head_name(model)
    wanted = model.state_dict()
    usable = {
        name: tensor
        for name, tensor in state.items()
        if not _in_head(name, head) or (name in wanted and wanted[name].shape == tensor.shape)
    }
    missing = [n for n in wanted if n not in usable and not _in_head(n, head) and not n.endswith("num_batches_tracked")]
    surplus = [name for name in usable if name not in wanted]
    for problem, names in (("lack", missing), ("have an unknown", surplus)):
        if names:
            raise InputError(
                f"the weights do not fit the model: they {problem} tensor {names[0]!r} ({len(names)} such). "
                "Give weights of this very architecture."
            )
    for name, tensor in usable.items():
        if tensor.shape != wanted[name].shape:
            raise InputError(
                f"the weights do not fit the model: tensor {name!r} has shape {list(tensor.shape)}, the model needs "
                f"{list(wanted[name].shape)}."
            )
    model.load_state_dict(usable, strict=False)


def _in_head(name: str, head: str | None) -> bool:
    return head is not None and name.startswith(f"{head}.")


def rename_by_order(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The backbone tensors of ``state`` under ``model``'s names, for weights that were saved under other names.

    Tensors are paired in order, batch counters skipped, and every pair must agree in shape; what ``state`` holds beyond
    the backbone (a head) is left out.

    Raises:
        InputError: a pair disagrees, or ``state`` is too short.
    """
    head = head_name(model)
    wanted = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not _in_head(name, head) and not name.endswith("num_batches_tracked")
    }
    given = [(name, tensor) for name, tensor in state.items() if not name.endswith("num_batches_tracked")]
    if len(given) < len(wanted):
        raise InputError(f"the weights hold {len(given)} tensors, the model's backbone needs {len(wanted)}.")
    renamed = {}
    for (name, tensor), (source, value) in zip(wanted.items(), given, strict=False):
        if tensor.shape != value.shape:
            raise InputError(
                f"the weights do not fit: {source!r} has shape {list(value.shape)}, {name!r} {list(tensor.shape)}."
            )
        renamed[name] = value
    return renamed
