"""The Jacobians and residuals of a set of samples."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.jacobians.jacobian import Jacobian, concatenate
from fastntk.tuning.loss import Kept

PART = 128
"""Samples whose rows are read from disk, or written to it, at a time."""


def rows_of(samples: Int[Tensor, " some"], outputs: int) -> Int[Tensor, " rows"]:
    """The rows of samples that have so many each."""
    return (samples[:, None] * outputs + torch.arange(outputs, device=samples.device)).flatten()


@dataclass(frozen=True)
class Point:
    """Where the rows' logits are, and the loss as a function of them.

    Attributes:
        z: the kept logits at ``theta*``, or their contrasts.
        kept: the loss as a function of them.
    """

    z: Float[Tensor, "samples outputs"]
    kept: Kept

    def __getitem__(self, samples: Any) -> "Point":
        return Point(self.z[samples], self.kept[samples])


@dataclass(frozen=True)
class Rows:
    """``J_i`` and ``r_i`` of every sample of a set; they do not grow with p squared. ``+`` concatenates.

    Where only some classes are kept, ``point`` has the loss as a function of their logits.
    """

    jacobian: Jacobian
    residual: Float[Tensor, "samples outputs"]
    point: Point | None = None

    @classmethod
    def gathered(cls, batches: Iterable["Rows"], count: int) -> "Rows":
        """At least one batch, and those that follow, ``count`` samples in all: no two copies of them exist at once."""
        whole, start = None, 0
        for batch in batches:
            if whole is None:
                whole = batch.each(lambda _, tensor: tensor.new_empty(count, *tensor.shape[1:]))
            whole.put_(slice(start, start + len(batch)), batch)
            start += len(batch)
        return cast(Rows, whole)

    @classmethod
    def together(cls, parts: list["Rows"]) -> "Rows":
        """At least one set of rows as one."""
        points = [part.point for part in parts if part.point]
        point = None
        if points:
            kept = points[0].kept
            for each in points[1:]:
                kept = kept + each.kept
            point = Point(torch.cat([each.z for each in points]), kept)
        residual = torch.cat([part.residual for part in parts])
        return cls(concatenate([part.jacobian for part in parts]), residual, point)

    def __len__(self) -> int:
        return len(self.residual)

    def __add__(self, other: "Rows") -> "Rows":
        return Rows.together([self, other])

    def __getitem__(self, samples: Any) -> "Rows":
        return Rows(self.jacobian[samples], self.residual[samples], self.point and self.point[samples])

    def parts(self, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[slice, Jacobian]]:
        """The Jacobians part by part, ``PART`` samples each, in another dtype and place, with the samples that they
        are of: what lies on disk is read once, and never in memory as a whole."""
        for start in range(0, len(self), PART):
            some = slice(start, start + PART)
            yield some, self.jacobian[some].to(dtype, device)

    def mean_diagonal(self, dtype: torch.dtype, device: torch.device) -> float:
        """Of ``J J'``, by one read."""
        total = 0.0
        for _, jacobian in self.parts(dtype, device):
            own = jacobian.rest.shape[1] if jacobian.kept is None else jacobian.combined().double().square().sum((1, 2))
            total += float(jacobian.rest.norm()) ** 2
            total += float((jacobian.features.double().square().sum(1) * own).sum())
        return total / self.residual.numel()

    def error(self, step: Float[Tensor, " p"]) -> Float[Tensor, " rows"]:
        """``r_S - J_S s``, in float64."""
        return (self.residual.double() - self.jacobian.to(torch.float64).matvec(step)).flatten()

    def places(self, positions: Int[Tensor, " some"]) -> Int[Tensor, " rows"]:
        """The rows of the kernel that belong to the samples at ``positions``."""
        return rows_of(positions.to(self.residual.device), self.residual.shape[1])

    def room_for(self, positions: Int[Tensor, " some"]) -> int:
        """How many more samples it takes to have one at each of ``positions``."""
        return max(0, int(positions.max()) + 1 - len(self))

    def with_others(self, positions: Int[Tensor, " some"], others: "Rows") -> "Rows":
        """With other samples at ``positions``, where there were none, in arrays of its own; between them nothing."""
        room = self.room_for(positions)
        empty = others.each(lambda _, tensor: tensor.new_zeros(room, *tensor.shape[1:]))
        whole = (self + empty).each(lambda _, tensor: tensor.clone())
        whole.put_(positions, others)
        return whole

    def put_(self, samples: Any, others: "Rows") -> None:
        """The rows of others in the places of some samples, in place, in the dtype and on the device of these."""
        given = others.tensors()
        for name, tensor in self._of_samples():
            tensor[samples] = given[name].to(tensor.device, tensor.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        own = {"rest": self.jacobian.rest, "features": self.jacobian.features, "residual": self.residual}
        if self.point is None or self.jacobian.kept is None:
            return own
        kept, classes = self.point.kept, torch.tensor(self.jacobian.total)
        loss = {field.name: getattr(kept, field.name) for field in fields(Kept)}
        return {**own, "kept": self.jacobian.kept, "classes": classes, "z": self.point.z, **loss}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str = "") -> "Rows":
        """The reverse of ``tensors``, whose names may have a prefix."""
        rest, features, residual = (tensors[prefix + name] for name in ("rest", "features", "residual"))
        if not any(prefix + name in tensors for name in ("kept", "z")):
            return cls(Jacobian(rest, features), residual)
        kept, classes, z = (tensors[prefix + name] for name in ("kept", "classes", "z"))
        loss = Kept(*(tensors[prefix + field.name] for field in fields(Kept)))
        return cls(Jacobian(rest, features, kept.to(rest.device), int(classes)), residual, Point(z, loss))

    def each(self, change: Callable[[str, Tensor], Tensor]) -> "Rows":
        """With every tensor of the samples changed, as a function of its name and itself."""
        return Rows.from_tensors({**self.tensors(), **{name: change(name, own) for name, own in self._of_samples()}})

    def _of_samples(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that have a row a sample: all but the number of classes."""
        return ((name, tensor) for name, tensor in self.tensors().items() if name != "classes")

    def clear_(self, samples: Any) -> None:
        """Nothing is left of some of the samples, in place."""
        for _, tensor in self._of_samples():
            tensor[samples] = 0


@dataclass(frozen=True)
class Doubled:
    """J of rows, multiplied in float64 part by part: products are good to its digits, whatever dtype the rows have."""

    rows: Rows

    def matvec(self, vector: Float[Tensor, " p"]) -> Float[Tensor, "samples outputs"]:
        """``J v``."""
        return torch.cat([jacobian.matvec(vector) for _, jacobian in self._parts(vector)])

    def rmatvec(self, cotangent: Float[Tensor, "samples outputs"]) -> Float[Tensor, " p"]:
        """``J'a``."""
        parts = (jacobian.rmatvec(cotangent[some]) for some, jacobian in self._parts(cotangent))
        return cast(Tensor, sum(parts))

    def _parts(self, like: Tensor) -> Iterator[tuple[slice, Jacobian]]:
        return self.rows.parts(torch.float64, like.device)
