"""The step where neither a p x p nor an nC x nC matrix fits: conjugate gradients on products with the Jacobians.

One product ``G v = sum_i J_i'(J_i v)`` is a pass over the samples in forward mode and back, and forms no Jacobian.
Preparing spends ``STEPS`` passes on a Krylov space Q of G at ``b + G u``, with ``T = Q'G Q``. That space gives the
ridge, a first ``s(D)``, and the preconditioner of every later solve, the Nystrom approximation of G in it:

    (G + ridge I)^-1  ~  Q (T + ridge I)^-1 Q' + (I - Q Q') / ridge.

A request then takes passes over the retained samples, as many as its inexactness needs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.common.errors import InputError
from fastntk.jacobians.layout import Layout
from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.rows import Rows
from fastntk.solve import prices
from fastntk.solve.gram import Krylov
from fastntk.solve.linalg import conjugate_gradients, relative, shifted
from fastntk.solve.passes import Passes
from fastntk.solve.prices import Price, Timing, Workload
from fastntk.solve.ridge import calibrate
from fastntk.solve.solution import Solved, Task, Update
from fastntk.solve.speeds import Speeds

STEPS = 40
"""Passes for the Krylov space, and vectors of length p that it keeps."""

TOLERANCE = 1e-4
"""The relative residual that every solve reaches: a float32 network's products are not good for much less than 1e-6."""

_SOLVE_PASSES = 15  # a guess at what the first solve takes after its Krylov space


@dataclass(frozen=True)
class Iterative:
    """``s(S)`` for a set S that samples leave and join, and what speeds up the solves to come.

    Attributes:
        displacement: ``u``.
        ridge: a total.
        basis: Q, of all samples that were prepared.
        projected: T.
        step: ``s(S)``.
        reached: the inexactness of the latest solve.
        over: the positions of S.
    """

    name: ClassVar[str] = "matrix-free"
    holds: ClassVar[bool] = False
    leaves_out: ClassVar[bool] = False
    likeliest: ClassVar[bool] = False
    mapped: ClassVar[tuple[str, ...]] = ()
    displacement: Float[Tensor, " p"]
    ridge: float
    basis: Float[Tensor, "p m"]
    projected: Float[Tensor, "m m"]
    step: Float[Tensor, " p"]
    reached: float
    over: Int[Tensor, " samples"]

    @classmethod
    def of(cls, gram: Passes, displacement: Float[Tensor, " p"], ridge: float, space: Krylov) -> "Iterative":
        """Solve for all samples of the operator, from its Krylov space at the displacement."""
        first = space.basis.double() @ torch.linalg.solve(shifted(space.projected, ridge), space.start) - displacement
        start = cls(displacement, ridge, space.basis, space.projected, first, float("inf"), gram.positions)
        step, reached = start._solve(gram, gram.rhs - ridge * displacement, ridge, first)
        return replace(start, step=step, reached=reached)

    @classmethod
    def price(cls, work: Workload) -> Price:
        """``STEPS`` vectors of length p and a dozen more, and the network's activations. Its arithmetic is the
        network's."""
        size = work.parameters * (STEPS * work.itemsize + 12 * 8) + 2 * work.batch_size * work.activations
        refusal = "the matrix-free form has no use for class probes: it makes no backward pass a class."
        drawback = "requests take many passes over all that is retained"
        return Price(cls.name, size, 0.0, refusal if work.probed else work.one_step, drawback, rank=3)

    @classmethod
    def timing(cls, work: Workload, speeds: Speeds) -> Timing:
        """Of the passes of the Krylov space and of the first solve."""
        count = STEPS + _SOLVE_PASSES
        return prices.passes(work, count, speeds.gram, f"about {count} passes")

    @classmethod
    def prepare(cls, task: Task) -> Solved:
        """The passes, the ridge among them."""
        gram = Passes(task.network, torch.arange(task.count))
        residuals = task.network.residuals(range(task.count))
        space = Krylov.of(gram, task.displacement, STEPS)
        found = calibrate(gram, task.displacement, space.spectrum) if task.ridge is None else None
        ridge = found.ridge if found else cast(float, task.ridge)
        return Solved(cls.of(gram, task.displacement, ridge, space), residuals, found)

    def ready(self) -> "Iterative":
        """It is."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the ridge, by name."""
        own = {name: getattr(self, name) for name in ("displacement", "basis", "projected", "step", "over")}
        return {**own, "reached": torch.tensor(self.reached, dtype=torch.float64)}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], ridge: float) -> "Iterative":
        """The reverse of ``tensors``."""
        basis, projected, step = (tensors[name] for name in ("basis", "projected", "step"))
        reached, over = float(tensors["reached"]), tensors["over"].cpu()
        return cls(tensors["displacement"], ridge, basis, projected, step, reached, over)

    @property
    def limit(self) -> float:
        """What every solve reaches."""
        return TOLERANCE

    def reads(self, sign: int) -> bool:
        """No rows are formed."""
        return False

    def update(
        self, network: Linearised, positions: Int[Tensor, " samples"], sign: int, rows: Rows | None = None
    ) -> Update:
        """``(G_{S+-F} + ridge I)^-1`` of ``+-J_F'(r_F - J_F s(S))``, by passes over S and F."""
        error = Passes(network, positions).downhill(self.step)
        after = Update(error, positions, sign).changes(self.over)
        change, reached = self._solve(Passes(network, after), sign * error, self.ridge)
        kept = {"change": change, "reached": torch.tensor(reached, dtype=torch.float64)}
        return Update(change, positions, sign, reached=reached, kept=kept)

    def replayed(
        self,
        network: Linearised,
        positions: Int[Tensor, " samples"],
        sign: int,
        rows: Rows | None,
        tensors: Mapping[str, Tensor],
    ) -> Update:
        """With the change that was found."""
        return Update(tensors["change"], positions, sign, reached=float(tensors["reached"]))

    def apply(self, update: Update) -> "Iterative":
        """With the step and the set that were worked out."""
        reached = cast(float, update.reached)
        return replace(self, step=self.step + update.change, reached=reached, over=update.changes(self.over))

    def inexactness(self, update: Update | None = None) -> float:
        """Of the latest solve, or of an ``update``'s."""
        return self.reached if update is None else cast(float, update.reached)

    def anew(self, network: Linearised) -> "Iterative":
        """By passes over S."""
        gram = Passes(network, self.over)
        step, reached = self._solve(gram, gram.rhs - self.ridge * self.displacement, self.ridge)
        return replace(self, step=step, reached=reached)

    def resolve(
        self, network: Linearised, positions: Int[Tensor, " samples"], displacement: Float[Tensor, " p"], ridge: float
    ) -> Float[Tensor, " p"]:
        """By passes over what is left."""
        gram = Passes(network, self.over[~torch.isin(self.over, positions)])
        return self._solve(gram, gram.rhs - ridge * displacement, ridge)[0]

    def alone(self, network: Linearised, positions: Int[Tensor, " samples"]) -> Float[Tensor, "samples outputs"]:
        """It would take a solve a sample."""
        raise InputError(f"leaving samples out one by one would take a solve for each in the {self.name} form.")

    def head_shortfall(self, layout: Layout) -> None:
        """The head's inputs are not kept."""

    def _solve(
        self, gram: Passes, rhs: Float[Tensor, " p"], ridge: float, first: Float[Tensor, " p"] | None = None
    ) -> tuple[Float[Tensor, " p"], float]:
        """``(G + ridge I)^-1 rhs`` over the operator's samples, and the relative residual that it has."""
        inner = shifted(torch.linalg.inv(shifted(self.projected, ridge)), -1 / ridge)

        def apply(vector: Tensor) -> Tensor:
            return gram.matvec(vector) + ridge * vector

        def precondition(vector: Tensor) -> Tensor:
            inside = (self.basis.T @ vector.to(self.basis)).double()
            return vector / ridge + (self.basis @ (inner @ inside).to(self.basis)).to(vector)

        start = torch.zeros_like(rhs) if first is None else first
        left = rhs if first is None else rhs - apply(first)
        enough = TOLERANCE * float(rhs.norm())
        if float(left.norm()) > enough:
            start = start + conjugate_gradients(apply, left, precondition, enough / float(left.norm()))
            left = rhs - apply(start)
        return start, relative(left, rhs)
