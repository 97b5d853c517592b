"""What every unlearning method is given, and what it gives back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from fastntk.common.machine import peak_memory
from fastntk.memory.memory import Memory
from fastntk.tuning.fitting import Recipe


@dataclass(frozen=True)
class Problem:
    """One request against one fitted model. No method changes any of it.

    Attributes:
        model: fitted; its tuned parameters require gradients.
        initial: the tuned parameters before fitting.
        train: what it was fitted to.
        forget: the indices of the samples to be forgotten.
        recipe: how it was fitted.
        memory: prepared on ``train``.
    """

    model: nn.Module
    initial: Mapping[str, Tensor]
    train: Dataset
    forget: Int[Tensor, " forgotten"]
    recipe: Recipe
    memory: Memory

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.memory.linearised.device

    @property
    def forgotten(self) -> Subset:
        """The training samples that go."""
        return Subset(self.train, self.forget.tolist())

    @property
    def retain(self) -> Subset:
        """The training samples that stay."""
        keep = torch.ones(len(self.train), dtype=torch.bool)  # type: ignore[arg-type]
        keep[self.forget] = False
        return Subset(self.train, keep.nonzero()[:, 0].tolist())


@dataclass(frozen=True)
class Unlearned:
    """The tuned parameters that a method arrived at, the seconds it took from a prepared memory if that was measured,
    what it says of its own result, if anything, and the bytes that it took at most, if measured."""

    parameters: dict[str, Tensor]
    seconds: float | None
    note: str = ""
    bytes: int | None = None


Method = Callable[[Problem], Unlearned]
"""A method answers a request. It is a frozen dataclass whose fields are its hyper-parameters."""


def measured(method: Method, problem: Problem) -> Unlearned:
    """The method's answer with the bytes that it took at most, unless it says itself."""
    with peak_memory(problem.device) as peak:
        done = method(problem)
    return done if done.bytes is not None else replace(done, bytes=peak.bytes)
