"""Who is in a memory: the samples' ids, and the position that each has had in it since it was first seen."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.data import Dataset

from fastntk.common.errors import InputError
from fastntk.inputs.batches import Labelled, digests, labels_offered
from fastntk.inputs.ids import Id, ids_of, once

log = logging.getLogger(__name__)


class Members(Labelled):
    """A data source addressed by the positions of a memory, which stay when samples leave either of them.

    Ids come in and go out here; everything beneath a memory speaks of positions. It does not change: ``without`` and
    ``joined_by`` give others.

    Args:
        source: a map-style dataset. If it has ``ids``, one a sample, these name the samples; else their indices do.
        ids: of the members by position, None where one has left; by default everything in the source.
    """

    def __init__(self, source: Dataset, ids: Iterable[Id | None] | None = None) -> None:
        self.source = source
        self._known: dict[Id | None, int] = {}
        self.by_position: tuple[Id | None, ...] = tuple(ids_of(source) if ids is None else ids)

    def __len__(self) -> int:
        return len(self.by_position)

    def __getitem__(self, position: int) -> Any:
        name = self.by_position[position]
        if name not in self._index:
            raise InputError(f"the data source has no sample {name!r}, which must be read. Give all of the data.")
        return self.source[self._index[name]]

    @property
    def _index(self) -> dict[Id | None, int]:
        """Where each id is in the source, which may have grown."""
        if len(self._known) != len(self.source):  # type: ignore[arg-type]
            self._known = {each: index for index, each in enumerate(ids_of(self.source))}
        return self._known

    @property
    def labels(self) -> Int[Tensor, " positions"] | None:
        """By position, if the source offers them without decoding images; -1 where there is no sample."""
        known, index = labels_offered(self.source), self._index
        if known is None:
            return None
        places = torch.tensor([index.get(each, -1) for each in self.by_position], dtype=torch.long)
        return torch.where(places < 0, -1, known[places])

    @property
    def ids(self) -> list[Id]:
        """Of those who are here."""
        return [each for each in self.by_position if each is not None]

    @property
    def first(self) -> int:
        """The first position whose sample the source has.

        Raises:
            InputError: it has none of the members' samples.
        """
        for position, each in enumerate(self.by_position):
            if each in self._index:
                return position
        raise InputError("the data source has none of the memory's samples.")

    @property
    def present(self) -> Bool[Tensor, " positions"]:
        """Which positions have a member."""
        return torch.tensor([each is not None for each in self.by_position])

    def positions(self, ids: Iterable[Id], lost: bool = False) -> Int[Tensor, " some"]:
        """The positions of members that are about to leave, checked; the images of some may be ``lost``.

        Raises:
            InputError: an id twice, not a member, or, unless it may be lost, not in the source; or nobody would remain.
        """
        wanted = once(ids)
        place = {each: position for position, each in enumerate(self.by_position) if each is not None}
        for each in wanted:
            if each not in place:
                raise InputError(
                    f"id {each!r} is not in the memory: it was never there, or it has been forgotten. The memory holds "
                    f"{len(place):,} samples. Leave it out of the request."
                )
            if each not in self._index and not lost:
                raise InputError(
                    f"the data source has no sample {each!r}, which must be read once more. Put it back; or prepare in "
                    "the dual, convex or convex-disk form, of which a sample can leave whose image is gone."
                )
        if wanted and len(wanted) == len(place):
            raise InputError("the request would forget every sample. Use the parameters before fitting instead.")
        return torch.tensor(sorted(place[each] for each in wanted), dtype=torch.long)

    def joined_by(self, ids: Iterable[Id]) -> "Members":
        """With more samples of the source, at the end.

        Raises:
            InputError: an id twice, a member already, or not in the source.
        """
        wanted, here = once(ids), set(self.by_position)
        for each in wanted:
            if each in here:
                raise InputError(f"id {each!r} is in the memory already. Leave it out of the request.")
            if each not in self._index:
                raise InputError(f"the data source has no sample {each!r}.")
        return self._with((*self.by_position, *wanted))

    def with_ids(self, ids: Iterable[Id]) -> "Members":
        """With more ids at the end, whether the source has their samples or not."""
        return self._with((*self.by_position, *ids))

    def without(self, positions: Int[Tensor, " some"]) -> "Members":
        """Without some; nothing is kept of their ids."""
        gone = set(positions.tolist())
        return self._with(None if place in gone else each for place, each in enumerate(self.by_position))

    def _with(self, ids: Iterable[Id | None]) -> "Members":
        others = Members(self.source, ids)
        others._known = self._known  # of the same source
        return others

    def check_images(self, some: Int[Tensor, " some"], pixels: Int[Tensor, " positions"], *how: int) -> None:
        """Raises ``InputError`` if the source has another member's image at one of ``some`` positions, as the network
        may be as sure of both; says how many are of nobody. ``pixels`` are digests, or 0; ``how`` is of ``digests``."""
        known, now = pixels[some], digests(self, some.tolist(), *how)
        odd = (now != known) & (known != 0)
        for position in some[odd & torch.isin(now, pixels[self.present])].tolist():
            raise InputError(
                f"the data source has another member's image under id {self.by_position[position]!r}. Give what was "
                "prepared, in the same order or with the same ids."
            )
        if odd.any():
            log.warning(
                "%d of %d images that were compared are not pixel by pixel those that were prepared, though the "
                "network says the same of them: decoded by another library, or replaced",
                *(int(odd.sum()), len(odd)),
            )

    def available(self, positions: Int[Tensor, " some"]) -> Int[Tensor, " available"]:
        """Those whose samples the source still has."""
        return positions[[self.by_position[position] in self._index for position in positions.tolist()]]

    def missing(self, positions: Int[Tensor, " some"]) -> int:
        """How many of them the source no longer has."""
        return len(positions) - len(self.available(positions))
