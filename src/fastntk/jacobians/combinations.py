"""Probing the classes: for many of them, a few random combinations of the logits in place of all.

A sample's C logits are replaced by ``V_i' f(x_i)``, k < C combinations, so that its Jacobian costs k backward passes.
``V_i`` is ``sqrt(C/k)`` times k orthonormal vectors of R^C in random directions, hence ``E[V_i V_i'] = I``, and the
sums ``sum J_i'V_i V_i'J_i`` and ``sum J_i'V_i V_i'r_i`` are unbiased estimates of G and b; with k = C they are exact.
The draw depends on the seed and the sample's position alone, so that a sample that leaves takes away what it brought.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fastntk.common.errors import InputError
from fastntk.jacobians.jacobian import Jacobian


@dataclass(frozen=True)
class ClassProbes:
    """``count`` probes (k) a sample, drawn by ``seed``."""

    count: int
    seed: int = 0

    def check(self, classes: int) -> None:
        """Raises ``InputError`` unless there are from 1 to C probes."""
        if not 1 <= self.count <= classes:
            raise InputError(f"the number of probes must be from 1 to the number of classes, {classes}.")

    def draw(self, positions: Sequence[int], classes: int) -> Float[Tensor, "batch classes probes"]:
        """``V_i`` of the samples at some positions, in float64.

        Raises:
            InputError: there are fewer classes than probes, or no probe.
        """
        self.check(classes)
        generator = torch.Generator()
        normal = torch.empty(len(positions), classes, self.count, dtype=torch.float64)
        for place, i in zip(normal, positions, strict=True):
            torch.randn(place.shape, generator=generator.manual_seed(self.seed * 2**40 + i), out=place)
        return torch.linalg.qr(normal).Q * (classes / self.count) ** 0.5


def error(exact: Jacobian, probed: Jacobian) -> float:
    """``|G~ - G| / |G|`` (Frobenius) of the samples' Gram matrices ``G = sum J'J``; it falls as 1 / sqrt(n)."""
    full, part = exact.dense().flatten(0, 1), probed.dense().flatten(0, 1)
    inner = [(left @ right.T).square().sum() for left, right in ((full, full), (part, part), (full, part))]
    return float(((inner[0] + inner[1] - 2 * inner[2]).clamp_min(0) / inner[0]).sqrt())
