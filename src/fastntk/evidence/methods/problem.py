"""What every unlearning method is given, and what it gives back."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from fastntk.common.machine import elapsed, peak_memory
from fastntk.inputs.ids import Id
from fastntk.memory.members import Members
from fastntk.memory.memory import Memory
from fastntk.memory.state import State
from fastntk.tuning.recipe import Recipe


@dataclass(frozen=True)
class Problem:
    """One request against one fitted model. No method changes any of it.

    Attributes:
        memory: of the model; its model, initial parameters and data are the problem's.
        forget: the ids of the samples to be forgotten.
        recipe: how the model was fitted.
    """

    memory: Memory
    forget: Sequence[Id]
    recipe: Recipe

    @property
    def state(self) -> State:
        """Of the memory."""
        return self.memory.state

    @property
    def model(self) -> nn.Module:
        """Fitted; its tuned parameters require gradients."""
        return self.state.model

    @property
    def initial(self) -> Mapping[str, Tensor]:
        """The tuned parameters before fitting."""
        return self.state.initial

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.state.network.device

    def rate(self, factor: float) -> float:
        """A factor of the learning rate that the model was fitted with."""
        return factor * self.recipe.learning_rate

    def epochs(self, share: float) -> int:
        """A share of the epochs that the model was fitted for, at least one."""
        return max(1, round(share * self.recipe.epochs))

    @cached_property
    def positions(self) -> Int[Tensor, " forgotten"]:
        """Of the samples to be forgotten, among the members."""
        return self.state.members.positions(self.forget)

    @cached_property
    def staying(self) -> Int[Tensor, " retained"]:
        """The positions of the members that are not to be forgotten and whose samples the data have."""
        return self.state.members.available(self._members(going=False))

    @property
    def leaving(self) -> Int[Tensor, " leaving"]:
        """The positions of the samples to be forgotten that are members still."""
        return self._members(going=True)

    def _members(self, *, going: bool) -> Int[Tensor, " some"]:
        """The positions of the members that go, or of those that stay."""
        names, gone = self.state.members.by_position, set(self.forget)
        some = [place for place in self.state.positions.tolist() if (names[place] in gone) == going]
        return torch.tensor(some, dtype=torch.long)

    @property
    def train(self) -> Dataset:
        """The members."""
        return self._at(self.state.positions)

    @property
    def places(self) -> Int[Tensor, " forgotten"]:
        """Of the samples to be forgotten, in ``train``."""
        return torch.isin(self.state.positions, self.positions).nonzero()[:, 0]

    @property
    def forgotten(self) -> Dataset:
        """The samples that go, whether they are members still or not."""
        return Members(self.state.members.source, self.forget)

    @property
    def retain(self) -> Dataset:
        """The members that stay."""
        return self._at(self.staying)

    def _at(self, positions: Int[Tensor, " some"]) -> Subset:
        return Subset(self.state.members, positions.tolist())


@dataclass(frozen=True)
class Unlearned:
    """The tuned parameters that a method arrived at, and what it says of its own result, if anything; once measured,
    the seconds it took from a prepared memory, and the most bytes."""

    parameters: dict[str, Tensor]
    _: KW_ONLY
    note: str = ""
    seconds: float | None = None
    bytes: int | None = None


Method = Callable[[Problem], Unlearned]
"""A method answers a request. It is a frozen dataclass whose fields are its hyper-parameters; one that needs a memory
to be prepared says so by a class variable ``prepared``. Where what it does has changed, a class variable ``version``
keeps stored answers of before from being taken for its own."""


def measured(method: Method, problem: Problem) -> Unlearned:
    """The method's answer, with the seconds and bytes that it took, unless it knows them itself."""
    with peak_memory(problem.device) as peak:
        started = time.perf_counter()
        done = method(problem)
        seconds = elapsed(started, problem.device)
    took = seconds if done.seconds is None else done.seconds
    return replace(done, seconds=took, bytes=peak.bytes if done.bytes is None else done.bytes)
