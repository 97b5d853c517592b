"""What depends on the diagonal of the Fisher information: forgetting by noise, and by dampening."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import starmap
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from fastntk.common.machine import elapsed
from fastntk.evidence.methods.problem import Problem, Unlearned
from fastntk.jacobians.jacobian import Jacobian
from fastntk.memory.memory import Memory
from fastntk.memory.state import State

_ROW = 0.01  # the standard deviation of a class's row that nobody holds


@dataclass(frozen=True)
class FisherForgetting:
    """``theta* + a F_R^(-1/4) n``: noise where the retained samples do not hold the parameters, ``n ~ N(0, I)``.

    ``F_R`` is the diagonal of the Fisher information, a mean over R: of a squared loss's Gaussian, ``mean_R J'J``.
    Where no sample of a class stays, its row of the head is replaced by noise of 0.01.

    Attributes:
        scale: ``a``, which is ``(lambda sigma^2)^(1/4)`` in the paper.
        floor: added to ``F_R``, as a share of its mean.
        seed: of n.

    The exponent is the paper's. The official code has a variance of ``alpha / F``, so ``F^(-1/2)``, clamped, its mean
    taken over each output's weights, and ten times as large in the last layer and in norms (a class's row: 0.032 in
    all); here every parameter has its own, as the paper's equation does, and ``floor`` keeps it finite.

    Source: Golatkar, Achille, Soatto 2020, "Eternal sunshine of the spotless net" (arXiv 1911.04933).
    """

    scale: float = 1e-3
    floor: float = 1e-6
    seed: int = 0

    def __call__(self, problem: Problem) -> Unlearned:
        """Answer the request by one pass over the retained samples."""
        return self.hidden(problem, torch.zeros_like(problem.state.vector))

    def hidden(self, problem: Problem, step: Float[Tensor, " p"]) -> Unlearned:
        """``theta* + step`` with the noise."""
        state = problem.state
        hidden = step + self._noise(fisher(problem, problem.staying))
        gone = sorted(state.emptied(problem.positions) or ())
        if gone and state.layout.head:
            draw = torch.Generator().manual_seed(self.seed + 1)
            row, weights = state.layout.head_of(hidden), state.layout.head_of(state.vector)  # the first is a view
            row[gone] = _ROW * torch.randn(row[gone].shape, generator=draw).to(row) - weights[gone]
        return Unlearned(state.moved_by(hidden))

    def _noise(self, information: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """``a (F_R + floor mean(F_R))^(-1/4) n``."""
        draw = torch.randn(
            information.shape, generator=torch.Generator().manual_seed(self.seed), dtype=information.dtype
        )
        return self.scale * draw.to(information) / (information + self.floor * information.mean()) ** 0.25


@dataclass(frozen=True)
class Dampening:
    """``theta_j <- min(b I_Dj / I_Fj, 1) theta_j`` wherever ``I_Fj > a I_Dj``: selective synaptic dampening (SSD).

    The importances ``I_Sj`` are means over S of the squared gradient of a sample's loss, so that ``I_F`` is at most
    ``n / |F|`` times ``I_D``. The paper's a is 10 where a hundredth goes: a tenth of that; a fixed 10 would select
    nothing where a tenth goes. The official code squares the gradient of a batch's mean loss: less is averaged out, and
    a fixed 10 selects some (it takes 10 where 5 % go and at random, 5, 25 or 50 for other models and data, the last
    with a ``b`` of 0.1). Sample by sample, as the paper has it and as here, is a backward pass a class, some seven
    times as long as a pass over batches.

    Attributes:
        threshold: ``a``, as a share of ``n / |F|``.
        strength: ``b``.

    As in the paper ``I_D`` is kept, for all requests to a memory (the code works it out for each): the pass over all
    samples for it is not in a request's seconds; where preparing counts, the memory's own, which is such a pass, stands
    for it.

    Source: Foster, Schoepf, Brintrup 2024 (arXiv 2308.07707).
    """

    prepared: ClassVar[bool] = True
    threshold: float = 0.1
    strength: float = 1.0

    def __call__(self, problem: Problem) -> Unlearned:
        """Answer the request by one pass over the forgotten samples."""
        layout, anchor = problem.state.layout, problem.state.anchor
        everything = _kept_importance(problem)
        started = time.perf_counter()
        forgotten = importance(problem, problem.positions)
        most = len(problem.state.positions) / len(problem.positions)
        factor = torch.where(
            forgotten > self.threshold * most * everything,
            (self.strength * everything / forgotten.clamp_min(torch.finfo(forgotten.dtype).tiny)).clamp_max(1),
            torch.ones_like(forgotten),
        )
        dampened = layout.unflatten(factor * layout.flatten(anchor), anchor)
        return Unlearned(dampened, seconds=elapsed(started, problem.device))


def fisher(problem: Problem, positions: Tensor) -> Float[Tensor, " p"]:
    """``mean_i sum_c J_ic^2``, elementwise."""

    def of_batch(jacobian: Jacobian, _: Tensor) -> Tensor:
        head = jacobian.features.double().square().sum(0)
        return torch.cat([jacobian.rest.double().square().sum((0, 1)), head.repeat(jacobian.rest.shape[1])])

    return _mean(problem, positions, of_batch)


_KEPT = WeakKeyDictionary[Memory, tuple[State, Tensor]]()


def _kept_importance(problem: Problem) -> Float[Tensor, " p"]:
    """``I_D``, worked out once for a memory as it stands."""
    state, found = _KEPT.get(problem.memory, (None, None))
    if state is not problem.state or found is None:
        found = importance(problem, problem.state.positions)
        _KEPT[problem.memory] = problem.state, found
    return found


def importance(problem: Problem, positions: Tensor) -> Float[Tensor, " p"]:
    """``mean_i (J_i'r_i)^2``, elementwise: of the gradient of each sample's loss."""

    def of_batch(jacobian: Jacobian, residual: Tensor) -> Tensor:
        rest = torch.einsum("ncp,nc->np", jacobian.rest, residual).double().square().sum(0)
        head = torch.einsum("nc,nf->cf", residual.double().square(), jacobian.features.double().square())
        return torch.cat([rest, head.flatten()])

    return _mean(problem, positions, of_batch)


def _mean(problem: Problem, positions: Tensor, of_batch: Callable[[Jacobian, Tensor], Tensor]) -> Tensor:
    batches = problem.state.network.stream(positions.tolist())
    return sum(starmap(of_batch, batches), torch.zeros(())) / len(positions)
