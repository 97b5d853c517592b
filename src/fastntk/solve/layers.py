"""The neural tangent kernel with no Jacobian kept: summed over groups of parameters, one group's rows at a time.

    K = sum over groups g of J_g J_g',

every group by a pass over the samples that differentiates with respect to its parameters alone. Weights that are larger
than their layer's inputs and output gradients are held as these (``fastntk.jacobians.outer``), and multiplied as these
where that is cheaper. The head's part comes from its inputs, and is not in here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.common import distributed
from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.outer import Layer, Outer
from fastntk.solve.collect import Checkpoint, remaining
from fastntk.solve.linalg import add_product_, mirror_

HELD = 2**32
"""Bytes of one group, unless a single parameter takes more."""

_COLUMNS = 4096  # of rows that are multiplied at a time


@dataclass(frozen=True)
class _Group:
    """Parameters that one pass is for, and their bytes over all samples."""

    layers: tuple[Layer, ...]
    bytes: int

    @property
    def names(self) -> list[str]:
        """Of the parameters."""
        return [layer.name for layer in self.layers]


def groups(layers: Iterable[Layer], samples: int, rows: int, itemsize: int) -> list[_Group]:
    """The parameters from the last on, as many at a time as ``HELD`` has room for: the fewer passes the better, and
    those for the last layers do not go through the first."""
    found: list[_Group] = []
    for layer in reversed(list(layers)):
        size = samples * itemsize * _numbers(layer, rows)
        if found and found[-1].bytes + size <= HELD:
            found[-1] = _Group((*found[-1].layers, layer), found[-1].bytes + size)
        else:
            found.append(_Group((layer,), size))
    return found


def layered_kernel(
    network: Linearised,
    parts: Sequence[_Group],
    positions: Sequence[int],
    kept: Int[Tensor, "samples kept"],
    rows: int,
    joining: int = 0,
    checkpoint: Checkpoint | None = None,
) -> Float[Tensor, "rows others"]:
    """``K`` without the head's part, in float64: of all samples at ``positions``, or of all with the last that are
    ``joining``.

    Args:
        network: linearised.
        parts: the groups of its parameters that are summed over, shared out among the processes.
        positions: of the samples.
        kept: the classes of each.
        rows: of a sample.
        joining: how many.
        checkpoint: of the sum over the groups that are done, or None.
    """
    columns = (joining or len(positions)) * rows
    total = torch.zeros(len(positions) * rows, columns, dtype=torch.float64, device=network.device)
    mine = remaining(checkpoint, len(parts))
    for place, each in enumerate(mine):
        _add_group_(total, network, parts[each], positions, kept, rows, f"kernel, group {each + 1} of {len(parts)}")
        if checkpoint:
            checkpoint.write({"kernel": total}, mine[: place + 1])
    if checkpoint:
        checkpoint.add_earlier_({"kernel": total})
    distributed.sum_([total])
    return total if joining else mirror_(total)


def _numbers(layer: Layer, rows: int) -> int:
    """That a sample's derivatives have, as they are held."""
    return layer.numbers(rows) if layer.smaller(rows) else rows * layer.inputs * layer.outputs


def _add_group_(
    total: Tensor,
    network: Linearised,
    group: _Group,
    positions: Sequence[int],
    kept: Tensor,
    rows: int,
    description: str,
) -> None:
    """Add a group's part of the kernel: of one of all samples, the lower triangle."""
    outer = {layer.name: layer for layer in group.layers if layer.smaller(rows)}
    rest, held = _held(network.narrowed(group.names), positions, kept, list(outer), description)
    joining = slice(len(rest) - total.shape[1] // rows, None)
    for columns in rest.flatten(0, 1).split(_COLUMNS, 1):
        _add_written_(total, columns.contiguous())
    for name, layer in outer.items():
        whole = held.pop(name)
        if layer.paired(rows):
            _add_paired_(total, whole, whole[joining], rows)
        else:
            channels = max(1, _COLUMNS // layer.inputs)
            for start in range(0, layer.outputs, channels):
                _add_written_(total, whole.written(slice(start, start + channels)))


def _held(
    network: Linearised, positions: Sequence[int], kept: Tensor, outer: list[str], description: str
) -> tuple[Float[Tensor, "samples outputs rest"], dict[str, Outer]]:
    """The rows of all samples, and some weights' as outer products: no two copies of them exist at once."""
    rest, held, start = torch.empty(0), {}, 0
    for part, factors in network.parted(positions, kept, outer, description):
        if not start:
            rest = part.new_empty(len(positions), *part.shape[1:])
            held = {name: each.room(len(positions)) for name, each in factors.items()}
        here = slice(start, start + len(part))
        rest[here] = part
        for name, each in factors.items():
            held[name].put_(here, each)
        start += len(part)
    return rest, held


def _add_written_(total: Tensor, columns: Tensor) -> None:
    """Add the products of rows, or those with the last of them."""
    if len(total) == total.shape[1]:
        add_product_(total, columns, columns)
    else:
        total += columns @ columns[-total.shape[1] :].T


def _add_paired_(total: Tensor, whole: Outer, others: Outer, rows: int) -> None:
    """The same from outer products, block by block."""
    size, symmetric = whole.samples(), len(total) == total.shape[1]
    for left in range(0, len(whole), size):
        for right in range(0, min(left + size, len(whole)) if symmetric else len(others), size):
            block = whole[left : left + size].inner(others[right : right + size])
            total[left * rows : (left + size) * rows, right * rows : (right + size) * rows] += block
