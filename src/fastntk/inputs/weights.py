"""Weights from local files: read without running code, fitted to a model, renamed by order."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastntk.common.errors import InputError
from fastntk.inputs.heads import head_parameters


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
    heads = [] if with_head else head_parameters(model)
    wanted = model.state_dict()
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
        if tensor.shape != wanted[name].shape:
            raise InputError(
                f"the weights do not fit the model: tensor {name!r} has shape {list(tensor.shape)}, the model needs "
                f"{list(wanted[name].shape)}."
            )
    model.load_state_dict(usable, strict=False)


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
