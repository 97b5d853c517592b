"""Derivatives with respect to a weight as outer products, which are smaller than the weight where it is large.

The weight of a linear layer, or of a convolution, is applied to T tokens of a sample, which may be pixels. With the
layer's input x there (of a convolution the patch) and the derivative g of an output with respect to the layer's own,

    dW = sum_t g_t x_t',    <dW, dW'> = sum_ts (g_t'g'_s) (x_t'x'_s).

All outputs of a sample share x. A parameter that is used in another way has one token, an input of 1, and g itself.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

_BLOCK = 2**24  # numbers of a block of products
_MULTIPLIED = 32  # multiplications that take as long as an entry of the elementwise product


@dataclass(frozen=True)
class Layer:
    """The sizes of one parameter's outer products.

    Attributes:
        name: of the parameter.
        tokens: T.
        inputs: the length of x.
        outputs: the length of g.
    """

    name: str
    tokens: int
    inputs: int
    outputs: int

    def numbers(self, rows: int) -> int:
        """That a sample's outer products of so many rows have."""
        return self.tokens * (self.inputs * (self.inputs > 1) + rows * self.outputs)

    def smaller(self, rows: int) -> bool:
        """Whether these are fewer than the derivatives' own."""
        return self.numbers(rows) < rows * self.inputs * self.outputs

    def paired(self, rows: int) -> bool:
        """Whether inner products of two rows are cheaper from x and g than from the derivatives."""
        return self._of_pairs(rows) < self.inputs * self.outputs

    def multiplications(self, rows: int) -> float:
        """Of the inner product of two rows, where a sample has so many."""
        written = float(self.inputs * self.outputs)
        return min(written, self._of_pairs(rows)) if self.smaller(rows) else written

    def _of_pairs(self, rows: int) -> float:
        return self.tokens**2 * (self.inputs / rows**2 + self.outputs + _MULTIPLIED)


@dataclass(frozen=True)
class Outer:
    """``sum_t g_t x_t'`` of every sample and row.

    Attributes:
        inputs: x.
        slopes: g.
    """

    inputs: Float[Tensor, "samples tokens inputs"]
    slopes: Float[Tensor, "samples outputs tokens channels"]

    def __len__(self) -> int:
        return len(self.slopes)

    def __getitem__(self, samples: slice | Tensor) -> "Outer":
        return Outer(self.inputs[samples], self.slopes[samples])

    def room(self, count: int) -> "Outer":
        """For so many samples."""
        return Outer(*(each.new_empty(count, *each.shape[1:]) for each in (self.inputs, self.slopes)))

    def put_(self, samples: slice, others: "Outer") -> None:
        """Others in the places of some samples."""
        self.inputs[samples], self.slopes[samples] = others.inputs, others.slopes

    def written(self, channels: slice) -> Float[Tensor, "rows derivatives"]:
        """The derivatives with respect to some channels' weights, written out."""
        return (self.slopes[..., channels].mT @ self.inputs[:, None]).flatten(0, 1).flatten(1)

    def inner(self, other: "Outer") -> Float[Tensor, "rows others"]:
        """All inner products of rows of two sets of samples."""
        of_inputs = self.inputs.flatten(0, 1) @ other.inputs.flatten(0, 1).T
        of_slopes = self.slopes.flatten(0, 2) @ other.slopes.flatten(0, 2).T
        (n, rows, t), (m, others, s) = self.slopes.shape[:3], other.slopes.shape[:3]
        products = of_slopes.view(n, rows, t, m, others, s).mul_(of_inputs.view(n, 1, t, m, 1, s))
        return products.sum((2, 5)).view(n * rows, m * others)

    def samples(self) -> int:
        """How many make a block, of which two are multiplied at a time."""
        rows, tokens = self.slopes.shape[1:3]
        return max(1, int(_BLOCK**0.5) // (rows * tokens))
