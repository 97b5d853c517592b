"""Where each tuned parameter lies in one flat vector of all."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where each tuned parameter lies in the flat ``theta``: ``fast``, then ``slow``, then the ``head`` as a matrix.

    ``fast`` parameters have a per-sample rule, ``slow`` ones are left to ``torch.func``; ``head`` is the weight and the
    bias (whichever are tuned) of the linear layer whose output the logits are.
    """

    fast: tuple[str, ...]
    slow: tuple[str, ...]
    head: tuple[str, ...]
    shapes: Mapping[str, torch.Size]

    def slower(self, names: Collection[str]) -> "Layout":
        """With some parameters left to ``torch.func``; of a head all, if any is."""
        left = {*names, *(self.head if set(self.head) & set(names) else ())}
        return Layout(
            fast=tuple(name for name in self.fast if name not in left),
            slow=tuple(name for name in self.shapes if name in self.slow or name in left),
            head=tuple(name for name in self.head if name not in left),
            shapes=self.shapes,
        )

    def narrowed(self, names: Collection[str]) -> "Layout":
        """Of some of the parameters."""
        parts = {part: tuple(n for n in getattr(self, part) if n in names) for part in ("fast", "slow", "head")}
        return Layout(**parts, shapes={name: shape for name, shape in self.shapes.items() if name in names})

    @property
    def size(self) -> int:
        """``p``: the number of tuned parameters."""
        return sum(shape.numel() for shape in self.shapes.values())

    def flatten(self, parameters: Mapping[str, Tensor]) -> Float[Tensor, " p"]:
        """The parameters by name as one float64 vector."""
        rest = [parameters[name].detach().flatten() for name in (*self.fast, *self.slow)]
        head = [parameters[name].detach().reshape(self.shapes[name][0], -1) for name in self.head]
        return torch.cat([*rest, *([torch.cat(head, 1).flatten()] if head else [])]).double()

    def head_of(self, vector: Float[Tensor, " p"]) -> Float[Tensor, "classes features"]:
        """The head's part of a vector, as a matrix with the bias for its last column; the head must be tuned."""
        classes = self.shapes[self.head[0]][0]
        size = sum(self.shapes[name].numel() for name in self.head)
        return vector[-size:].view(classes, -1)

    def unflatten(self, vector: Float[Tensor, " p"], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The vector as parameters by name, copies in the dtypes and the order of ``like``."""
        names = (*self.fast, *self.slow)
        sizes = [self.shapes[name].numel() for name in names]
        *parts, head = vector.split([*sizes, self.size - sum(sizes)])
        result = {name: part.view(self.shapes[name]) for name, part in zip(names, parts, strict=True)}
        if self.head:
            classes = self.shapes[self.head[0]][0]
            widths = [self.shapes[name][1:].numel() for name in self.head]
            columns = head.view(classes, sum(widths)).split(widths, 1)
            result |= {name: part.reshape(self.shapes[name]) for name, part in zip(self.head, columns, strict=True)}
        return {name: result[name].to(like[name], copy=True) for name in like}
