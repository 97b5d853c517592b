"""What one pass over the training data leaves behind, so that samples can be forgotten from then on.

The memory linearises the network at the anchor ``theta*`` (the tuned parameters after fitting) and holds the solution
of the linear problem over all samples that are still in it. Forgetting takes samples out of the solution; the retained
ones are not computed again.
"""

import hashlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from fastntk.certificate import Certificate, departure, rms
from fastntk.errors import InputError
from fastntk.files import read_tensors, write_tensors
from fastntk.jacobian import Jacobian, Layout, PerSampleJacobian
from fastntk.loss import SquaredLoss
from fastntk.plan import Form
from fastntk.ridge import Calibration
from fastntk.statistics import Rows, stream
from fastntk.step import DualSolution, PrimalSolution, Solution


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
        model: nn.Module,
        train: Dataset,
        loss: SquaredLoss,
        jacobian: PerSampleJacobian,
        layout: Layout,
        solution: Solution,
        calibration: Calibration | None,
        present: Bool[Tensor, " samples"],
        order: Int[Tensor, " samples"],
        probe: int,
        vector: Float[Tensor, " p"] | None = None,
    ) -> None:
        self.model, self.train, self.loss = model, train, loss
        self.solution, self.calibration, self.present = solution, calibration, present
        self._order, self._probe = order, probe
        self._jacobian, self._layout = jacobian, layout
        self.anchor = jacobian.parameters
        self._vector = layout.flatten(self.anchor) if vector is None else vector

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
        """``"primal"`` (p x p) or ``"dual"`` (nC x nC)."""
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
        rows, answer, change = self._answer(positions, started)
        if len(positions):
            self.solution.leave(rows, positions)
            self.present[positions] = False
            self._vector = self._vector + change
        return answer

    def preview(self, ids: Iterable[int], *, ridge: float | None = None) -> Forgotten:
        """What ``forget`` would answer, leaving the memory as it is.

        ``ridge`` is another total than the memory's: both solves are then made by conjugate gradients, preconditioned
        by the memory's own solution.
        """
        started = time.perf_counter()
        return self._answer(self._positions(ids), started, ridge)[1]

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
        record = {
            "form": self.form,
            "ridge": self.ridge,
            "probe": self._probe,
            "loss": asdict(self.loss),
            "calibration": asdict(self.calibration) if self.calibration else None,
            "layout": {name: list(getattr(self._layout, name)) for name in ("fast", "slow", "head")},
            "names": list(self.anchor),
            "model": digest(self.model, self.anchor),
        }
        write_tensors(path, tensors, record)

    def _answer(self, positions: Tensor, started: float, ridge: float | None = None) -> tuple[Rows, Forgotten, Tensor]:
        rows = self.rows(positions)
        if not len(positions):
            change = torch.zeros_like(self._vector)
        elif ridge is None or ridge == self.ridge:
            change = self.solution.difference(rows, positions)
        else:
            step = self.resolve(positions, self.displacement, ridge)
            change = step - self.resolve(positions[:0], self.displacement, ridge)
        parameters = self._layout.unflatten(self._vector + change, self.anchor)
        certificate = self._certify(rows.jacobian, positions, change, parameters, ridge or self.ridge)
        return rows, Forgotten(parameters, time.perf_counter() - started, certificate), change

    def resolve(self, positions: Tensor, displacement: Tensor, ridge: float) -> Float[Tensor, " p"]:
        """``s(R)`` without the samples at ``positions``, solved anew; with a displacement of zeros, Golatkar's step."""
        return self.solution.resolve(self.rows(positions), positions, displacement, ridge)

    def assemble(self, change: Float[Tensor, " p"]) -> dict[str, Tensor]:
        """The current parameters moved by ``change``."""
        return self._layout.unflatten(self._vector + change, self.anchor)

    def rows(self, positions: Int[Tensor, " some"]) -> Rows:
        """The Jacobians and residuals, at the anchor, of the samples at ``positions``: stored (dual) or computed."""
        if isinstance(self.solution, DualSolution):
            return self.solution.rows[positions]
        wanted = positions if len(positions) else self._order[:1]
        computed = Rows.of(stream(self._jacobian, Subset(self.train, wanted.tolist()), self.loss, 64, "Jacobians"))
        return computed[: len(positions)]

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
        self, forgotten: Jacobian, positions: Tensor, change: Tensor, parameters: Mapping[str, Tensor], ridge: float
    ) -> Certificate:
        staying = self.present[self._order] & ~torch.isin(self._order, positions)
        retained = self._order[staying][: self._probe]
        size = rms(forgotten.matvec(change))

        def relative(samples: Tensor, jacobian: Jacobian) -> float:
            subset = Subset(self.train, samples.tolist())
            return departure(self.model, subset, jacobian, change, self.parameters, parameters) / size if size else 0.0

        return Certificate(
            forgotten=len(positions),
            retained=int(self.present.sum()) - len(positions),
            ridge=ridge,
            departure_forgotten=relative(positions, forgotten),
            departure_retained=relative(retained, self.rows(retained).jacobian),
        )


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
    solution = _under(tensors, "solution.")
    anchor = {name: tensors[f"anchor.{name}"] for name in record["names"]}
    if record["model"] != digest(model, anchor):
        raise InputError(
            f"the memory {path} belongs to another model: the frozen weights differ. Open it with its own."
        )
    present = tensors["present"].cpu()
    if len(present) != len(train):  # type: ignore[arg-type]
        raise InputError(f"the memory {path} is of {len(present)} samples, the training set has {len(train)}.")  # type: ignore[arg-type]
    layout = Layout(
        **{name: tuple(names) for name, names in record["layout"].items()},
        shapes={name: tensor.shape for name, tensor in anchor.items()},
    )
    make = PrimalSolution if record["form"] == "primal" else DualSolution
    calibration = Calibration(**record["calibration"]) if record["calibration"] else None
    return Memory(
        model,
        train,
        SquaredLoss(**record["loss"]),
        PerSampleJacobian(model, anchor, layout),
        layout,
        make.from_tensors(solution, record["ridge"]),
        calibration,
        present,
        tensors["order"].cpu(),
        record["probe"],
        tensors["vector"],
    )


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def digest(model: nn.Module, tuned: Mapping[str, Tensor]) -> str:
    """A SHA-256 of everything in the model's state that is not tuned."""
    state = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if name not in tuned:
            state.update(name.encode())
            state.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()
