"""The contract of a solver: the linear problem over a set of samples, solved, and what samples change that leave it or
join.

For a set S, linearised at ``theta*`` with ``u = theta* - theta_0``:

    s(S) = argmin_d  1/2 sum_S |J_i d - r_i|^2 + ridge/2 |d + u|^2

is the step to the optimum that S predicts. Forgetting F out of D = R + F moves the tuned parameters by
``s(R) - s(D)``, anchored at what ``theta*`` itself falls short of. The ridge is a total over the set, the same for D
and R: half of it times ``|theta - theta_0|^2`` is what fitting adds to the summed loss. Source: Golatkar et al. 2020
(arXiv 2003.02960) for the step without ``u``, Li et al. 2023 (arXiv 2312.14923) for taking it over parameter-efficient
parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.common.errors import InputError
from fastntk.jacobians.layout import Layout
from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.rows import Rows
from fastntk.solve.prices import Price, Timing, Workload
from fastntk.solve.ridge import Calibration
from fastntk.solve.speeds import Speeds


@dataclass(frozen=True)
class Update:
    """What adding samples F to a set S, or taking them out, changes.

    Attributes:
        change: ``s(S + F) - s(S)`` or ``s(S - F) - s(S)``.
        positions: of F in the training set.
        sign: 1 where F is added, -1 where it is taken out.
        rows: of F, where the form needs them.
        low_rank: what the form needs to carry it out, see there.
        reached: the inexactness of the solve, where it was one by iteration.
        kept: what else it takes to carry it out again, by name.
    """

    change: Float[Tensor, " p"]
    positions: Int[Tensor, " samples"]
    sign: int
    rows: Rows | None = None
    low_rank: tuple[Tensor, ...] = ()
    reached: float | None = None
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    def changes(self, over: Int[Tensor, " samples"]) -> Int[Tensor, " others"]:
        """S after it, where it was ``over`` before."""
        if self.sign > 0:
            return torch.cat([over, self.positions])
        return over[~torch.isin(over, self.positions)]


@dataclass(frozen=True)
class Task:
    """What a form is to solve when a memory is prepared.

    Attributes:
        network: whose training set is D, all of it.
        count: n, the number of its samples.
        displacement: ``u``.
        ridge: a total; None finds one (``fastntk.solve.ridge``).
        checkpoint: a folder for partial results of a long pass, where the form has any, or None.
    """

    network: Linearised
    count: int
    displacement: Float[Tensor, " p"]
    ridge: float | None
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Solved:
    """What it has found: the solution over D, the residuals of all samples, and how the ridge was found, if it was."""

    solution: "Solution"
    residuals: Float[Tensor, "samples outputs"]
    calibration: Calibration | None


@runtime_checkable
class Solution(Protocol):
    """``s(S)`` for a set S that samples leave and join, in one of the forms of ``fastntk.solve.forms``.

    It does not change: ``apply`` gives another one. Matrices that are too large to exist twice go over to that one,
    which changes them in place; the earlier solution then refuses to answer, as its own are gone.
    ``network`` is the one that was linearised, at the same ``theta*``, with a training set that has the positions asked
    for.
    """

    name: ClassVar[str]
    """Of the form."""

    likeliest: ClassVar[bool]
    """Whether it has rows of each sample's likeliest classes alone."""

    mapped: ClassVar[tuple[str, ...]]
    """Which of its tensors are read from a mapped file where they are."""

    holds: ClassVar[bool]
    """Whether it has the rows of all its samples, so that one can leave whose image is gone."""

    leaves_out: ClassVar[bool]
    """Whether it knows what leaving out each sample ``alone`` changes."""

    @property
    def displacement(self) -> Float[Tensor, " p"]:
        """``u``."""

    @property
    def ridge(self) -> float:
        """A total."""

    @property
    def over(self) -> Int[Tensor, " samples"]:
        """The positions of S: those that can be taken out."""

    @property
    def step(self) -> Float[Tensor, " p"]:
        """``s(S)``."""

    @property
    def limit(self) -> float:
        """Of the inexactness, above which ``anew`` is due: rounding has gathered."""

    def reads(self, sign: int) -> bool:
        """Whether an update needs the samples' rows, when they are added (``sign`` 1) or taken out (-1)."""

    def update(
        self, network: Linearised, positions: Int[Tensor, " samples"], sign: int, rows: Rows | None = None
    ) -> Update:
        """What adding the samples F at ``positions`` to S (``sign`` 1), or taking them out (-1), would change:
        ``s(S +- F) - s(S)``. ``rows`` are theirs, where ``reads`` says so."""

    def replayed(
        self,
        network: Linearised,
        positions: Int[Tensor, " samples"],
        sign: int,
        rows: Rows | None,
        tensors: Mapping[str, Tensor],
    ) -> Update:
        """The update that was worked out once, from its rows, if it had any, and what it had ``kept``."""

    def apply(self, update: Update) -> "Solution":
        """The solution after an ``update`` of this one: over ``S +- F``, with ``s(S) + update.change``."""

    def inexactness(self, update: Update | None = None) -> float:
        """The relative residual of the normal equations, ``|(G + ridge I) s - (b - ridge u)| / |b - ridge u|`` or the
        form's own of them, now or after an ``update``: 0 if exact."""

    def anew(self, network: Linearised) -> "Solution":
        """Solved anew over S, which takes off the rounding of all updates so far."""

    def resolve(
        self, network: Linearised, positions: Int[Tensor, " samples"], displacement: Float[Tensor, " p"], ridge: float
    ) -> Float[Tensor, " p"]:
        """``s(S - F)`` for any displacement and ridge, from S alone; nothing changes."""

    def alone(self, network: Linearised, positions: Int[Tensor, " samples"]) -> Float[Tensor, "samples outputs"]:
        """``J_i (s(S - i) - s(S))`` for each sample i: what forgetting it alone changes of its own outputs, to first
        order. Raises ``InputError`` in a form that would need a solve a sample."""

    def head_shortfall(self, layout: Layout) -> Float[Tensor, "classes features"] | None:
        """``W(S; theta*) - W*``, what the head alone falls short of over S (``fastntk.solve.head``); None in a form
        that does not keep its inputs. The head must be tuned, and its rows of logits."""

    def ready(self) -> "Solution":
        """The same with everything that the first request would otherwise wait for."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the ridge, by name."""

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], ridge: float) -> "Solution":
        """The reverse of ``tensors``."""

    @classmethod
    def price(cls, work: Workload) -> Price:
        """Memory and arithmetic of preparing."""

    @classmethod
    def timing(cls, work: Workload, speeds: Speeds) -> Timing:
        """Seconds of preparing, by phase, at this machine's speeds."""

    @classmethod
    def prepare(cls, task: Task) -> Solved:
        """Solve for all samples of the task."""


class Ownership:
    """Of matrices that the next solution changes in place; solutions that hold the same share one, until it is
    given up.

    Raises:
        InputError: from ``check`` and ``give_up``, once it was.
    """

    def __init__(self) -> None:
        self._given_up = False

    def check(self) -> None:
        """Whether the matrices are still what they were."""
        if self._given_up:
            raise InputError("a later request has taken this solution's matrices over. Use the memory's state of now.")

    def give_up(self) -> None:
        """They are about to change; nobody else who holds them may use them any more."""
        self.check()
        self._given_up = True
