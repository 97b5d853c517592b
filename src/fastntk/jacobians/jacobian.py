"""The Jacobians of a batch of samples, with the head's structure kept."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Jacobian:
    """``J_i = df(x_i)/d theta`` for a batch, with the head's structure kept.

    ``theta`` is flat: first the ``rest`` (all tuned parameters but the head's), then the head as a row-major
    ``[C, d]`` matrix (the weight, with the bias as its last column). The head's part of ``J_i`` is ``I_C (x) h_i``,
    so only ``h_i``, the head's input with a 1 appended for the bias, is stored; its width is 0 if the head is frozen.
    """

    rest: Float[Tensor, "batch classes rest"]
    features: Float[Tensor, "batch features"]

    @property
    def size(self) -> int:
        """``p``: the number of tuned parameters."""
        return self.rest.shape[2] + self.rest.shape[1] * self.features.shape[1]

    def split(self, vector: Float[Tensor, " p"]) -> tuple[Float[Tensor, " rest"], Float[Tensor, "classes features"]]:
        """``vector`` as its rest and its head matrix."""
        rest = self.rest.shape[2]
        return vector[:rest], vector[rest:].view(self.rest.shape[1], self.features.shape[1])

    def __len__(self) -> int:
        return len(self.rest)

    def matvec(self, vector: Float[Tensor, " p"]) -> Float[Tensor, "batch classes"]:
        """``J v``: the change of the logits that a change ``v`` of the parameters causes, to first order."""
        rest, head = self.split(vector.to(self.rest))
        return (self.rest @ rest + self.features @ head.T).to(vector)

    def rmatvec(self, cotangent: Float[Tensor, "batch classes"]) -> Float[Tensor, " p"]:
        """``J' a``, summed over samples and classes."""
        a = cotangent.to(self.rest)
        rest = self.rest.flatten(0, 1).T @ a.flatten()
        return torch.cat([rest, (a.T @ self.features).flatten()]).to(cotangent)

    def to(self, dtype: torch.dtype) -> "Jacobian":
        """The same in another dtype."""
        return Jacobian(self.rest.to(dtype), self.features.to(dtype))

    def dense(self) -> Float[Tensor, "batch classes p"]:
        """``J`` written out, zeros included."""
        eye = torch.eye(self.rest.shape[1]).to(self.rest)
        head = torch.einsum("cd,nf->ncdf", eye, self.features).flatten(2)
        return torch.cat([self.rest, head], 2)

    def __getitem__(self, samples: Any) -> "Jacobian":
        """The Jacobian of some of the samples (an index tensor, a mask or a slice)."""
        return Jacobian(self.rest[samples], self.features[samples])


def concatenate(parts: list[Jacobian]) -> Jacobian:
    """The Jacobian of several batches as one."""
    return Jacobian(*(torch.cat([getattr(part, name) for part in parts]) for name in ("rest", "features")))
