"""A fit that forgets exactly, by construction: the samples that may be asked for enter by a convex problem alone.

A core B that nobody will ask to forget is fitted in the ordinary way, which gives ``theta_B``. With the other samples S

    theta(S) = theta_B + argmin_d  sum_{B and S} l(f_i + J_i d, t_i) + ridge/2 |d + u|^2        f_i, J_i at theta_B

These are ordinary weights of the network. To forget F is ``theta(S without F)``, which is what this procedure gives on
the data that stay: there is no anchor that has seen F, no gain, and no distance. Whatever is chosen by looking at data
(the ridge, how many classes a sample keeps) is chosen on the core's images alone.

``u`` is 0, or noise: with ``b = ridge u`` drawn from ``N(0, (c e' / eps)^2)``, ``c = sqrt(2 log(1.5 / delta))`` and
e' a bound on the norm of the gradient that is left, forgetting is an (eps, delta) certified removal (Guo et al. 2020,
arXiv 1911.03030, Theorem 3, where this is the second case): whoever sees the weights can hardly tell them from those of
the optimum on what stays. The theorem's noise is known to be enough up to an eps of 1. Weights in float32 are those in
float64, rounded: what is done to weights afterwards takes nothing back.

Sources: for linearised networks as models, Achille et al. 2020 (LQF, arXiv 2012.11140); for a core that is not
forgotten, Golatkar et al. 2020 (mixed-privacy forgetting, arXiv 2012.13431).
"""

import logging
import math
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from fastntk.common import distributed
from fastntk.common.errors import InputError
from fastntk.common.machine import settle
from fastntk.inputs.batches import digests, item
from fastntk.inputs.ids import Id
from fastntk.jacobians.linearised import FIRST, Linearised, enough, tail
from fastntk.jacobians.numerics import Numerics
from fastntk.memory.agreement import logits_around
from fastntk.memory.certificate import Removal, gradient_allowed
from fastntk.memory.members import Members
from fastntk.memory.memory import Memory
from fastntk.memory.prepare import linearised, prepared, pull_of
from fastntk.memory.state import State, check_apart
from fastntk.solve.convex import Convex
from fastntk.tuning.fitting import fit
from fastntk.tuning.outputs import accuracy
from fastntk.tuning.recipe import Recipe

log = logging.getLogger(__name__)

FACTOR = 3e-2
"""Of the mean diagonal of the kernel over the core: the ridge, if nothing is said (docs/exact.md)."""

KEPT = 4, 10
"""Classes of a sample that rows are kept of, if nothing is said: at least and at most. The network is surer of the core
than of the others, so fewer look enough (docs/exact.md)."""

BATCH = 64
"""Images that are read at a time."""


def fit_exact(
    model: nn.Module,
    train: Dataset,
    core: Iterable[Id] | Dataset,
    recipe: Recipe = Recipe(),
    *,
    fitted: bool = False,
    ridge: float | str = "auto",
    classes: int | str = "auto",
    removal: Removal | None = None,
    checkpoint: Path | str | None = None,
    numerics: Numerics = Numerics(),
) -> Memory:
    """Fit ``model`` to the core, in place, and solve for the rest; from then on every answer is exact.

    Args:
        model: in eval mode; tuned parameters require gradients. It ends at ``theta_B``: serve ``memory.parameters``.
        train: B and S, a map-style dataset.
        core: the ids of B; or, if ``fitted``, the images that it was fitted to, of any classes, which are in no sum.
        recipe: how the core is fitted; its loss is l.
        fitted: whether the model is at ``theta_B`` already.
        ridge: a total, or ``"auto"``: ``FACTOR`` of the kernel's mean diagonal over the core.
        classes: of each sample that rows are kept of: a number, ``"all"``, or ``"auto"``: enough for the core.
        removal: add noise for certified removal, drawn by the system and not by the seed; it is in the folder. It holds
            where a certificate says ``certified``: no more of the gradient is left than ``LEFT`` of the ridge.
        checkpoint: as for ``fastntk.prepare``.
        numerics: as for ``fastntk.prepare``.

    Raises:
        InputError: the core is empty or unknown, or everything; other images that are a core are among ``train`` too;
            or like ``fit`` and ``prepare``.
    """
    settle()
    _check_asked(ridge, classes, removal)
    if isinstance(core, Dataset) and not fitted:
        raise InputError("a core of other data must be fitted already: fitted=True, with a head for these classes.")
    positions, images = _placed(train, core)
    pixels = digests_apart(train, core if isinstance(core, Dataset) else positions, numerics.batch_size)
    if not fitted:
        fit(model, images, recipe)
    network = linearised(model, train, recipe.loss, numerics)
    chosen = distributed.shared(chosen_on(network, images, ridge, classes))
    state = replace(_solved(network, chosen, removal, checkpoint), core=positions, core_pixels=pixels, removal=removal)
    _tell_of(state)
    return Memory(state)


def _check_asked(ridge: float | str, classes: int | str, removal: Removal | None) -> None:
    """Raises ``InputError`` for what no fit would make right."""
    pull_of(ridge, 1.0)
    number = isinstance(classes, int) and not isinstance(classes, bool)
    if classes not in ("auto", "all") and not (number and int(classes) >= 2):
        raise InputError(f"classes must be 'auto', 'all' or a number from 2, not {classes!r}.")
    if removal is not None:
        removal.check()


def _placed(train: Dataset, core: Iterable[Id] | Dataset) -> tuple[Int[Tensor, " core"], Dataset]:
    """Where the core is among the samples, if it is, and its images."""
    if isinstance(core, Dataset):
        positions, images = torch.zeros(0, dtype=torch.long), core
    else:
        positions = Members(train).positions(core)
        images = Subset(train, positions.tolist())
    if not len(images):  # type: ignore[arg-type]
        raise InputError("the core is empty. Name samples that nobody will ask to forget.")
    return positions, images


def digests_apart(
    train: Dataset, core: Int[Tensor, " core"] | Dataset, batch_size: int = BATCH
) -> Int[Tensor, " core"]:
    """What the images of a core, by positions or apart, are known again by (``fastntk.inputs.batches.digests``).

    Raises:
        InputError: a sample that is not of the core has the very pixels of one.
    """
    others = digests(train, range(len(train)), batch_size)  # type: ignore[arg-type]
    if isinstance(core, Dataset):
        known = digests(core, range(len(core)), batch_size)  # type: ignore[arg-type]
    else:
        known, others = others[core], others[~torch.isin(torch.arange(len(others)), core)]
    check_apart(others, known)
    return known


_SEEN = 512  # samples, at most, on which the core's weights and the solved ones are compared


def _tell_of(state: State) -> None:
    """What solving has made of the network's accuracy on samples that are not of the core; a warning where more are
    lost than twice the root of how many changed, as chance would."""
    others = state.order[~torch.isin(state.order, cast(Tensor, state.core))][:_SEEN]
    before, after, labels = logits_around(state.network, others.tolist(), state.anchor, state.parameters)
    was, now = (accuracy(logits.cpu(), labels) for logits in (before, after))
    changed = int((before.argmax(1) != after.argmax(1)).sum())
    worse = (was - now) * len(labels) / 100 > 2 * changed**0.5
    advice = "; where the step is too long for the network, a larger ridge or a larger core helps" if worse else ""
    log.log(
        logging.WARNING if worse else logging.INFO,
        "of %d samples that are not of the core its weights classify %.1f %% rightly, the solved ones %.1f %%%s",
        len(labels), was, now, advice,
    )  # fmt: skip


_SCALED = 64  # images of the core, at most, whose rows the ridge's unit is a mean over: a few percent from that of all


class Chosen(NamedTuple):
    """What is chosen on the core: the total ridge, and how many classes a sample keeps; and what is left out so of the
    gradient there (``State.tail``)."""

    ridge: float
    classes: int
    tail: float


def chosen_on(network: Linearised, core: Dataset, ridge: float | str, classes: int | str) -> Chosen:
    """What is not given, from evenly spaced images of the core and the network's own predictions on them: the labels
    are not looked at, so the core may be of other classes."""
    places = torch.linspace(0, len(core) - 1, min(FIRST, len(core))).round().long()  # type: ignore[arg-type]
    images = torch.stack([item(core, place)[0] for place in places.tolist()])
    labels = torch.cat([network.logits(part.to(network.device)).argmax(1).cpu() for part in images.split(64)])
    few = replace(network, train=TensorDataset(images, labels))
    kept = enough(few, between=KEPT) if classes == "auto" else network.classes if classes == "all" else classes
    few = replace(few, keep=int(kept))
    return Chosen(_scaled(few) if ridge == "auto" else float(ridge), int(kept), tail(few))


def _scaled(core: Linearised) -> float:
    """``FACTOR`` of the kernel's mean diagonal, over some images of the core."""
    count = len(core.train)  # type: ignore[arg-type]
    rows = core.rows(range(0, count, -(-count // _SCALED)), "the core")
    return FACTOR * rows.mean_diagonal(torch.float64, rows.jacobian.rest.device)


def _solved(
    network: Linearised,
    chosen: Chosen,
    removal: Removal | None,
    checkpoint: Path | str | None,
) -> State:
    here = network.layout.flatten(network.jacobian.parameters)
    bound = gradient_allowed(chosen.ridge)
    drawn = None if removal is None else distributed.shared(noise(removal, bound, len(here)))
    center = here if drawn is None else here - drawn.to(here) / chosen.ridge
    return _optimum(network, center, chosen, checkpoint)


def _optimum(
    network: Linearised, center: Float[Tensor, " p"], chosen: Chosen, checkpoint: Path | str | None = None
) -> State:
    """The memory of all samples of ``network``, at ``theta(S)``; the pull leads to ``center``, which is not rounded."""
    exactly = {name: each.double() for name, each in network.jacobian.parameters.items()}
    pull = {**pull_of(chosen.ridge, 1.0), "form": "convex", "classes": chosen.classes}
    state = prepared(network, network.layout.unflatten(center, exactly), {**pull, **_DRAWN}, checkpoint)
    state = replace(state, solution=replace(cast(Convex, state.solution), exactly=True).ready())
    here = network.layout.flatten(network.jacobian.parameters)
    return replace(state, vector=here + state.solution.step, tail=chosen.tail)


def forgettable(state: State) -> list[Id]:
    """The ids of the members that can be asked for: of all but the core."""
    core = set() if state.core is None else set(state.core.tolist())
    return [each for place, each in enumerate(state.members.by_position) if each is not None and place not in core]


def solved_anew(state: State, without: Int[Tensor, " some"]) -> dict[str, Tensor]:
    """``theta(S without F)`` from its beginning, of a fit that forgets exactly: the Jacobians, their kernel and the
    optimum of those who are not at the positions ``without`` are computed anew. Of the memory are ``theta_B``, the
    noise if there is some, and what was chosen on the core."""
    network, members = state.network, state.members
    stays = replace(network, train=Members(members.source, members.without(without).ids))
    return _optimum(stays, state.center, Chosen(state.ridge, network.keep or network.classes, state.tail)).parameters


_DRAWN = {"witnesses": 24, "seed": 0}  # retained samples that look at every answer


def noise(removal: Removal, bound: float, size: int) -> Float[Tensor, " size"]:
    """b, from the system's own randomness."""
    from scipy.special import ndtri  # a moment to import

    eps, delta = removal
    sigma = math.sqrt(2 * math.log(1.5 / delta)) * bound / eps
    drawn = np.frombuffer(os.urandom(8 * size), np.uint64) >> 11  # 53 bits each: who knows the data cannot try all
    return sigma * torch.from_numpy(ndtri((drawn + 0.5) * 2.0**-53))
