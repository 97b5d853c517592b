"""The Jacobians and residuals of a set of samples."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastntk.jacobians.jacobian import Jacobian, concatenate


@dataclass(frozen=True)
class Rows:
    """``J_i`` and ``r_i`` of every sample of a set; they do not grow with p squared. ``+`` concatenates."""

    jacobian: Jacobian
    residual: Float[Tensor, "samples outputs"]

    @classmethod
    def of(cls, batches: Iterable[tuple[Jacobian, Tensor]]) -> "Rows":
        """The rows of at least one batch."""
        parts = list(batches)
        return cls(concatenate([jacobian for jacobian, _ in parts]), torch.cat([residual for _, residual in parts]))

    def __len__(self) -> int:
        return len(self.residual)

    def __add__(self, other: "Rows") -> "Rows":
        return Rows(concatenate([self.jacobian, other.jacobian]), torch.cat([self.residual, other.residual]))

    def __getitem__(self, samples: Any) -> "Rows":
        return Rows(self.jacobian[samples], self.residual[samples])

    def targets(self, displacement: Float[Tensor, " p"]) -> Float[Tensor, " rows"]:
        """``r_S + J_S u``, what the linearised model must add to its value at ``theta_0``; float64."""
        return (self.residual.double() + self.jacobian.matvec(displacement)).flatten()

    def error(self, step: Float[Tensor, " p"]) -> Float[Tensor, " rows"]:
        """``r_S - J_S s``, in float64."""
        return (self.residual.double() - self.jacobian.to(torch.float64).matvec(step)).flatten()
