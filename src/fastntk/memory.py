"""What one pass over the training data leaves behind, so that samples can be forgotten from then on.

The memory linearises the network at the anchor ``theta*`` (the tuned parameters after fitting) and holds the solution
of the linear problem over all samples that are still in it. Forgetting takes samples out of the solution; the retained
ones are not computed again.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastntk.certificate import Certificate, change_of_logits, rms
from fastntk.errors import InputError
from fastntk.files import digest, read_tensors, write_tensors
from fastntk.jacobian import Layout, PerSampleJacobian
from fastntk.linearised import Linearised
from fastntk.loss import SquaredLoss
from fastntk.matrix_free import GramOperator, MatrixFreeSolution
from fastntk.planning import Form
from fastntk.probes import ClassProbes
from fastntk.ridge import Calibration
from fastntk.statistics import Rows
from fastntk.step import DualSolution, PrimalSolution

Solution = PrimalSolution | DualSolution | MatrixFreeSolution
"""The linear problem over the samples that are left, solved, in one of its forms."""


@dataclass(frozen=True)
class Forgotten:
    """The answer to a request: the tuned parameters without the samples, the time it took, and how sure it is.

    ``model.load_state_dict(forgotten.parameters, strict=False)`` puts them into the model.
    """

    parameters: dict[str, Tensor]
    seconds: float
    certificate: Certificate


class Memory:
    """The linear problem over the samples that are still remembered. Made by ``prepare``; ``forget`` updates it.

    Attributes:
        parameters: the tuned parameters without what has been forgotten; at first those of the fitted model.
        ridge: the total L2 pull toward the parameters before fitting, the same for every request.
        calibration: how an automatic ridge was found, or None for a given one.
        present: which samples of the training set are still in the memory.
    """

    def __init__(
        self,
        linearised: Linearised,
        solution: Solution,
        calibration: Calibration | None,
        present: Bool[Tensor, " samples"],
        order: Int[Tensor, " samples"],
        probe: int,
        vector: Float[Tensor, " p"] | None = None,
    ) -> None:
        self.linearised, self.solution, self.calibration, self.present = linearised, solution, calibration, present
        self._order, self._probe = order, probe
        self._vector = self._layout.flatten(self.anchor) if vector is None else vector

    @property
    def model(self) -> nn.Module:
        """The fitted model; its tuned parameters may have moved since."""
        return self.linearised.jacobian.model

    @property
    def train(self) -> Dataset:
        """The training set, whose indices are the ids."""
        return self.linearised.train

    @property
    def anchor(self) -> dict[str, Tensor]:
        """``theta*``: the tuned parameters of the fitted model, where it is linearised."""
        return self.linearised.jacobian.parameters

    @property
    def _layout(self) -> Layout:
        return self.linearised.layout

    @property
    def ridge(self) -> float:
        """The total ridge of every request."""
        return self.solution.ridge

    @property
    def displacement(self) -> Float[Tensor, " p"]:
        """``u = theta* - theta_0``."""
        return self.solution.displacement

    @property
    def form(self) -> Form:
        """``"primal"`` (p x p), ``"dual"`` (nC x nC) or ``"matrix-free"``."""
        return self.solution.form

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The tuned parameters after everything forgotten so far."""
        return self._layout.unflatten(self._vector, self.anchor)

    def forget(self, ids: Iterable[int]) -> Forgotten:
        """Take the samples with the given ids (indices into the training set) out of the memory.

        Returns:
            The new parameters ``theta* + s(R) - s(D)``, where D is what was prepared and R what now remains; the model
            itself is not changed.

        Raises:
            InputError: an id twice, out of range or already forgotten, or no sample would remain. Nothing changes then.
        """
        started = time.perf_counter()
        positions = self._positions(ids)
        removal = self.solution.removal(positions, self.rows) if len(positions) else None
        answer = self._answer(positions, removal.change if removal else None, started)
        if removal:
            self.solution.remove_(removal)
            self.present[positions] = False
            self._vector = self._vector + removal.change
        return answer

    def preview(self, ids: Iterable[int], *, ridge: float | None = None) -> Forgotten:
        """What ``forget`` would answer, leaving the memory as it is.

        ``ridge`` is another total than the memory's: both solves are then made by conjugate gradients, preconditioned
        by the memory's own solution.
        """
        started = time.perf_counter()
        positions, change = self._positions(ids), None
        if len(positions) and (ridge is None or ridge == self.ridge):
            change = self.solution.removal(positions, self.rows).change
        elif len(positions) and ridge is not None:
            step = self.resolve(positions, self.displacement, ridge)
            change = step - self.resolve(positions[:0], self.displacement, ridge)
        return self._answer(positions, change, started, ridge)

    def save(self, path: Path) -> None:
        """Write the memory to one file, whole or not at all.

        Raises:
            InputError: it cannot be written; what was there is unchanged.
        """
        tensors = {
            **{f"anchor.{name}": tensor for name, tensor in self.anchor.items()},
            **{f"solution.{name}": tensor for name, tensor in self.solution.tensors().items()},
            "vector": self._vector,
            "present": self.present,
            "order": self._order,
        }
        linearised = self.linearised
        record = {
            "form": self.form,
            "ridge": self.ridge,
            "probe": self._probe,
            "loss": asdict(linearised.loss),
            "precision": linearised.precision,
            "batch_size": linearised.batch_size,
            "class_probes": asdict(linearised.probes) if linearised.probes else None,
            "calibration": asdict(self.calibration) if self.calibration else None,
            "layout": {name: list(getattr(self._layout, name)) for name in ("fast", "slow", "head")},
            "names": list(self.anchor),
            "model": _frozen(self.model, self.anchor),
        }
        write_tensors(path, tensors, record)

    def _answer(
        self, positions: Tensor, change: Tensor | None, started: float, ridge: float | None = None
    ) -> Forgotten:
        """The answer that a change of the parameters (None: none) gives."""
        change = torch.zeros_like(self._vector) if change is None else change
        parameters = self._layout.unflatten(self._vector + change, self.anchor)
        certificate = self._certify(positions, change, parameters, ridge or self.ridge)
        return Forgotten(parameters, time.perf_counter() - started, certificate)

    def resolve(self, positions: Tensor, displacement: Tensor, ridge: float) -> Float[Tensor, " p"]:
        """``s(R)`` without the samples at ``positions``, solved anew; with a displacement of zeros, Golatkar's step."""
        return self.solution.resolve(positions, self.rows, displacement, ridge)

    def assemble(self, change: Float[Tensor, " p"]) -> dict[str, Tensor]:
        """The current parameters moved by ``change``."""
        return self._layout.unflatten(self._vector + change, self.anchor)

    def rows(self, positions: Int[Tensor, " some"]) -> Rows:
        """The Jacobians and residuals, at the anchor, of the samples at ``positions``, computed now."""
        return self.linearised.rows(positions.tolist())

    def _positions(self, ids: Iterable[int]) -> Int[Tensor, " some"]:
        """The request as indices, checked."""
        wanted = [int(i) for i in ids]
        seen: set[int] = set()
        for i in wanted:
            if not 0 <= i < len(self.present):
                raise InputError(f"id {i} is unknown: the training set has ids 0 .. {len(self.present) - 1}.")
            if i in seen:
                raise InputError(f"id {i} stands twice in the request. Name each sample once.")
            if not self.present[i]:
                raise InputError(f"id {i} has been forgotten already. Leave it out of the request.")
            seen.add(i)
        if wanted and len(wanted) == int(self.present.sum()):
            raise InputError("the request would forget every sample. Use the parameters before fitting instead.")
        return torch.tensor(sorted(wanted), dtype=torch.long)

    def _certify(
        self, positions: Tensor, change: Tensor, parameters: Mapping[str, Tensor], ridge: float
    ) -> Certificate:
        staying = self.present[self._order] & ~torch.isin(self._order, positions)
        retained = self._order[staying][: self._probe]
        predicted = self._predicted(positions, change)
        size = rms(predicted)

        def departure(samples: Tensor, predicted: Tensor) -> float:
            if not len(samples):
                return 0.0
            real = change_of_logits(self.linearised, samples.tolist(), self.parameters, parameters)
            return rms(real - predicted) / size

        return Certificate(
            forgotten=len(positions),
            retained=int(self.present.sum()) - len(positions),
            ridge=ridge,
            departure_forgotten=departure(positions, predicted) if size else 0.0,
            departure_retained=departure(retained, self._predicted(retained, change)) if size else 0.0,
            residual=self.solution.residual,
        )

    def _predicted(self, positions: Tensor, change: Float[Tensor, " p"]) -> Float[Tensor, "some classes"]:
        """``J change`` for some samples: from the stored rows where they are those of all classes, else by a pass."""
        if isinstance(self.solution, DualSolution) and not self.linearised.probes:
            return self.solution.rows[positions].jacobian.matvec(change)
        return self.linearised.tangent(positions.tolist(), change)


def load(path: Path | str, model: nn.Module, train: Dataset) -> Memory:
    """Open what ``Memory.save`` wrote.

    Args:
        path: the file.
        model: the one it was prepared for; its tuned parameters may have moved since.
        train: the training set it was prepared on.

    Raises:
        InputError: the file cannot be read, or belongs to another model or training set.
    """
    tensors, record = read_tensors(Path(path))
    device = next(model.parameters()).device
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    anchor = {name: tensors[f"anchor.{name}"] for name in record["names"]}
    if record["model"] != _frozen(model, anchor):
        raise InputError(
            f"the memory {path} belongs to another model: the frozen weights differ. Open it with its own."
        )
    present = tensors["present"].cpu()
    if len(present) != len(train):  # type: ignore[arg-type]
        raise InputError(f"the memory {path} is of {len(present)} samples, the training set has {len(train)}.")  # type: ignore[arg-type]
    shapes = {name: tensor.shape for name, tensor in anchor.items()}
    layout = Layout(**{name: tuple(names) for name, names in record["layout"].items()}, shapes=shapes)
    linearised = Linearised(
        PerSampleJacobian(model, anchor, layout),
        train,
        SquaredLoss(**record["loss"]),
        batch_size=record["batch_size"],
        precision=record["precision"],
        probes=ClassProbes(**record["class_probes"]) if record["class_probes"] else None,
    )
    solution = _solution(tensors, record, GramOperator(linearised, present.nonzero()[:, 0].tolist()))
    calibration = Calibration(**record["calibration"]) if record["calibration"] else None
    return Memory(
        linearised, solution, calibration, present, tensors["order"].cpu(), record["probe"], tensors["vector"]
    )


def _solution(tensors: Mapping[str, Tensor], record: Mapping[str, Any], operator: GramOperator) -> Solution:
    """The stored solution, in its form; ``operator`` is over the samples that are present."""
    parts = {name.removeprefix("solution."): tensor for name, tensor in tensors.items() if name.startswith("solution.")}
    if record["form"] == "matrix-free":
        return MatrixFreeSolution.from_tensors(parts, record["ridge"], operator)
    make = PrimalSolution if record["form"] == "primal" else DualSolution
    return make.from_tensors(parts, record["ridge"])


def _frozen(model: nn.Module, tuned: Mapping[str, Tensor]) -> str:
    """A digest of everything in the model's state that is not tuned."""
    return digest({name: tensor for name, tensor in model.state_dict().items() if name not in tuned})
