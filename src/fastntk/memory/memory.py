"""What one pass over the training data leaves behind, so that samples can be forgotten from then on.

The memory linearises the network at the anchor ``theta*`` (the tuned parameters after fitting) and holds the solution
of the linear problem over all samples that are in it, its members. Forgetting takes samples out of the solution and
remembering adds them; the others are not computed again.
"""

import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastntk.common.errors import InputError
from fastntk.common.files import digest
from fastntk.jacobians.jacobian import Layout
from fastntk.jacobians.linearised import Linearised
from fastntk.memory.certificate import Audit, Certificate, Forgotten, hashed, new_salt, observed
from fastntk.memory.disk.folder import Store
from fastntk.memory.disk.ledger import Request
from fastntk.memory.members import Id, Members
from fastntk.memory.plan import Form
from fastntk.memory.state import Solution, State, journal, pack, replayed, unpack
from fastntk.solve.ridge import Calibration
from fastntk.solve.solution import Update
from fastntk.solve.sums import Rows

log = logging.getLogger(__name__)
_CHECKED = 8  # samples that are compared when a memory is opened


class Memory:
    """The linear problem over the members. Made by ``prepare``; ``forget`` and ``remember`` update it.

    Attributes:
        linearised: the network at the anchor, over the members.
        solution: the linear problem over them.
        residuals: of every member at the anchor, by which it is known again; zeros for who has left.
        calibration: how an automatic ridge was found, or None for a given one.
        record: how it was made, for replay.
        short_of_head: what the fitted head falls short of, or None; see ``fastntk.solve.head``.
        audit: the latest one since the network was linearised, or None; see ``fastntk.audit``.
    """

    def __init__(
        self,
        linearised: Linearised,
        solution: Solution,
        residuals: Float[Tensor, "positions outputs"],
        calibration: Calibration | None,
        order: Int[Tensor, " positions"],
        probe: int,
        record: Mapping[str, Any],
        vector: Float[Tensor, " p"] | None = None,
        short_of_head: Float[Tensor, "classes features"] | None = None,
    ) -> None:
        self.linearised, self.solution, self.residuals, self.calibration = linearised, solution, residuals, calibration
        self.record, self.short_of_head, self._order, self._probe = record, short_of_head, order, probe
        self._vector = self._layout.flatten(self.anchor) if vector is None else vector
        self.audit: Audit | None = None
        self._store: Store | None = None

    @property
    def model(self) -> nn.Module:
        """The fitted model; its tuned parameters may have moved since."""
        return self.linearised.jacobian.model

    @property
    def members(self) -> Members:
        """Who is in the memory, over the data source."""
        return cast(Members, self.linearised.train)

    @property
    def train(self) -> Dataset:
        """The data source."""
        return self.members.source

    @property
    def ids(self) -> list[Id]:
        """Of the members."""
        return [each for each in self.members.ids if each is not None]

    @property
    def present(self) -> Bool[Tensor, " positions"]:
        """Which positions have a member."""
        return self.members.present

    @property
    def anchor(self) -> dict[str, Tensor]:
        """``theta*``: the tuned parameters where the network is linearised, those of the fitted model at first."""
        return self.linearised.jacobian.parameters

    @property
    def initial(self) -> dict[str, Tensor]:
        """``theta_0``: the tuned parameters before fitting."""
        return self._layout.unflatten(self._layout.flatten(self.anchor) - self.displacement, self.anchor)

    @property
    def _layout(self) -> Layout:
        return self.linearised.layout

    @property
    def ridge(self) -> float:
        """The total ridge of every request."""
        return self.solution.ridge

    @property
    def displacement(self) -> Float[Tensor, " p"]:
        """``u = theta* - theta_0``."""
        return self.solution.displacement

    @property
    def form(self) -> Form:
        """``"primal"`` (p x p), ``"dual"`` (nC x nC) or ``"matrix-free"``."""
        return self.solution.form

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The tuned parameters after all requests so far."""
        return self._layout.unflatten(self._vector, self.anchor)

    def forget(self, ids: Iterable[Id], *, ridge: float | None = None, full: bool = False) -> Forgotten:
        """Take the samples with the given ids out of the memory.

        Args:
            ids: indices into the training set, or, if it has ``ids``, those.
            ridge: for this request another total than the memory's, by conjugate gradients on the sums, preconditioned
                by the memory's own solution.
            full: solve anew afterwards, to compare; see ``Certificate.error``. Takes as long as preparing's own solve.

        Returns:
            The new parameters ``theta* + s(R) - s(D)``, where D is what was prepared and R what now remains; the model
            itself is not changed. If the memory is kept in a folder they are durable there, and ``purge`` must follow
            before the samples' trace is gone from it.

        Raises:
            InputError: an id twice or not in the memory, no sample would remain, a sample is not the one that was
                prepared, or the disk is full. Nothing changes then.
        """
        started = time.perf_counter()
        with self._exclusive():
            return self._carry_out("forget", self.members.positions(ids), started, ridge, full)

    def remember(self, ids: Iterable[Id], *, full: bool = False) -> Forgotten:
        """Add samples of the data source to the memory: new ones, or some that were forgotten.

        Like ``forget`` with the other sign; the parameters move to those with the samples.

        Raises:
            InputError: an id twice, in the memory already or not in the data source, or the disk is full.
        """
        started = time.perf_counter()
        with self._exclusive():
            before = len(self.members)
            try:
                return self._carry_out("remember", self.members.join_(ids), started, None, full)
            except BaseException:
                del self.members.ids[before:]
                raise

    def preview(self, ids: Iterable[Id], *, ridge: float | None = None) -> Forgotten:
        """What ``forget`` would answer, leaving the memory as it is."""
        started = time.perf_counter()
        with self._exclusive():
            return self._work_out("forget", self.members.positions(ids), started, ridge)[0]

    def purge(self) -> float:
        """Rewrite the memory's folder so that nothing of the samples that have left is in it; returns the seconds.

        Raises:
            InputError: the memory is in no folder, or the disk is full; nothing changes then.
        """
        with self._exclusive():
            started = time.perf_counter()
            self._kept().replace(*self._contents(), started)
            return time.perf_counter() - started

    def replace_(self, make: Callable[[], "Memory"]) -> float:
        """Become the memory that ``make`` returns, in the folder too; returns the seconds."""
        with self._exclusive():
            started, before = time.perf_counter(), digest(self.parameters)
            fresh = make()
            if self._store:
                certificate = {"before": before, "after": digest(fresh.parameters), "retained": len(fresh.ids)}
                self._store.replace(*fresh._contents(), started, certificate)
                fresh._store = self._store
            self.__dict__.update(fresh.__dict__)
            return time.perf_counter() - started

    def save(self, folder: Path | str) -> None:
        """Keep the memory in a folder from now on: every request is durable there when it is answered.

        Raises:
            InputError: it cannot be written, or the memory in it has answered requests.
        """
        store = Store(Path(folder))
        store.create(*self._contents())
        self._store = store
        if self.audit:
            self.audited_(self.audit)

    def audited_(self, audit: Audit) -> None:
        """From now on every certificate carries this audit; the folder's ledger does too."""
        with self._exclusive():
            if self._store:
                self._store.audited(audit)
            self.audit = audit

    def requests(self) -> list[Request]:
        """What the folder's ledger says of every request."""
        return self._kept().requests()

    def error(self) -> float:
        """``|s - s'| / |s'|`` with s the step that all updates have led to and s' solved anew from the sums."""
        fresh = self.solution.anew()
        return float((self.solution.step - fresh.step).norm() / fresh.step.norm())

    def resolve(self, positions: Tensor, displacement: Tensor, ridge: float) -> Float[Tensor, " p"]:
        """``s(R)`` without the samples at ``positions``, solved anew; with a displacement of zeros, Golatkar's step."""
        return self.solution.resolve(positions, self.rows, displacement, ridge)

    def assemble(self, change: Float[Tensor, " p"]) -> dict[str, Tensor]:
        """The current parameters moved by ``change``."""
        return self._layout.unflatten(self._vector + change, self.anchor)

    def rows(self, positions: Int[Tensor, " some"]) -> Rows:
        """The Jacobians and residuals, at the anchor, of the samples at ``positions``, computed now."""
        return self.linearised.rows(positions.tolist())

    def check(self, positions: Int[Tensor, " some"], residuals: Float[Tensor, "some outputs"] | None = None) -> None:
        """Whether the data source still has, under the members' ids, what was prepared; from ``residuals`` if known.

        Raises:
            InputError: it has other pixels or labels, or the model is another.
        """
        for position in self.linearised.changed(positions.tolist(), self.residuals[positions], residuals):
            raise InputError(
                f"the data source has another image or label under id {self.members.ids[position]!r} than when the "
                "memory was prepared, or the model is another. Give what was prepared: no random augmentation, the "
                "same order or ids."
            )

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """The folder, if any, is locked meanwhile, and what other processes did to it is known."""
        if self._store is None:
            yield
            return
        with self._store.locked():
            if self._store.version != self._store.ledger.version():
                self.__dict__.update(_opened(self._store, self.model, self.members.source).__dict__)
            yield

    def _kept(self) -> Store:
        if self._store is None:
            raise InputError("the memory is kept in no folder. Save it first.")
        return self._store

    def _carry_out(self, kind: str, positions: Tensor, started: float, ridge: float | None, full: bool) -> Forgotten:
        """Answer a request: work it out, make it durable, then update what is in this process."""
        answer, update, vector = self._work_out(kind, positions, started, ridge)
        members, joining = positions.tolist(), kind == "remember"
        joined = None
        if joining:
            joined = update.rows.residual if update.rows else self.linearised.residuals(members)
        if self._store:
            record = {"kind": kind, "ids": [self.members.ids[position] for position in members] if joining else []}
            seconds = self._store.append(answer.certificate, journal(update, vector, joined), record, started)
            answer = replace(answer, seconds=seconds)
        self._apply_(update, vector, joined)
        if full:
            answer = replace(answer, certificate=replace(answer.certificate, error=self.error()))
        if self._store:
            self._store.finish(answer.certificate)
        return answer

    def _work_out(
        self, kind: str, positions: Tensor, started: float, ridge: float | None
    ) -> tuple[Forgotten, Update, Float[Tensor, " p"]]:
        """The answer, the update of the solution and the parameters after it; nothing changes yet."""
        update, residual = self._update(positions, 1 if kind == "remember" else -1)
        change = update.change
        if len(positions) and ridge is not None and ridge != self.ridge:
            step = self.resolve(positions, self.displacement, ridge)
            change = step - self.resolve(positions[:0], self.displacement, ridge)
        vector = self._vector + change
        parameters = self._layout.unflatten(vector, self.anchor)
        certificate = self._certify(kind, update, change, parameters, ridge or self.ridge, residual)
        return Forgotten(parameters, time.perf_counter() - started, certificate), update, vector

    def _update(self, positions: Tensor, sign: int) -> tuple[Update, float]:
        """The update and its residual, after solving anew if rounding has gathered (see the solution's ``limit``)."""
        if not len(positions):
            return Update(torch.zeros_like(self._vector), positions, sign), self.solution.residual()
        rows = self._rows_as_prepared if sign < 0 else self.rows
        update = self.solution.update(positions, rows, sign)
        if sign < 0 and update.rows is None:
            self.check(positions)
        residual = self.solution.residual(update)
        if residual > self.solution.limit:
            log.info("rounding has gathered (residual %.0e): solving anew", residual)
            self.solution = self.solution.anew()
            update = self.solution.update(positions, rows, sign)
            residual = self.solution.residual(update)
        return update, residual

    def _rows_as_prepared(self, positions: Tensor) -> Rows:
        rows = self.rows(positions)
        self.check(positions, rows.residual)
        return rows

    def _apply_(self, update: Update, vector: Tensor, joined: Tensor | None) -> None:
        """Update everything that an update changes, in place; ``joined`` are the residuals of who joins."""
        if not len(update.positions):
            return
        self.solution.apply_(update)
        if joined is None:
            self.residuals[update.positions] = 0
            self.members.leave_(update.positions)
        else:
            self.residuals = torch.cat([self.residuals, joined.to(self.residuals)])
            self._order = torch.cat([self._order, update.positions])
        self._vector = vector

    def _replay_(self, tensors: Mapping[str, Tensor], kind: str, ids: Sequence[Id]) -> None:
        """Carry out a request again, from its journal."""
        positions, sign = tensors["positions"], 1 if kind == "remember" else -1
        self.members.ids.extend(ids)
        if len(positions):
            update = replayed(tensors, sign, self.solution)
            self._apply_(update, tensors["vector"], tensors["residual"] if sign > 0 else None)

    def _certify(
        self, kind: str, update: Update, change: Tensor, parameters: Mapping[str, Tensor], ridge: float, residual: float
    ) -> Certificate:
        asked, before = update.positions.tolist(), self.parameters
        others = self._order[self.present[self._order] & ~torch.isin(self._order, update.positions)]
        probe = self.members.available(others)[: self._probe].tolist()
        known = update.rows.jacobian.matvec(change) if update.rows and self.linearised.of_logits else None
        audit, salt = self.audit if kind == "forget" else None, new_salt()
        seen = observed(self.linearised, change, before, parameters, asked, probe, known, audit)
        return Certificate(
            request=str(uuid.uuid4()),
            kind=kind,
            samples=len(asked),
            retained=len(others),
            ridge=ridge,
            **seen._asdict(),
            residual=residual,
            limit=self.solution.limit,
            moved=not torch.equal(self._vector, self._layout.flatten(self.anchor)),
            before=digest(before),
            after=digest(parameters),
            salt=salt,
            hashes=hashed((self.members.ids[position] for position in asked), salt),
            audit=self.audit,
        )

    def _contents(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything, as tensors and as what JSON can hold."""
        made = self.calibration, self._order, self._probe, self.record, self._vector, self.short_of_head
        return pack(State(self.linearised, self.solution, self.residuals, *made))


def load(folder: Path | str, model: nn.Module, train: Dataset) -> Memory:
    """Open the folder of a memory (``Memory.save``); requests are durable there from now on.

    Args:
        folder: of the memory.
        model: the one it was prepared for; its tuned parameters may have moved since.
        train: a data source that has the samples of the requests to come, under the ids they had when the memory was
            prepared; of the others only a few are read, to check that it is the same.

    Raises:
        InputError: a file is missing or damaged, or the memory belongs to another model or other data.
    """
    store = Store(Path(folder))
    with store.locked():
        memory = _opened(store, model, train)
    memory.check(memory.members.available(memory.present.nonzero()[:, 0])[:_CHECKED])
    return memory


def _opened(store: Store, model: nn.Module, train: Dataset) -> Memory:
    """The memory in a folder that is locked, with the requests since the latest purge."""
    contents = store.read()
    memory = Memory(**vars(unpack(contents, model, train, store.folder)))
    memory._store, memory.audit = store, store.ledger.audit()
    for tensors, record in contents.journal:
        memory._replay_(tensors, record["kind"], record["ids"])
    return memory
