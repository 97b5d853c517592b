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
from torch.func import functional_call
from torch.utils.data import Dataset, Subset

from fastntk.data import batches, checked
from fastntk.errors import InputError
from fastntk.files import read_tensors, write_tensors
from fastntk.jacobian import Jacobian, Layout, PerSampleJacobian, concatenate
from fastntk.loss import SquaredLoss
from fastntk.plan import Form, choose_form, free_bytes
from fastntk.progress import busy, track
from fastntk.ridge import Calibration, calibrate
from fastntk.statistics import Rows, Sums, total
from fastntk.step import DualSolution, PrimalSolution, Solution
from fastntk.tunable import snapshot, tuned

TRUSTED = 0.5
"""The network is trusted to have moved as predicted while it departs by at most this share of the predicted change."""


@dataclass(frozen=True)
class Certificate:
    """What is known of one request.

    The new parameters are exact for the network linearised at the anchor, with squared loss and the given ridge: they
    are those of training it on the retained samples alone. For the network itself the agreement is measured:
    ``departure = rms_S |f(theta_new) - f(theta_old) - J (theta_new - theta_old)| / rms_F |J (theta_new - theta_old)|``
    with S the forgotten samples F, or a fixed probe of retained ones; 0 is perfect agreement. The unit is in both cases
    the change that was predicted, and asked for, on the forgotten samples.
    """

    forgotten: int
    retained: int
    ridge: float
    departure_forgotten: float
    departure_retained: float

    @property
    def trusted(self) -> bool:
        """Whether both departures are at most ``TRUSTED``."""
        return max(self.departure_forgotten, self.departure_retained) <= TRUSTED

    @property
    def verdict(self) -> str:
        """The measurement in a sentence."""
        measured = (
            f"the network departs from the linear prediction by {self.departure_forgotten:.0%} on the forgotten "
            f"samples and {self.departure_retained:.0%} on a probe of retained ones, in units of the change predicted "
            f"for the forgotten ones (limit {TRUSTED:.0%})"
        )
        if self.trusted:
            return f"trusted: {measured}."
        return f"not trusted: {measured}. Retrain, or forget fewer samples with a larger ridge."

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "trusted": self.trusted, "verdict": self.verdict}


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
        probe: Int[Tensor, " probe"],
        vector: Float[Tensor, " p"] | None = None,
    ) -> None:
        self.model, self.train, self.loss = model, train, loss
        self.solution, self.calibration, self.present, self.probe = solution, calibration, present, probe
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
            "probe": self.probe,
        }
        record = {
            "form": self.form,
            "ridge": self.ridge,
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
        if not len(positions):
            positions = self.probe[:1]
            return _rows(self._jacobian, Subset(self.train, positions.tolist()), self.loss)[:0]
        return _rows(self._jacobian, Subset(self.train, positions.tolist()), self.loss)

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
        retained = self.probe[self.present[self.probe] & ~torch.isin(self.probe, positions)]
        size = _rms(forgotten.matvec(change))
        return Certificate(
            forgotten=len(positions),
            retained=int(self.present.sum()) - len(positions),
            ridge=ridge,
            departure_forgotten=self._departure(positions, forgotten, change, parameters) / size if size else 0.0,
            departure_retained=self._departure(retained, self.rows(retained).jacobian, change, parameters) / size
            if size and len(retained)
            else 0.0,
        )

    def _departure(
        self, positions: Tensor, jacobian: Jacobian, change: Tensor, parameters: Mapping[str, Tensor]
    ) -> float:
        """How far the network's change of logits is from ``J change``: root mean square over samples."""
        samples = Subset(self.train, positions.tolist())
        actual = logits(self.model, samples, parameters) - logits(self.model, samples, self.parameters)
        return _rms(actual - jacobian.matvec(change))


def _rms(vectors: Float[Tensor, "samples classes"]) -> float:
    """The root mean square length; 0 for no vectors."""
    return float(vectors.square().sum(1).mean().sqrt()) if len(vectors) else 0.0


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
    present, probe = tensors["present"].cpu(), tensors["probe"].cpu()
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
        probe,
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


def logits(model: nn.Module, samples: Dataset, parameters: Mapping[str, Tensor], batch_size: int = 64) -> Tensor:
    """The logits of a model at other tuned parameters, ``[samples, C]``."""
    device = next(iter(parameters.values())).device
    with torch.no_grad():
        parts = [
            functional_call(model, dict(parameters), (images.to(device),)) for images, _ in batches(samples, batch_size)
        ]
    return torch.cat(parts)


def _rows(jacobian: PerSampleJacobian, samples: Dataset, loss: SquaredLoss, batch_size: int = 64) -> Rows:
    """The Jacobians and residuals of all samples."""
    parts = list(_stream(jacobian, samples, loss, batch_size, "Jacobians"))
    return Rows(concatenate([j for j, _ in parts]), torch.cat([r for _, r in parts]))


def _stream(
    jacobian: PerSampleJacobian, samples: Dataset, loss: SquaredLoss, batch_size: int, description: str
) -> Iterable[tuple[Jacobian, Tensor]]:
    """Jacobian and residual, batch by batch."""
    device = next(iter(jacobian.parameters.values())).device
    for images, labels in track(batches(samples, batch_size), description):
        j = jacobian(checked(images).to(device))
        yield j, loss.residual(j.logits, labels.to(device))


def prepare(
    model: nn.Module,
    train: Dataset,
    initial: Mapping[str, Tensor],
    *,
    ridge: float | str = "auto",
    form: str = "auto",
    loss: SquaredLoss = SquaredLoss(),
    batch_size: int = 64,
    probe: int = 64,
) -> Memory:
    """One pass over the training data, after which ``memory.forget`` needs only the forgotten samples.

    Denormal numbers are flushed to zero in this process from then on (``torch.set_flush_denormal``): on some processors
    they make Jacobians ten times slower.

    Args:
        model: fitted, in eval mode, with the tuned parameters requiring gradients. It is not changed.
        train: the map-style dataset it was fitted to; a sample's id is its index.
        initial: the tuned parameters before fitting, ``fit(...).initial``.
        ridge: the total L2 pull toward ``initial``, or ``"auto"``: see ``fastntk.ridge.calibrate``.
        form: ``"primal"``, ``"dual"`` or ``"auto"``: see ``fastntk.plan.choose_form``.
        loss: the one it was fitted with.
        batch_size: images a batch of Jacobians.
        probe: how many samples, spread evenly over the training set, serve to check every request.

    Raises:
        InputError: ``initial`` does not belong to the model, a layer is in training mode, the data are not fit for use,
            or neither form fits into memory.
    """
    if ridge != "auto" and not (isinstance(ridge, float | int) and 0 < ridge < float("inf")):
        raise InputError(f"the ridge must be a positive number or 'auto', not {ridge!r}.")
    torch.set_flush_denormal(True)
    anchor = snapshot(tuned(model))
    _check_initial(initial, tuned(model))
    if len(train) < 2:  # type: ignore[arg-type]
        raise InputError("the training set needs at least 2 samples.")
    jacobian = PerSampleJacobian(model, anchor)
    device = next(iter(anchor.values())).device
    image = checked(torch.as_tensor(train[0][0]))[None].to(device)
    layout, count = jacobian.layout(image), len(train)  # type: ignore[arg-type]
    rest, features, classes, itemsize = _sizes(jacobian(image))
    plan = choose_form(count, classes, rest, features, free_bytes(device), form, itemsize)
    displacement = layout.flatten(anchor) - layout.flatten(initial)
    stream = _stream(jacobian, train, loss, batch_size, f"one pass, {plan.form} form, {plan.bytes / 1e9:.1f} GB")
    statistics = _collect(stream, plan.form)
    solution, calibration = _solve(statistics, displacement, ridge)
    chosen = torch.linspace(0, count - 1, min(probe, count)).round().long().unique()
    return Memory(
        model, train, loss, jacobian, layout, solution, calibration, torch.ones(count, dtype=torch.bool), chosen
    )


def _solve(statistics: Sums | Rows, displacement: Tensor, ridge: float | str) -> tuple[Solution, Calibration | None]:
    """The solution at the given ridge, or at the calibrated one."""
    kernel = statistics.kernel() if isinstance(statistics, Rows) else None
    with busy("choosing the ridge, solving"):
        calibration = calibrate(statistics, displacement, kernel) if ridge == "auto" else None
        total = calibration.ridge if calibration else float(ridge)
        if isinstance(statistics, Rows):
            return DualSolution.of(statistics, displacement, total, kernel), calibration
        return PrimalSolution.of(statistics, displacement, total), calibration


def _sizes(jacobian: Jacobian) -> tuple[int, int, int, int]:
    return (
        jacobian.rest.shape[2],
        jacobian.features.shape[1],
        jacobian.rest.shape[1],
        jacobian.rest.element_size(),
    )


def _collect(stream: Iterable[tuple[Jacobian, Tensor]], form: Form) -> Sums | Rows:
    """The statistics of a set, streamed (primal) or stored (dual)."""
    if form == "dual":
        parts = list(stream)
        return Rows(concatenate([j for j, _ in parts]), torch.cat([r for _, r in parts]))
    return total(Sums.of(j, r) for j, r in stream)


def _check_initial(initial: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    if set(initial) != set(parameters):
        odd = sorted(set(initial) ^ set(parameters))[0]
        raise InputError(f"`initial` does not hold the model's tuned parameters: they differ in {odd!r}.")
    for name, parameter in parameters.items():
        if initial[name].shape != parameter.shape:
            raise InputError(
                f"`initial` has shape {list(initial[name].shape)} for {name!r}, not {list(parameter.shape)}."
            )
    if all(initial[name].data_ptr() == parameters[name].data_ptr() for name in parameters):
        raise InputError(
            "`initial` is the model's own parameters, not a copy from before fitting. Pass fit(...).initial, or take "
            "fastntk.snapshot(params) before your own loop."
        )
