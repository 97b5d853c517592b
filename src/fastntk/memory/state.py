"""Everything that a memory knows at one moment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fastntk.common.errors import InputError
from fastntk.jacobians.layout import Layout
from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.rows import Rows
from fastntk.memory.audit import Audit
from fastntk.memory.certificate import Removal
from fastntk.memory.members import Members
from fastntk.solve.on_disk import OnDisk
from fastntk.solve.ridge import Calibration
from fastntk.solve.solution import Solution


def _calibration(document: Mapping[str, Any] | None) -> Calibration | None:
    return Calibration(document["ridge"], document["factor"], document["mismatch"]) if document else None


def _removal(pair: Sequence[float] | None) -> Removal | None:
    return Removal(*pair) if pair else None


# How a folder keeps a field: as a tensor, which may be None if it is optional, or as JSON, and what makes it again.
_TENSOR = {"kept": "tensor", "optional": False}
_OPTIONAL = {"kept": "tensor", "optional": True}
_PLAIN = {"kept": "data", "make": lambda value: value}
_CALIBRATION = {"kept": "data", "make": _calibration}
_REMOVAL = {"kept": "data", "make": _removal}


@dataclass(frozen=True)
class State:
    """What is known of a fitted model and of the samples in its memory. It does not change: a request yields another.

    The solution's largest matrices go over to the next state (``fastntk.solve.solution``): an earlier one can be looked
    at, and solves no more. ``fastntk.memory.disk`` keeps these fields, by what they say here of how.

    Attributes:
        network: linearised at the anchor ``theta*``, the tuned parameters after fitting, over the members.
        solution: of the linear problem over the members.
        fingerprints: the residual of every member at the anchor, by which it is known again; zeros for who has left.
        pixels: a digest of every member's image (``fastntk.copies``); 0 for who has left, and where it is not
            known, in a memory that was prepared before there were any.
        vector: the tuned parameters after all requests so far, in the layout's order.
        head_shortfall: what the fitted head falls short of (``fastntk.solve.head``), or None.
        order: positions, in the order in which they are drawn for witnesses: retained samples that check every request.
        calibration: how an automatic ridge was found, or None for a given one.
        made: how the memory was made, for replay: versions and options.
        tail: ``sum |t - p|`` at the anchor over the classes which the solution keeps no rows of: a mean over the first
            samples, in a fit that forgets exactly of the core's; 0 where all are kept.
        core: in a fit that forgets exactly (``fastntk.memory.exact``), the positions of those who cannot be forgotten;
            None in any other.
        core_pixels: digests of the images of the core, members or not; None in any other fit.
        removal: what the noise in a fit that forgets exactly was drawn for; None without noise.
        audit: the latest one since the network was linearised, or None. It is in the ledger, not among what is kept.
    """

    network: Linearised
    solution: Solution
    fingerprints: Float[Tensor, "positions outputs"] = field(metadata=_TENSOR)
    pixels: Int[Tensor, " positions"] = field(metadata=_TENSOR)
    vector: Float[Tensor, " p"] = field(metadata=_TENSOR)
    head_shortfall: Float[Tensor, "classes features"] | None = field(metadata=_OPTIONAL)
    order: Int[Tensor, " positions"] = field(metadata=_TENSOR)
    calibration: Calibration | None = field(metadata=_CALIBRATION)
    made: Mapping[str, Any] = field(metadata=_PLAIN)
    tail: float = field(metadata=_PLAIN)
    core: Int[Tensor, " core"] | None = field(default=None, metadata=_OPTIONAL)
    core_pixels: Int[Tensor, " images"] | None = field(default=None, metadata=_OPTIONAL)
    removal: Removal | None = field(default=None, metadata=_REMOVAL)
    audit: Audit | None = None

    @property
    def members(self) -> Members:
        """Who is in the memory, over the data source."""
        return cast(Members, self.network.train)

    @property
    def model(self) -> nn.Module:
        """The fitted model, in modules of its own; its tuned parameters may have moved since."""
        return self.network.jacobian.model

    @property
    def layout(self) -> Layout:
        """Where each tuned parameter lies in a vector."""
        return self.network.layout

    @property
    def anchor(self) -> dict[str, Tensor]:
        """``theta*``: where the network is linearised."""
        return dict(self.network.jacobian.parameters)

    @property
    def center(self) -> Float[Tensor, " p"]:
        """``theta* - u``: where the pull of the ridge leads."""
        return self.layout.flatten(self.anchor) - self.displacement

    @property
    def initial(self) -> dict[str, Tensor]:
        """``theta_0``: before fitting."""
        return self.layout.unflatten(self.center / self.made["options"]["shrinkage"], self.anchor)

    @property
    def displacement(self) -> Float[Tensor, " p"]:
        """``u = theta* - s theta_0``, with what weight decay toward zero alone would have left, s; 1 without it."""
        return self.solution.displacement

    @property
    def ridge(self) -> float:
        """The total ridge of every request."""
        return self.solution.ridge

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The tuned parameters after all requests so far."""
        return self.layout.unflatten(self.vector, self.anchor)

    @property
    def positions(self) -> Int[Tensor, " members"]:
        """Of the members."""
        return self.members.present.nonzero()[:, 0]

    def check_anchored(self, what: str) -> None:
        """Raises ``InputError`` where answers are exact: what an anchored answer asks for has no place there."""
        if self.core is not None:
            raise InputError(
                f"this fit forgets exactly: its weights are those that it gives on what stays, and {what}."
            )

    def with_members(self, members: Members) -> "State":
        """The same with other members, or the same ones over another data source."""
        return replace(self, network=replace(self.network, train=members))

    def moved_by(self, change: Float[Tensor, " p"]) -> dict[str, Tensor]:
        """The current parameters moved by ``change``."""
        return self.layout.unflatten(self.vector + change, self.anchor)

    def rows(self, positions: Int[Tensor, " some"]) -> Rows:
        """The Jacobians and residuals, at the anchor, of the samples at ``positions``, computed now."""
        return self.network.rows(positions.tolist())

    def resolve(
        self, positions: Int[Tensor, " some"], displacement: Float[Tensor, " p"], ridge: float
    ) -> Float[Tensor, " p"]:
        """``s(R)`` without the samples at ``positions``, solved anew; with a displacement of zeros, Golatkar's step."""
        return self.solution.resolve(self.network, positions, displacement, ridge)

    def error(self) -> float:
        """``|s - s'| / |s'|`` with s the step that all updates have led to and s' solved anew."""
        fresh = self.solution.anew(self.network)
        return float((self.solution.step - fresh.step).norm() / fresh.step.norm())

    def drawn_witnesses(self, asked: Int[Tensor, " some"]) -> Sequence[int]:
        """The positions of those that check a request for the samples at ``asked``; of these none."""
        others = self.order[self.members.present[self.order] & ~torch.isin(self.order, asked)]
        return self.members.available(others)[: self.made["options"]["witnesses"]].tolist()

    def emptied(self, asked: Int[Tensor, " some"]) -> set[int] | None:
        """The classes of which no member is left without the samples at ``asked``; None if the data source does not
        offer labels, or lacks a member."""
        labels = self.members.labels
        if labels is None or (labels[self.members.present] < 0).any():
            return None
        staying = self.members.present.index_fill(0, asked, False)
        return set(labels[asked].tolist()) - set(labels[staying].tolist())

    def check(self, positions: Int[Tensor, " some"], residuals: Float[Tensor, "some outputs"] | None = None) -> None:
        """Whether the data source still has, under the members' ids, what was prepared; from ``residuals`` if known.

        Raises:
            InputError: it has other pixels or labels, or the model is another.
        """
        for position in self.network.changed(positions.tolist(), self.fingerprints[positions], residuals):
            raise InputError(
                f"the data source has another image or label under id {self.members.by_position[position]!r} than when "
                "the memory was prepared, or the model is another. Give what was prepared: no random augmentation, the "
                "same order or ids."
            )
        how = self.network.numerics
        self.members.check_images(positions, self.pixels.cpu(), how.batch_size, how.workers)

    def check_complete(self) -> None:
        """Whether every member's sample is there and has not changed; one forward pass, for which the images are read
        twice. Raises like ``check``."""
        missing = self.members.missing(self.positions)
        if missing:
            raise InputError(f"the data source lacks {missing:,} of the memory's {len(self.positions):,} samples.")
        self.check(self.positions)


def approximation(state: State) -> str:
    """See ``Certificate``: a form without rows of the likeliest classes solves one linear system, whatever the loss."""
    if state.network.loss.curved and not state.solution.likeliest:
        return "one step over the generalised Gauss-Newton matrix in place of the loss's optimum"
    rounded = isinstance(state.solution, OnDisk) and state.solution.rows.jacobian.rest.dtype == torch.bfloat16
    return "rows that are rounded to bfloat16" if rounded else ""


def same_pixels(state: State, asked: Int[Tensor, " some"]) -> Int[Tensor, " copies"] | None:
    """The positions of the other members that have the same pixels as one at ``asked``, whatever their labels; None if
    some members' pixels are not known."""
    if (state.pixels[state.members.present] == 0).any():
        return None
    same = torch.isin(state.pixels, state.pixels[asked]) & state.members.present
    return same.index_fill(0, asked, False).nonzero()[:, 0]


def check_apart(others: Int[Tensor, " others"], core: Int[Tensor, " core"] | None) -> None:
    """Raises ``InputError`` if samples that are not of the core show, by digests, the same as images of the core."""
    count = 0 if core is None else int(torch.isin(others, core).sum())
    if count:
        raise InputError(
            f"{count:,} of the samples have the very pixels of images of the core, which cannot be forgotten. Take "
            "them out of one of the two, or add them to a core that is named by ids."
        )
