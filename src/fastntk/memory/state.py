"""A memory as tensors and a record that JSON can hold, and back; and its requests as journals."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastntk.common.errors import InputError
from fastntk.common.files import digest
from fastntk.jacobians.combinations import ClassProbes
from fastntk.jacobians.jacobian import Jacobian, Layout, PerSampleJacobian
from fastntk.jacobians.linearised import Linearised
from fastntk.memory.disk.folder import Contents
from fastntk.memory.members import Members
from fastntk.solve.iterative import GramOperator, MatrixFreeSolution
from fastntk.solve.primal import DualSolution, PrimalSolution
from fastntk.solve.ridge import Calibration
from fastntk.solve.solution import Update
from fastntk.solve.sums import Rows
from fastntk.tuning.loss import loss_from

Solution = PrimalSolution | DualSolution | MatrixFreeSolution
"""The linear problem over the members, solved, in one of its forms."""


@dataclass
class State:
    """What a memory is made of; see there."""

    linearised: Linearised
    solution: Solution
    residuals: Float[Tensor, "positions outputs"]
    calibration: Calibration | None
    order: Int[Tensor, " positions"]
    probe: int
    record: Mapping[str, Any]
    vector: Float[Tensor, " p"]
    short_of_head: Float[Tensor, "classes features"] | None


def pack(state: State) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state as tensors by name and a record."""
    linearised, solution, calibration = state.linearised, state.solution, state.calibration
    anchor, layout, members = linearised.jacobian.parameters, linearised.layout, linearised.train
    tensors = {
        **{f"anchor.{name}": tensor for name, tensor in anchor.items()},
        **{f"solution.{name}": tensor for name, tensor in solution.tensors().items()},
        **{name: getattr(state, name) for name in ("residuals", "order", "vector")},
        **({} if state.short_of_head is None else {"short_of_head": state.short_of_head}),
    }
    return tensors, {
        **state.record,
        "form": solution.form,
        "ridge": solution.ridge,
        "probe": state.probe,
        "loss": asdict(linearised.loss),
        "precision": linearised.precision,
        "batch_size": linearised.batch_size,
        "class_probes": asdict(linearised.probes) if linearised.probes else None,
        "calibration": asdict(calibration) if calibration else None,
        "layout": {name: list(getattr(layout, name)) for name in ("fast", "slow", "head")},
        "names": list(anchor),
        "model": _frozen(linearised.jacobian.model, anchor),
        "ids": cast(Members, members).ids,
    }


def unpack(contents: Contents, model: nn.Module, train: Dataset, folder: Path) -> State:
    """The reverse of ``pack``, for the model and the data source that the memory in ``folder`` is of.

    Raises:
        InputError: it is another model's.
    """
    device, record = next(model.parameters()).device, contents.record
    # copies: what is written to in place would be copied out of the mapped file page by page, ten times slower
    tensors = {name: tensor.to(device, copy=True) for name, tensor in contents.tensors.items()}
    anchor = {name: tensors[f"anchor.{name}"] for name in record["names"]}
    if record["model"] != _frozen(model, anchor):
        raise InputError(
            f"the memory {folder} belongs to another model: the frozen weights differ. Open it with its own."
        )
    shapes = {name: tensor.shape for name, tensor in anchor.items()}
    layout = Layout(**{name: tuple(names) for name, names in record["layout"].items()}, shapes=shapes)
    members = Members(train, record["ids"])
    linearised = Linearised(
        PerSampleJacobian(model, anchor, layout),
        members,
        loss_from(record["loss"]),
        batch_size=record["batch_size"],
        precision=record["precision"],
        probes=ClassProbes(**record["class_probes"]) if record["class_probes"] else None,
    )
    solution = _solution(tensors, record, GramOperator(linearised, members.present.nonzero()[:, 0].tolist()))
    calibration = Calibration(**record["calibration"]) if record["calibration"] else None
    made = {key: record[key] for key in ("versions", "options")}
    order, vector = tensors["order"].cpu(), tensors["vector"]
    rest = calibration, order, record["probe"], made, vector, tensors.get("short_of_head")
    return State(linearised, solution, tensors["residuals"], *rest)


def journal(update: Update, vector: Float[Tensor, " p"], joined: Tensor | None) -> dict[str, Tensor]:
    """What it takes to make an update again: the samples' rows, or the change where the form needs none of them.

    ``vector`` are the parameters after it, ``joined`` the residuals of who joins, if anybody does.
    """
    tensors = {"positions": update.positions, "vector": vector}
    if update.rows:
        jacobian = update.rows.jacobian
        tensors |= {"rest": jacobian.rest, "features": jacobian.features, "residual": update.rows.residual}
    elif update.reached is not None:
        tensors |= {"change": update.change, "reached": torch.tensor(update.reached, dtype=torch.float64)}
    return tensors if joined is None else {**tensors, "residual": joined}


def replayed(tensors: Mapping[str, Tensor], sign: int, solution: Solution) -> Update:
    """The update of the solution that a journal holds."""
    positions = tensors["positions"]
    if "change" in tensors:
        return Update(tensors["change"], positions, sign, reached=float(tensors["reached"]))

    def rows(_: Tensor) -> Rows:
        return Rows(Jacobian(tensors["rest"], tensors["features"]), tensors["residual"])

    return solution.update(positions, rows, sign)


def _solution(tensors: Mapping[str, Tensor], record: Mapping[str, Any], operator: GramOperator) -> Solution:
    """The stored solution, in its form; ``operator`` is over the members."""
    parts = {name.removeprefix("solution."): tensor for name, tensor in tensors.items() if name.startswith("solution.")}
    if record["form"] == "matrix-free":
        return MatrixFreeSolution.from_tensors(parts, record["ridge"], operator)
    make = PrimalSolution if record["form"] == "primal" else DualSolution
    return make.from_tensors(parts, record["ridge"])


def _frozen(model: nn.Module, tuned: Mapping[str, Tensor]) -> str:
    """A digest of everything in the model's state that is not tuned."""
    return digest({name: tensor for name, tensor in model.state_dict().items() if name not in tuned})
