"""One request: worked out without changing anything, then a state after it."""

import hashlib
import hmac
import logging
import math
import secrets
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastntk.common.errors import InputError
from fastntk.common.files import digest
from fastntk.inputs.batches import digests
from fastntk.inputs.ids import Id
from fastntk.jacobians.rows import Rows
from fastntk.memory.agreement import observed
from fastntk.memory.certificate import Answer, Certificate, Removal, gradient_allowed
from fastntk.memory.state import State, approximation, check_apart, same_pixels
from fastntk.solve.convex import Convex
from fastntk.solve.newton import gradient_of
from fastntk.solve.solution import Update

log = logging.getLogger(__name__)
SIGNS = {"forget": -1, "remember": 1}
"""The kinds of request, and what they do to the set of members."""


@dataclass(frozen=True)
class Draft:
    """A request that is worked out and not yet carried out.

    Attributes:
        state: what it was worked out from: with the members who join, and solved anew if rounding had gathered.
        kind: ``"forget"`` or ``"remember"``.
        update: of the solution.
        vector: the tuned parameters after it.
        joined: what is known of who joins, if anybody does.
        answer: what the caller gets.
    """

    state: State
    kind: str
    update: Update
    vector: Float[Tensor, " p"]
    joined: "_Joined | None"
    answer: Answer

    def after(self) -> State:
        """The state after the request."""
        return _after(self.state, self.update, self.vector, self.joined)

    def journal(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What it takes to carry it out again: the samples' rows where the form needs them, and what it keeps."""
        update, tensors = self.update, {"positions": self.update.positions, "vector": self.vector}
        tensors |= {**(update.rows.tensors() if update.rows else {}), **update.kept}
        if self.joined is None:
            return tensors, {"kind": self.kind, "ids": []}
        names = [self.state.members.by_position[position] for position in update.positions.tolist()]
        return {**tensors, **self.joined._asdict()}, {"kind": self.kind, "ids": names}


def draft(state: State, kind: str, ids: Iterable[Id], started: float) -> Draft:
    """Work a request out; ``started`` is when it was made, by ``time.perf_counter``.

    Raises:
        InputError: the ids are not fit for it, or a sample is not the one that was prepared.
    """
    if SIGNS[kind] > 0:
        before, members = len(state.members), state.members.joined_by(ids)
        state, positions = state.with_members(members), torch.arange(before, len(members))
    else:
        positions = state.members.positions(ids, lost=state.solution.holds)
        _check_outside_core(state, positions)
    state, update, inexactness = _update(state, positions, SIGNS[kind])
    joined = None
    if SIGNS[kind] > 0:
        residual = update.rows.residual if update.rows else state.network.residuals(positions.tolist())
        joined = _Joined(residual, digests(state.members, positions.tolist(), state.network.numerics.batch_size))
        check_apart(joined.pixels, state.core_pixels)
        _warn_of_twins(state, joined.pixels)
    vector = state.vector + update.change
    parameters = state.layout.unflatten(vector, state.anchor)
    certificate = _certificate(state, kind, update, parameters, inexactness)
    return Draft(state, kind, update, vector, joined, Answer(parameters, time.perf_counter() - started, certificate))


def _warn_of_twins(state: State, pixels: Int[Tensor, " some"]) -> None:
    """Of who joins, who shows the same as a member."""
    if twins := int(torch.isin(pixels, state.pixels[state.pixels != 0]).sum()):
        log.warning(
            "%d of the samples show the same, pixel by pixel, as others in the memory: to forget one of two is to keep "
            "the other, unless both are named (--with-copies)",
            twins,
        )


def _check_outside_core(state: State, positions: Int[Tensor, " some"]) -> None:
    """Raises ``InputError`` for samples that an exact fit began from."""
    within = positions[:0] if state.core is None else positions[torch.isin(positions, state.core)]
    if len(within):
        raise InputError(
            f"{len(within):,} of the {len(positions):,} samples, {state.members.by_position[int(within[0])]!r} first, "
            "are of the core, which this fit began from and cannot forget. Ask for the others alone, by their ids, or "
            "fit again with a core without these; no other answer would be exact."
        )


def replayed(state: State, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> State:
    """The state after a request that is carried out again, from its journal."""
    if record["kind"] not in SIGNS:
        raise InputError(
            f"a request is one of {', '.join(SIGNS)}, not {record['kind']!r}. Restore the memory's folder."
        )
    positions, sign = tensors["positions"], SIGNS[record["kind"]]
    state = state.with_members(state.members.with_ids(record["ids"]))
    if not len(positions):
        return state
    rows = Rows.from_tensors(tensors) if "rest" in tensors else None
    update = state.solution.replayed(state.network, positions, sign, rows, tensors)
    joined = _Joined(*(tensors[name] for name in _Joined._fields)) if sign > 0 else None
    return _after(state, update, tensors["vector"], joined)


def _update(state: State, positions: Int[Tensor, " some"], sign: int) -> tuple[State, Update, float]:
    """The update and its inexactness, from a state that is solved anew if rounding has gathered."""
    network, solution = state.network, state.solution
    if not len(positions):
        return state, Update(torch.zeros_like(state.vector), positions, sign), solution.inexactness()
    rows = state.rows(positions) if solution.reads(sign) else None
    if sign < 0:
        state.check(state.members.available(positions), rows.residual if rows else None)
    update = solution.update(network, positions, sign, rows)
    inexactness = solution.inexactness(update)
    if inexactness > solution.limit:
        log.info("rounding has gathered (inexact by %.0e): solving anew", inexactness)
        state = replace(state, solution=solution.anew(network))
        update = state.solution.update(network, positions, sign, rows)
        inexactness = state.solution.inexactness(update)
    if not math.isfinite(inexactness):
        raise InputError("the solution is not finite, so there is no answer. Prepare with a larger ridge.")
    return state, update, inexactness


class _Joined(NamedTuple):
    """What a state keeps of every member, of who joins: ``State.fingerprints`` and ``State.pixels``."""

    residual: Float[Tensor, "some outputs"]
    pixels: Int[Tensor, " some"]


def _after(state: State, update: Update, vector: Tensor, joined: _Joined | None) -> State:
    """Everything that an update changes, changed."""
    if not len(update.positions):
        return state
    solved = replace(state, solution=state.solution.apply(update), vector=vector)
    if joined is None:
        fingerprints = state.fingerprints.index_fill(0, update.positions.to(state.fingerprints.device), 0)
        left = replace(solved, fingerprints=fingerprints, pixels=state.pixels.index_fill(0, update.positions, 0))
        return left.with_members(state.members.without(update.positions))
    fingerprints = torch.cat([state.fingerprints, joined.residual.to(state.fingerprints)])
    pixels, order = torch.cat([state.pixels, joined.pixels]), torch.cat([state.order, update.positions])
    return replace(solved, fingerprints=fingerprints, pixels=pixels, order=order)


def _certificate(
    state: State, kind: str, update: Update, parameters: Mapping[str, Tensor], inexactness: float
) -> Certificate:
    asked, before, change = update.positions.tolist(), state.parameters, update.change
    there = state.members.available(update.positions).tolist()
    witnesses, retained = state.drawn_witnesses(update.positions), ~torch.isin(state.order, update.positions)
    known = update.rows.jacobian.matvec(change) if update.rows and state.network.of_logits else None
    audit, salt = state.audit if kind == "forget" else None, secrets.token_hex(16)
    gone = state.emptied(update.positions) if kind == "forget" else ()
    copies = same_pixels(state, update.positions) if kind == "forget" else None
    seen = observed(state.network, change, before, parameters, there, witnesses, known, audit, gone)
    if asked and not there:
        seen = seen._replace(departure_requested=None, departure_retained=None)
    return Certificate(
        request=str(uuid.uuid4()),
        kind=kind,
        samples=len(asked),
        retained=int((state.members.present[state.order] & retained).sum()),
        ridge=state.ridge,
        **seen._asdict(),
        limit=state.solution.limit,
        unit=state.network.loss.unit,
        tail=state.tail,
        has_head=state.head_shortfall is not None,
        moved=not torch.equal(state.vector, state.layout.flatten(state.anchor)),
        before=digest(before),
        after=digest(parameters),
        salt=salt,
        hashes=hashed((state.members.by_position[position] for position in asked), salt),
        audit=state.audit,
        copies=None if copies is None else len(copies),
        lost=len(asked) - len(there),
        exact=state.core is not None,
        form=state.solution.name,
        approximation=approximation(state),
        **_left(state, update, inexactness)._asdict(),
    )


class _Left(NamedTuple):
    """What is left of the objective's gradient, and what certified removal would have; see ``Certificate``."""

    inexactness: float
    gradient: float | None
    removal: Removal | None
    allowed: float | None


def _left(state: State, update: Update, inexactness: float) -> _Left:
    least = None if state.removal is None else gradient_allowed(state.ridge)
    gradient = None if state.core is None else _gradient(state, update)
    return _Left(inexactness, gradient, state.removal, least)


def _gradient(state: State, update: Update) -> float:
    """The norm of what is left of the objective's gradient, of a fit that forgets exactly: at the parameters
    themselves, in float64 over the rows, whatever rounding their kernel has."""
    vector, solution = state.vector + update.change, state.solution
    rows, joins = cast(Convex, solution).rows, update.sign > 0
    present = torch.zeros(len(rows)).index_fill(0, solution.over if joins else update.changes(solution.over), 1)
    sets = [(rows, present)] + ([(update.rows, torch.ones(len(update.rows)))] if joins and update.rows else [])
    moved = vector - state.layout.flatten(state.anchor)
    slope = sum(gradient_of(each, here, state.network.loss, moved) for each, here in sets)
    return float((state.ridge * (vector - state.center) + slope).norm())


def hashed(ids: Iterable[Id | None], salt: str) -> list[str]:
    """HMAC-SHA-256 of each id under ``salt`` (hexadecimal)."""
    return [
        hmac.new(bytes.fromhex(salt), str(each).encode(errors="surrogateescape"), hashlib.sha256).hexdigest()
        for each in ids
    ]
