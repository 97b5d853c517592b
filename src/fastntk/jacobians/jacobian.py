"""The Jacobians of a batch of samples, with the head's structure kept."""

from dataclasses import dataclass, replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.tuning.loss import contrasts


@runtime_checkable
class Operator(Protocol):
    """J of some samples' rows, held or not."""

    def matvec(self, vector: Float[Tensor, " p"]) -> Float[Tensor, "batch outputs"]:
        """``J v``."""

    def rmatvec(self, cotangent: Float[Tensor, "batch outputs"]) -> Float[Tensor, " p"]:
        """``J'a``."""


@dataclass(frozen=True)
class Jacobian:
    """``J_i = df(x_i)/d theta`` for a batch, with the head's structure kept.

    ``theta`` is flat: first the ``rest`` (all tuned parameters but the head's), then the head as a row-major
    ``[C, d]`` matrix (the weight, with the bias as its last column). The head's part of ``J_i`` is ``I_C (x) h_i``,
    so only ``h_i``, the head's input with a 1 appended for the bias, is stored; its width is 0 if the head is frozen.

    Attributes:
        rest: the rows' part for all but the head.
        features: ``h_i``.
        kept: the classes of each sample that the rows are of: a row each, or, where there is one row fewer, their
            ``contrasts`` (``fastntk.tuning.loss``). None where the rows are all classes in order.
        total: C, where only some classes are kept.
    """

    rest: Float[Tensor, "batch outputs rest"]
    features: Float[Tensor, "batch features"]
    kept: Int[Tensor, "batch kept"] | None = None
    total: int = 0

    @property
    def classes(self) -> int:
        """C."""
        return self.rest.shape[1] if self.kept is None else self.total

    @property
    def size(self) -> int:
        """``p``: the number of tuned parameters."""
        return self.rest.shape[2] + self.classes * self.features.shape[1]

    def split(self, vector: Float[Tensor, " p"]) -> tuple[Float[Tensor, " rest"], Float[Tensor, "classes features"]]:
        """``vector`` as its rest and its head matrix."""
        rest = self.rest.shape[2]
        return vector[:rest], vector[rest:].view(self.classes, self.features.shape[1])

    def __len__(self) -> int:
        return len(self.rest)

    def combined(self) -> Float[Tensor, "batch classes outputs"]:
        """What each row has of the logits of all classes, where only some are kept."""
        kept = cast(Tensor, self.kept)
        own = self._own(kept.shape[1])[None].expand(len(kept), -1, -1)
        index = kept[:, :, None].expand_as(own)
        return own.new_zeros(len(kept), self.total, own.shape[2]).scatter(1, index, own)

    def _own(self, kept: int) -> Float[Tensor, "kept outputs"]:
        """What each row has of the logits that are kept."""
        return torch.eye(kept).to(self.rest) if self.rest.shape[1] == kept else contrasts(kept).to(self.rest)

    def matvec(self, vector: Float[Tensor, " p"]) -> Float[Tensor, "batch outputs"]:
        """``J v``: the change of the logits that a change ``v`` of the parameters causes, to first order."""
        rest, head = self.split(vector.to(self.rest))
        return (self.rest @ rest + self.of_logits(self.features @ head.T)).to(vector)

    def rmatvec(self, cotangent: Float[Tensor, "batch outputs"]) -> Float[Tensor, " p"]:
        """``J' a``, summed over samples and rows."""
        a = cotangent.to(self.rest)
        rest = self.rest.flatten(0, 1).T @ a.flatten()
        return torch.cat([rest, (self.to_logits(a).T @ self.features).flatten()]).to(cotangent)

    def of_logits(self, moved: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch outputs"]:
        """What the rows have of changes of all logits."""
        if self.kept is None:
            return moved
        return moved.gather(1, self.kept) @ self._own(self.kept.shape[1]).to(moved)

    def to_logits(self, cotangent: Float[Tensor, "batch outputs"]) -> Float[Tensor, "batch classes"]:
        """The reverse of it, transposed: cotangents of all logits from those of the rows."""
        if self.kept is None:
            return cotangent
        of_classes = cotangent @ self._own(self.kept.shape[1]).T.to(cotangent)
        return cotangent.new_zeros(len(cotangent), self.total).scatter_add_(1, self.kept, of_classes)

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> "Jacobian":
        """The same in another dtype, and on another device."""
        rest, features = (each.to(device, dtype) for each in (self.rest, self.features))
        return replace(self, rest=rest, features=features, kept=None if self.kept is None else self.kept.to(device))

    def dense(self) -> Float[Tensor, "batch outputs p"]:
        """``J`` written out, zeros included."""
        eye = torch.eye(self.classes).to(self.rest)
        own = eye.expand(len(self), -1, -1) if self.kept is None else self.combined().mT
        head = torch.einsum("ncd,nf->ncdf", own, self.features).flatten(2)
        return torch.cat([self.rest, head], 2)

    def __getitem__(self, samples: Any) -> "Jacobian":
        """The Jacobian of some of the samples (an index tensor, a mask or a slice)."""
        kept = None if self.kept is None else self.kept[samples]
        return Jacobian(self.rest[samples], self.features[samples], kept, self.total)


def concatenate(parts: list[Jacobian]) -> Jacobian:
    """The Jacobian of several batches as one."""
    rest, features = (torch.cat([getattr(part, name) for part in parts]) for name in ("rest", "features"))
    kept = [part.kept for part in parts if part.kept is not None]
    return Jacobian(rest, features, torch.cat(kept) if kept else None, parts[0].total)
