"""Members that show the same image as a sample which is to be forgotten, or nearly the same: what it has left in the
model stays as long as they do."""

from collections.abc import Iterable
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.common.errors import InputError
from fastntk.inputs.ids import Id
from fastntk.jacobians.linearised import Linearised
from fastntk.memory.members import Members
from fastntk.memory.memory import Memory
from fastntk.memory.state import same_pixels


def copies(memory: Memory, ids: Iterable[Id]) -> list[Id] | None:
    """The other members that have the very pixels of one of the given samples, whatever their labels.

    By digests that the memory has: no image is read. None if it is not known, in a memory that was prepared by a
    version which did not keep them; a refresh does.

    Raises:
        InputError: as of ``Memory.forget``.
    """
    members = memory.state.members
    found = same_pixels(memory.state, members.positions(ids, lost=True))
    return None if found is None else _ids(members, found)


def near_copies(memory: Memory, ids: Iterable[Id], distance: float) -> dict[Id, float]:
    """The other members within a distance of one of the given samples, the nearest first, with their distances:

        min_{j in asked}  |h_i - h_j| / sqrt(2 mean |h - mean h|^2)

    with ``h_i`` what the head is given at ``theta*``, so that two images drawn at random are 1 apart (root of the mean
    square). A forward pass over all of them; members whose image the data source lacks are left out.

    Raises:
        InputError: as of ``Memory.forget``, or no linear head is tuned, or the distance is not above 0.
    """
    if not distance > 0:
        raise InputError(f"a distance is above 0, not {distance!r}.")
    state, members = memory.state, memory.state.members
    asked = members.positions(ids)
    others = members.available(state.positions[~torch.isin(state.positions, asked)])
    far, order = _distances(state.network, asked, others).sort()
    near = far <= distance
    return dict(zip(_ids(members, others[order[near]]), far[near].tolist(), strict=True))


def _ids(members: Members, positions: Int[Tensor, " some"]) -> list[Id]:
    return [cast(Id, members.by_position[position]) for position in positions.tolist()]


def _distances(
    network: Linearised, asked: Int[Tensor, " asked"], others: Int[Tensor, " others"]
) -> Float[Tensor, " others"]:
    """Of each of ``others`` to the nearest of ``asked``."""
    if not network.layout.head:
        raise InputError("near copies are told by what a tuned linear head is given, and none is tuned here.")
    passed = network.one_pass([*asked.tolist(), *others.tolist()])
    features = torch.cat([network.jacobian.features(images)[0].double() for images, _ in passed]).cpu()
    spread = (features - features.mean(0)).square().sum(1).mean().mul(2).sqrt()
    near = torch.cdist(features[len(asked) :], features[: len(asked)]).amin(1)
    return near / spread.clamp_min(torch.finfo(near.dtype).tiny)
