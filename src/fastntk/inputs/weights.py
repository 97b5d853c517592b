"""Weights in local files: read without running code, fitted to a model, renamed by order, written."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastntk.common.errors import InputError, reason
from fastntk.common.files import write, write_tensors
from fastntk.inputs.heads import head_parameters

_T = TypeVar("_T")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict file, without running code from it.

    Raises:
        InputError: the file is missing, truncated, or holds something other than tensors by name.
    """
    if not path.is_file():
        raise InputError(f"there is no weights file {path}.")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except PermissionError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from error
    except Exception as error:  # whatever bytes that are none lead the readers into
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise InputError(
                f"{path} holds more than tensors, which cannot be read without running its code. Save "
                "model.state_dict() alone: torch.save(model.state_dict(), FILE)."
            ) from error
        raise InputError(
            f"{path} cannot be read as weights ({reason(error)}). It may be truncated: copy it again."
        ) from error
    found = [each for each in (state, *_inner(state)) if _is_state(each)]
    if not found:
        raise InputError(f"{path} is not a state dict: a mapping of names to tensors. Save model.state_dict().")
    return dict(found[0])


def _inner(state: Any) -> list[Any]:
    """What a training checkpoint has under the names that are usual for the model."""
    return [state[key] for key in _USUAL if key in state] if isinstance(state, Mapping) else []


def _is_state(state: Any) -> bool:
    return isinstance(state, Mapping) and bool(state) and all(_is_entry(*each) for each in state.items())


def _is_entry(name: Any, tensor: Any) -> bool:
    """Whether it is a name with a tensor of plain numbers."""
    return isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided


def check_state_file(path: Path) -> None:
    """Raises ``InputError`` for a name that no state dict is written under."""
    if path.suffix not in _WRITERS:
        raise InputError(f"{path} must end in {' or '.join(_WRITERS)}.")


def write_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """A state dict, in the format that the name of the file says."""
    check_state_file(path)
    _WRITERS[path.suffix](path, {name: tensor.detach().cpu() for name, tensor in state.items()})


def _pickled(path: Path, state: dict[str, Tensor]) -> None:
    write(path, lambda file: torch.save(state, file))


_WRITERS: dict[str, Callable[[Path, dict[str, Tensor]], None]] = {
    ".safetensors": write_tensors,
    ".pt": _pickled,
    ".pth": _pickled,
}
_USUAL = "state_dict", "model_state_dict", "model", "module", "net"


def load_weights(model: nn.Module, state: Mapping[str, Tensor], *, with_head: bool = False) -> None:
    """Copy a state dict into ``model``, in place. A prefix that all its names have (``module.`` of DataParallel,
    ``_orig_mod.`` of torch.compile) and the model's have not is left out.

    One that all the model's names have and the state's have not (``model.`` of ``fastntk.Logits``) is added. Unless
    ``with_head``, the head may be missing or of another shape and then stays as it is.

    Raises:
        InputError: another tensor is missing, too many or of another shape.
    """
    heads = [] if with_head else head_parameters(model)
    wanted = model.state_dict()
    state = named_as(wanted, state)
    usable = {
        name: tensor
        for name, tensor in state.items()
        if not _in_head(name, heads) or (name in wanted and wanted[name].shape == tensor.shape)
    }
    missing = [
        n for n in wanted if n not in usable and not _in_head(n, heads) and not n.endswith("num_batches_tracked")
    ]
    surplus = [name for name in usable if name not in wanted]
    for problem, names in (("lack", missing), ("have an unknown", surplus)):
        if names:
            raise InputError(
                f"the weights do not fit the model: they {problem} tensor {names[0]!r} ({len(names)} such). "
                "Give weights of this very architecture."
            )
    for name, tensor in usable.items():
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"the weights have NaN or infinite values in tensor {name!r}. Give those of another epoch."
            )
        if tensor.shape != wanted[name].shape:
            raise InputError(
                f"the weights do not fit the model: tensor {name!r} has shape {list(tensor.shape)}, the model needs "
                f"{list(wanted[name].shape)}."
            )
    model.load_state_dict(usable, strict=False)


def named_as(wanted: Collection[str], given: Mapping[str, _T]) -> Mapping[str, _T]:
    """What is given, without a prefix that all its names have and none of the wanted, or with one that all of these
    have and none of its."""
    named = dict(given)
    while not set(named) & set(wanted) and len({name.partition(".")[0] for name in named}) == 1 and "." in min(named):
        named = {name.partition(".")[2]: each for name, each in named.items()}
    if set(named) & set(wanted):
        return named
    first, dot, _ = min(wanted, default="").partition(".")
    added = {f"{first}{dot}{name}": each for name, each in given.items()}
    shared = dot and all(name.startswith(f"{first}.") for name in wanted)
    return added if shared and set(added) & set(wanted) else given


def _in_head(name: str, heads: Sequence[str]) -> bool:
    """Whether it is of the head, or beside it in the same layer."""
    owner = name.rpartition(".")[0]
    return name in heads or (owner != "" and owner in {each.rpartition(".")[0] for each in heads})


def rename_by_order(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The backbone tensors of ``state`` under ``model``'s names, for weights that were saved under other names.

    Tensors are paired in order, batch counters skipped, and every pair must agree in shape; what ``state`` holds beyond
    the backbone (a head) is left out.

    Raises:
        InputError: a pair disagrees, or ``state`` is too short.
    """
    heads = head_parameters(model)
    wanted = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not _in_head(name, heads) and not name.endswith("num_batches_tracked")
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
