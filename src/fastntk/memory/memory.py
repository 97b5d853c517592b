"""What one pass over the training data leaves behind, so that samples can be forgotten from then on.

The memory linearises the network at the anchor ``theta*`` (the tuned parameters after fitting) and holds the solution
of the linear problem over all samples that are in it, its members. Forgetting takes samples out of the solution and
remembering adds them; the others are not computed again.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from fastntk.common.errors import InputError
from fastntk.common.files import check_writable, digest
from fastntk.common.machine import settle
from fastntk.inputs.ids import Id
from fastntk.jacobians.numerics import Numerics
from fastntk.memory.audit import Audit
from fastntk.memory.certificate import Answer
from fastntk.memory.disk.folder import Folder
from fastntk.memory.disk.ledger import Request
from fastntk.memory.disk.packing import on_device, pack, unpack
from fastntk.memory.prepare import check_initial, linearised, prepared, pull_of, refreshed, tell_of_fit, with_head
from fastntk.memory.request import draft, replayed
from fastntk.memory.state import State
from fastntk.solve.ridge import Calibration
from fastntk.tuning.loss import Loss
from fastntk.tuning.losses import CrossEntropy
from fastntk.tuning.parameters import tuned

log = logging.getLogger(__name__)

_CHECKED = 8  # samples that are compared when a memory is opened


class _Turns:
    """One thread at a time; a copy is of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Turns, ()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


class Memory:
    """A state, and perhaps the folder that it is kept in. Made by ``prepare`` or ``load``.

    ``forget``, ``remember`` and ``anchored_at`` put another state in its place; ids come in and go out here, all
    beneath speaks of positions.

    Attributes:
        state: all that is known, see ``fastntk.memory.state``.
    """

    def __init__(self, state: State, folder: Folder | None = None) -> None:
        self.state, self._folder, self._turns = state, folder, _Turns()

    @property
    def model(self) -> nn.Module:
        """The fitted model, in modules of its own over the same tensors; its tuned parameters may have moved since."""
        return self.state.model

    @property
    def ids(self) -> list[Id]:
        """Of the members."""
        return self.state.members.ids

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The tuned parameters after all requests so far that this process knows of."""
        return self.state.parameters

    @property
    def anchor(self) -> dict[str, Tensor]:
        """``theta*``: the tuned parameters where the network is linearised, those of the fitted model at first."""
        return self.state.anchor

    @property
    def form(self) -> str:
        """One of ``fastntk.solve.forms``."""
        return self.state.solution.name

    @property
    def ridge(self) -> float:
        """The total ridge of every request."""
        return self.state.ridge

    @property
    def calibration(self) -> Calibration | None:
        """How an automatic ridge was found, or None for a given one."""
        return self.state.calibration

    @property
    def audit(self) -> Audit | None:
        """The latest one since the network was linearised, or None; see ``fastntk.audit``."""
        return self.state.audit

    def forget(self, ids: Iterable[Id], *, full: bool = False) -> Answer:
        """Take the samples with the given ids out of the memory.

        Args:
            ids: indices into the training set, or, if it has ``ids``, those.
            full: solve anew afterwards, to compare; see ``Certificate.error``. Takes as long as preparing's own solve.

        Returns:
            The new parameters ``theta* + s(R) - s(D)``, where D is what was prepared and R what now remains; the model
            itself is not changed. If the memory is kept in a folder they are durable there, and ``purge`` must follow
            before the samples' trace is gone from it.

        Raises:
            InputError: an id twice or not in the memory, no sample would remain, a sample is not the one that was
                prepared, or the disk is full. Nothing changes then.
        """
        return self._carry_out("forget", ids, full)

    def remember(self, ids: Iterable[Id], *, full: bool = False) -> Answer:
        """Add samples of the data source to the memory: new ones, or some that were forgotten.

        Like ``forget`` with the other sign; the parameters move to those with the samples.

        Raises:
            InputError: an id twice, in the memory already or not in the data source, or the disk is full.
        """
        return self._carry_out("remember", ids, full)

    def preview(self, ids: Iterable[Id]) -> Answer:
        """What ``forget`` would answer, leaving the memory as it is."""
        started = time.perf_counter()
        with self._exclusive():
            return draft(self.state, "forget", ids, started).answer

    def ready(self) -> float:
        """Work out now what the first request would otherwise wait for; returns the seconds.

        If the memory is kept in a folder and no request waits there to be purged, it is written there.

        Raises:
            InputError: the disk is full; nothing changes then.
        """
        with self._exclusive():
            started, solution = time.perf_counter(), self.state.solution.ready()
            if solution is not self.state.solution:
                self.state = replace(self.state, solution=solution)
                if self._folder and not self._folder.ledger.pending():
                    self._folder.replace(*pack(self.state), started)
            return time.perf_counter() - started

    def purge(self) -> float:
        """Rewrite the memory's folder so that nothing of the samples that have left is in it; returns the seconds.

        Raises:
            InputError: the memory is in no folder, or the disk is full; nothing changes then.
        """
        with self._exclusive():
            started = time.perf_counter()
            _kept(self._folder).replace(*pack(self.state), started)
            return time.perf_counter() - started

    def anchored_at(
        self, find: Callable[[State], tuple[Mapping[str, Tensor], Mapping[str, object]]], checkpoint: Path | None = None
    ) -> float:
        """Linearise the network anew at parameters that are found in the state; what is said of them goes into the
        ledger. See ``fastntk.refresh``."""
        settle()
        check_kept(self)
        with self._exclusive():
            started, before = time.perf_counter(), digest(self.parameters)
            self.state.check_anchored("there is no anchor to be moved")
            self.state.check_complete()
            parameters, told = find(self.state)
            fresh = refreshed(self.state, parameters, checkpoint)
            if self._folder:
                entry = {"before": before, "after": digest(parameters), "retained": len(fresh.members.ids), **told}
                self._folder.replace(*pack(fresh), started, entry)
            self.state = fresh
            return time.perf_counter() - started

    def save(self, folder: Path | str) -> None:
        """Keep the memory in a folder from now on: every request is durable there when it is answered.

        Raises:
            InputError: it cannot be written, or the memory in it has answered requests.
        """
        place = Folder(Path(folder))
        place.create(*pack(self.state), self.audit)
        self._folder = place

    def enter(self, audit: Audit, of: State) -> None:
        """From now on every certificate carries this audit of a state; the folder's ledger does too.

        Raises:
            InputError: another process has answered requests or re-anchored the memory since.
        """
        with self._exclusive():
            now, then = ([digest(each.anchor), digest(each.parameters)] for each in (self.state, of))
            if now != then:
                raise InputError("the memory answered requests or was refreshed while it was audited. Audit it again.")
            if self._folder:
                self._folder.audited(audit)
            self.state = replace(self.state, audit=audit)

    def requests(self) -> list[Request]:
        """What the folder's ledger says of every request."""
        return _kept(self._folder).requests()

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """No other thread changes the memory meanwhile; the folder, if any, is locked, and what other processes did to
        it is known; the process computes as ``fastntk.common.machine.settle`` has it."""
        settle()
        with self._turns, self._folder.locked() if self._folder else nullcontext():
            if self._folder and self._folder.version != self._folder.ledger.version():
                self.state = _opened(self._folder, self.model, self.state.members.source)
            yield

    def _carry_out(self, kind: str, ids: Iterable[Id], full: bool) -> Answer:
        """Answer a request: work it out, make it durable, then take the state after it."""
        started = time.perf_counter()
        check_kept(self)
        with self._exclusive():
            worked_out = draft(self.state, kind, ids, started)
            answer = worked_out.answer
            if self._folder:
                answer = replace(answer, seconds=self._folder.append(answer.certificate, worked_out.journal(), started))
            self.state = worked_out.after()
            try:
                if full:
                    answer = replace(answer, certificate=replace(answer.certificate, error=self.state.error()))
                if self._folder:
                    self._folder.finish(answer.certificate)
            except InputError as error:  # what is durable is answered
                log.warning("the request is answered; what was to follow failed: %s", error)
            return answer


def prepare(
    model: nn.Module,
    train: Dataset,
    initial: Mapping[str, Tensor],
    *,
    ridge: float | str = "auto",
    form: str = "auto",
    classes: int | str = "auto",
    loss: Loss = CrossEntropy(),
    shrinkage: float = 1.0,
    witnesses: int = 24,
    seed: int = 0,
    checkpoint: Path | str | None = None,
    numerics: Numerics = Numerics(),
    **changes: object,
) -> Memory:
    """One pass over the training data, after which ``memory.forget`` needs only the forgotten samples and witnesses.

    The layerwise and matrix-free forms read what stays for every request too. It changes settings of this process
    (``common.machine.settle``); processes of one job share the samples, and all end with the same memory.

    Args:
        model: fitted, in eval mode, with the tuned parameters requiring gradients. It is not changed.
        train: the map-style dataset it was fitted to; a sample's id is its index, or what ``train.ids`` has for it.
        initial: the tuned parameters before fitting, ``fit(...).initial``.
        ridge: the total L2 pull toward ``initial``, or ``"auto"``: see ``fastntk.solve.ridge.calibrate``.
        form: of ``fastntk.solve.forms``, or ``"auto"``: the cheapest that fits.
        classes: of each sample that the convex form keeps: a number, ``"all"``, or ``"auto"``, as many as are enough.
        loss: the one it was fitted with.
        shrinkage: what weight decay toward zero alone would have left: ``fit(...).shrinkage``, ``fastntk.shrinkage``.
        witnesses: how many retained samples check every request, in an order of ``seed``.
        checkpoint: a folder for rows on disk and for partial sums, from which a preparation that was cut off goes on.
        numerics: how to compute; ``changes`` replace its fields: ``prepare(..., batch_size=16)``.

    Raises:
        InputError: ``initial`` does not belong to the model, an option is out of range, a layer is in training mode,
            the data are not fit for use, or no form fits into memory.
    """
    options = {**pull_of(ridge, shrinkage), "form": form, "classes": classes, "witnesses": witnesses, "seed": seed}
    settle()
    check_initial(initial, tuned(model))
    network = linearised(model, train, loss, replace(numerics, **changes))  # type: ignore[arg-type]
    state = with_head(prepared(network, initial, options, checkpoint))
    tell_of_fit(state)
    return Memory(state)


def load(folder: Path | str, model: nn.Module, train: Dataset) -> Memory:
    """Open the folder of a memory (``Memory.save``); requests are durable there from now on.

    Args:
        folder: of the memory.
        model: the one it was prepared for; its tuned parameters may have moved since.
        train: a data source that has the samples of the requests to come, under the ids they had when the memory was
            prepared; of the others only a few are read, to check that it is the same, unless the form needs them.

    Raises:
        InputError: a file is missing, damaged or of an unknown format, or the memory belongs to another model or other
            data.
    """
    place = Folder(Path(folder))
    place.check_there()
    with place.locked():
        state = _opened(place, model, train)
    state.check(state.members.available(state.positions)[:_CHECKED])
    return Memory(state, place)


def by_itself(folder: Path, model: nn.Module) -> Memory:
    """The memory in a folder, to be purged: without its samples, which may be gone. Raises like ``load``."""
    place, nobody = Folder(folder), TensorDataset(torch.zeros(0, 1), torch.zeros(0))
    place.check_there()
    with place.locked():
        return Memory(_opened(place, model, nobody), place)


def current(memory: Memory) -> State:
    """A memory's state, with what other processes did to the folder."""
    with memory._exclusive():
        return memory.state


def check_kept(memory: Memory) -> None:
    """Raises ``InputError`` if what a memory answers could not be kept: its folder, if any, cannot be written to."""
    if memory._folder:
        check_writable(memory._folder.folder)


def _kept(folder: Folder | None) -> Folder:
    if folder is None:
        raise InputError("the memory is kept in no folder. Save it first.")
    return folder


def _opened(folder: Folder, model: nn.Module, source: Dataset) -> State:
    """The state in a folder that is locked, with the requests since the latest purge."""
    base, journals = folder.read()
    state = replace(unpack(base, model, source), audit=folder.ledger.audit())
    for journal in journals:
        state = replayed(state, on_device(journal["tensors"], state.network.device), journal)
    return state
