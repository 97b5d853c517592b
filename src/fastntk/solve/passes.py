"""Products with the Gram matrix by passes of the network over the samples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.common import distributed
from fastntk.jacobians import products
from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.rows import Rows


@dataclass(frozen=True)
class Passes:
    """Samples of a network as a ``Gram`` operator that forms no Jacobian: a forward-mode and a backward pass a product.

    Attributes:
        network: linearised.
        positions: of the samples, shared out among the processes.
    """

    network: Linearised
    positions: Int[Tensor, " samples"]

    @cached_property
    def _mine(self) -> list[int]:
        return self.positions[distributed.rank() :: distributed.size()].tolist()

    @property
    def count(self) -> int:
        """n."""
        return len(self.positions)

    @property
    def outputs(self) -> int:
        """C."""
        return self.network.classes

    @cached_property
    def rhs(self) -> Float[Tensor, " p"]:
        """``b``, by a pass."""
        return self._total(products.pull(self.network, self.network.residual(self._mine)))

    def matvec(self, vector: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """``G v``, by a pass."""
        return self._total(products.gram(self.network, self._mine, vector)).to(vector)

    def downhill(self, step: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """``b - G d = sum J_i'(r_i - H_i J_i d)`` for a step d, by one pass."""
        network = self.network

        def left(x: Tensor, r: Tensor) -> Tensor:
            return r - products.curve(network, x, products.tangent_of(network, x, step)).to(r)

        return self._total(products.pull(network, ((x, left(x, r)) for x, r in network.residual(self._mine))))

    @property
    def trace(self) -> float:
        """An estimate of ``tr G``."""
        return self.estimated_trace(seed=0)

    def estimated_trace(self, seed: int) -> float:
        """Without bias: the mean square of ``J'L a`` over random signs a, one draw a batch; so an automatic ridge of
        this form differs by a percent or so between batch sizes and numbers of processes."""
        network, generator = self.network, torch.Generator().manual_seed(seed)
        total = torch.zeros((), dtype=torch.float64, device=network.device)
        for x, r in network.residual(self._mine):
            signs = torch.randint(2, r.shape, generator=generator).to(r) * 2 - 1
            total += products.pull(network, [(x, products.lift(network, x, signs))]).square().sum()
        return float(self._total(total))

    @property
    def dtype(self) -> torch.dtype:
        """Of the basis of a Krylov space."""
        return self.network.dtype

    @staticmethod
    def _total(tensor: Tensor) -> Tensor:
        distributed.sum_([tensor])
        return tensor


@dataclass(frozen=True)
class Passing:
    """J of rows whose Jacobians are not held, by passes that the processes share.

    Attributes:
        network: linearised.
        rows: of which the head's part alone is held.
        positions: of the samples whose rows are there; the others' images are 0.
        places: of these among the rows; None where they are the positions.
    """

    network: Linearised
    rows: Rows
    positions: Sequence[int]
    places: Sequence[int] | None = None

    def matvec(self, vector: Float[Tensor, " p"]) -> Float[Tensor, "samples outputs"]:
        """``J v``, by a forward-mode pass."""
        image = torch.zeros(self.rows.residual.shape, dtype=torch.float64, device=self.network.device)
        mine = slice(distributed.rank(), None, distributed.size())
        samples, places = self.positions[mine], list((self.places or self.positions)[mine])
        moved = products.tangent(self.network, samples, vector)
        image[places] = self.rows.jacobian[places].of_logits(moved).double()
        distributed.sum_([image])
        return image

    def rmatvec(self, cotangent: Float[Tensor, "samples outputs"]) -> Float[Tensor, " p"]:
        """``J'a``, by a backward pass over the samples with an a; their positions are their places."""
        mine = cotangent.any(1).nonzero()[distributed.rank() :: distributed.size(), 0]
        of_logits = self.rows.jacobian[mine].to_logits(cotangent[mine])
        total = products.pull(self.network, self._with_images(mine.tolist(), of_logits))
        distributed.sum_([total])
        return total

    def _with_images(self, samples: list[int], of_logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        start = 0
        for images, _ in self.network.one_pass(samples) if samples else ():
            yield images, of_logits[start : start + len(images)]
            start += len(images)
