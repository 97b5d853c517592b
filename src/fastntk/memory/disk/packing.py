"""A state as tensors and a record that JSON can hold, and back."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastntk.common.errors import InputError
from fastntk.common.files import digest
from fastntk.common.formats import Document
from fastntk.inputs.called import REPLACING, apart, state_at
from fastntk.jacobians.layout import Layout
from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.numerics import Numerics
from fastntk.jacobians.per_sample import PerSampleJacobian
from fastntk.memory.members import Members
from fastntk.memory.state import State
from fastntk.solve.forms import FORMS
from fastntk.tuning.losses import loss_from

_PLACES = ("fast", "slow", "head")  # of a layout


def pack(state: State) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state as tensors by name and a record: its network, its solution, and every other field as it says."""
    network, solution = state.network, state.solution
    tensors = {
        **{f"anchor.{name}": tensor for name, tensor in state.anchor.items()},
        **{f"solution.{name}": tensor for name, tensor in solution.tensors().items()},
        **{name: value for name in _own("tensor") if (value := getattr(state, name)) is not None},
    }
    return tensors, {
        **{name: _plain(getattr(state, name)) for name in _own("data")},
        "form": solution.name,
        "ridge": solution.ridge,
        "loss": asdict(network.loss),
        "numerics": network.numerics.to_dict(),
        "keep": network.keep,
        "layout": {name: list(getattr(network.layout, name)) for name in _PLACES},
        "names": list(state.anchor),
        "model": _frozen(state.model, state.anchor),
        "ids": list(state.members.by_position),
    }


def unpack(record: Document, model: nn.Module, source: Dataset) -> State:
    """The reverse of ``pack``, for the model and the data source that the memory is of.

    Args:
        record: the record, with the tensors under the key ``tensors``.
        model: the one that was prepared, in whatever mode it is; the memory's own is in eval mode.
        source: of the samples.

    Raises:
        InputError: it is another model's, or something is missing.
    """
    device = next(model.parameters()).device
    if record["form"] not in FORMS:
        raise InputError(f"{record.where} is of the form {record['form']!r}, which is none of {', '.join(FORMS)}.")
    stays = {f"solution.{name}" for name in FORMS[record["form"]].mapped}
    tensors = Document(on_device(record["tensors"], device, stays), record.where)
    anchor = {name: tensors[f"anchor.{name}"] for name in record["names"]}
    with REPLACING:
        shapes = {name: each.shape for name, each in model.named_parameters()}
    tuned = all(shapes.get(name) == tensor.shape for name, tensor in anchor.items())
    if not tuned or record["model"] != _frozen(model, anchor):
        differ = "frozen weights" if tuned else "tuned parameters or the classes"
        raise InputError(f"{record.where} belongs to another model: the {differ} differ. Open it with its own.")
    layout = Layout(
        **{name: tuple(record["layout"][name]) for name in _PLACES},
        shapes={name: tensor.shape for name, tensor in anchor.items()},
    )
    numerics, loss = Numerics.from_dict(record["numerics"]), loss_from(record["loss"])
    members = Members(source, record["ids"])
    own: dict[str, Any] = {
        **{name: tensors.get(name) if how["optional"] else tensors[name] for name, how in _own("tensor").items()},
        **{name: how["make"](record[name]) for name, how in _own("data").items()},
    }
    solved = {
        name.removeprefix("solution."): tensor for name, tensor in tensors.items() if name.startswith("solution.")
    }
    return State(
        Linearised(PerSampleJacobian(apart(model).eval(), anchor, layout), members, loss, numerics, record["keep"]),
        FORMS[record["form"]].restore(Document(solved, record.where), record["ridge"]),
        **own,
    )


def on_device(tensors: Mapping[str, Tensor], device: torch.device, stays: Collection[str] = ()) -> dict[str, Tensor]:
    """Copies of what was read: numbers where the model is, positions on the CPU; what ``stays`` mapped as it is.

    What is written to in place would be copied out of the mapped file page by page, ten times slower.
    """
    return {
        name: tensor
        if name in stays
        else tensor.to(device, copy=True)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in tensors.items()
    }


def _own(kind: str) -> dict[str, Mapping[str, Any]]:
    """The names of a state's fields that are kept so, and what they say of how."""
    return {each.name: each.metadata for each in fields(State) if each.metadata.get("kept") == kind}


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _frozen(model: nn.Module, tuned: Mapping[str, Tensor]) -> str:
    """A digest of everything in the model's state that is not tuned."""
    own = {id(tensor) for tensor in tuned.values()}  # which are under all names that a parameter has
    return digest({name: tensor for name, tensor in state_at(model, tuned).items() if id(tensor) not in own})
