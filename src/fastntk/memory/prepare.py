"""The one pass over the training data: a state, from a fitted model."""

import logging
import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastntk.common import distributed
from fastntk.common.errors import InputError
from fastntk.common.files import room
from fastntk.common.machine import free_bytes
from fastntk.common.seeds import check_seed, random_order
from fastntk.inputs.batches import check_any, digests, hard
from fastntk.inputs.called import apart
from fastntk.jacobians import combinations
from fastntk.jacobians.linearised import FIRST, Linearised, enough, tail
from fastntk.jacobians.numerics import Numerics
from fastntk.jacobians.per_sample import PerSampleJacobian
from fastntk.memory.members import Members
from fastntk.memory.state import State
from fastntk.solve.forms import FORMS, chosen
from fastntk.solve.head import convex_shortfall
from fastntk.solve.prices import Price, Workload
from fastntk.solve.solution import Solution, Task
from fastntk.tuning.loss import Loss, check_loss
from fastntk.tuning.outputs import accuracy
from fastntk.tuning.parameters import check_values, snapshot, tuned

log = logging.getLogger(__name__)

_SEEN = 128  # samples, at most, that the model is asked about

_RIDGES = 1e-100, 1e100  # beyond, its square is no float64


def check_enough(count: int) -> None:
    """Raises ``InputError`` for so few samples that none could leave."""
    if count < 2:
        raise InputError("the training set needs at least 2 samples.")


def linearised(model: nn.Module, train: Dataset, loss: Loss, numerics: Numerics) -> Linearised:
    """The network at the model's tuned parameters, over all of a data source.

    Raises:
        InputError: there are no samples, or the loss is none of ours.
    """
    check_loss(loss)
    check_any(train, "training")
    return Linearised(PerSampleJacobian(apart(model), snapshot(tuned(model))), Members(train), loss, numerics)


def prepared(
    network: Linearised, initial: Mapping[str, Tensor], options: Mapping[str, Any], checkpoint: Path | str | None
) -> State:
    """The state of a memory of all samples of ``network``, without what an exact head needs (``with_head``).

    Args:
        network: linearised at the fitted parameters, over ``Members``.
        initial: the tuned parameters before fitting.
        options: ``ridge``, ``form``, ``classes``, ``shrinkage``, ``witnesses`` and ``seed`` of ``fastntk.prepare``.
        checkpoint: a folder for partial results, or None.

    Raises:
        InputError: there are fewer than two samples, no form fits into memory, or the seed is out of range.
    """
    check_seed(options["seed"])
    checkpoint = Path(checkpoint) if checkpoint else None
    count = len(network.train)  # type: ignore[arg-type]
    check_enough(count)
    network, work, price = priced(network, options["form"], options["classes"], checkpoint)
    free = free_bytes(network.device)
    log.info("%s form: up to %.1f GB of memory, of %.1f GB free", price.form, price.bytes / 1e9, free / 1e9)
    if price.disk:
        log.info("its rows take %.1f GB of disk, of %.1f GB free", price.disk / 1e9, room(checkpoint) / 1e9)
    if network.numerics.probes:
        log.info("class probes: %s", _probe_error(network))
    form = FORMS[price.form]
    network = replace(network, keep=work.kept if form.likeliest else None)
    center = options["shrinkage"] * network.layout.flatten(initial)
    displacement = network.layout.flatten(network.jacobian.parameters) - center
    ridge = None if options["ridge"] == "auto" else float(options["ridge"])
    solved = form.prepare(Task(network, count, displacement, ridge, checkpoint))
    _tell_of(solved.solution)
    versions = {name: version(name) for name in ("fastntk", "torch")} | {"python": platform.python_version()}
    return State(
        network,
        solved.solution,
        fingerprints=solved.residuals,
        pixels=digests(network.train, range(count), network.numerics.batch_size, network.numerics.workers),
        vector=network.layout.flatten(network.jacobian.parameters),
        head_shortfall=None,
        order=random_order(count, options["seed"]),
        calibration=solved.calibration,
        made={"versions": versions, "options": dict(options)},
        tail=tail(network),
    )


def _tell_of(solution: Solution) -> None:
    """A warning of one that is not as exact as it should be."""
    if (left := solution.inexactness()) > solution.limit:
        told = "the solution over all samples is exact to %.0e of its gradient alone (limit %.0e), and so are answers"
        log.warning(f"{told}; a larger ridge makes it more so", left, solution.limit)


def tell_of_fit(state: State) -> None:
    """How many of some samples the model classifies rightly; a warning where one label for all would do as well."""
    network, parts = state.network, []
    with torch.no_grad():
        for images, labels in network.images(state.order[:_SEEN].tolist()):
            parts.append((network.logits(images.to(network.device)).cpu(), hard(labels)))
    logits, asked = (torch.cat(each) for each in zip(*parts, strict=True))
    known, most = accuracy(logits, asked), 100 * int(asked.bincount().max()) / len(asked)
    told = f"of {len(asked)} of its samples the model classifies {known:.1f} % rightly"
    if known > most or known == 100:
        log.info(told)
    else:
        log.warning(f"{told}, and one label for all {most:.1f} %: are these its weights, images and labels?")


def with_head(state: State) -> State:
    """The same with what the fitted head falls short of, unless no head gives the logits, or these are probed."""
    network, solution = state.network, state.solution
    if not network.layout.head or network.numerics.probes is not None:
        return state
    short = solution.head_shortfall(network.layout) if network.of_logits else None
    if short is None:
        center = network.layout.head_of(state.center)
        short = convex_shortfall(network, solution.over.tolist(), center, solution.ridge)
    return replace(state, head_shortfall=short)


def priced(
    network: Linearised, form: str, classes: int | str = "auto", folder: Path | None = None, first: int = FIRST
) -> tuple[Linearised, Workload, Price]:
    """The network in batches that fit, what is to be done, and the price of the form to take with the memory that is
    free now, and the room on the disk of a folder. How many classes are kept is found on the ``first`` samples.

    Raises:
        InputError: nothing fits, there is no such form, or no such number of classes.
    """
    work = replace(Workload.of(network), kept=_kept(network, form, classes, first))
    free = free_bytes(network.device)
    price = distributed.shared(chosen(work, free, form, room(folder)))  # of the first process, for all
    numerics = replace(network.numerics, batch_size=price.batch or work.batch_size)
    return replace(network, numerics=numerics), work, price


def _kept(network: Linearised, form: str, classes: int | str, first: int) -> int:
    """How many classes a sample are kept: a number, all, or for a curved loss as many as are enough."""
    if classes == "all" or (classes == "auto" and not network.loss.curved):
        return network.classes
    if classes == "auto":
        offered = ("auto", *(name for name, kind in FORMS.items() if kind.likeliest))
        return enough(network, first) if form in offered and network.numerics.probes is None else network.classes
    if not isinstance(classes, int) or not 2 <= classes <= network.classes:
        raise InputError(f"classes must be 'auto', 'all' or from 2 to {network.classes}, not {classes!r}.")
    return classes


def refreshed(state: State, parameters: Mapping[str, Tensor], checkpoint: Path | None) -> State:
    """A state of the same members that is linearised at other parameters."""
    jacobian = PerSampleJacobian(state.model, parameters, state.layout)
    members = Members(state.members.source, state.members.ids)
    network = replace(state.network, jacobian=jacobian, train=members, keep=None)
    return with_head(prepared(network, state.initial, state.made["options"], checkpoint))


def pull_of(ridge: float | str, shrinkage: float) -> dict[str, Any]:
    """Both, as Python's own numbers, by name.

    Raises:
        InputError: the ridge is no positive number or 'auto', or the shrinkage outside ``(0, 1]``.
    """
    number = isinstance(ridge, Real) and not isinstance(ridge, bool)
    if ridge != "auto" and not (number and _RIDGES[0] <= float(ridge) <= _RIDGES[1]):
        raise InputError(
            f"the ridge must be a positive number ({_RIDGES[0]} to {_RIDGES[1]}) or 'auto', not {ridge!r}."
        )
    if not 0 < shrinkage <= 1:
        raise InputError(f"the shrinkage must be above 0 and at most 1, which is none, not {shrinkage!r}.")
    return {"ridge": ridge if isinstance(ridge, str) else float(ridge), "shrinkage": float(shrinkage)}


def check_initial(initial: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises ``InputError`` unless ``initial`` are copies of these parameters from before fitting, by shape."""
    check_values(initial, parameters, "`initial`", "Pass fit(...).initial.")
    if all(initial[name].data_ptr() == parameters[name].data_ptr() for name in parameters):
        raise InputError(
            "`initial` is the model's own parameters, not a copy from before fitting. Pass fit(...).initial, or take "
            "fastntk.snapshot(params) before your own loop."
        )


def _probe_error(network: Linearised) -> str:
    """How far the probed Gram matrix is off, on a few samples, in words."""
    positions = range(min(16, len(network.train)))  # type: ignore[arg-type]
    whole = replace(network, numerics=replace(network.numerics, class_probes=None))
    off = combinations.error(whole.rows(positions).jacobian, network.rows(positions).jacobian)
    return (
        f"the Gram matrix of the first {len(positions)} samples is off by {off:.0%} (Frobenius norm, against all "
        "classes), which falls with the square root of the number of samples; an answer to a request for few samples "
        "is off by much more"
    )
