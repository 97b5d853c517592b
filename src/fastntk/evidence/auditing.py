"""How near retrained models a memory's answers come, measured before anybody asks.

A certificate's departures say that the network followed the linear prediction, not that retraining arrives at the same
place. An audit measures the latter on a request that nobody made: the memory's answer to it beside two models that are
truly retrained for it. It costs two retrainings, once; every certificate from then on carries the result.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset, Subset

from fastntk.common.errors import InputError
from fastntk.common.progress import track
from fastntk.common.seeds import check_seed, random_order
from fastntk.evidence.gain import found, solved
from fastntk.evidence.methods.retrain import retrained
from fastntk.evidence.metrics import accuracy, label_probability, logit_distance
from fastntk.inputs.batches import check_any, labels_of
from fastntk.inputs.called import restored
from fastntk.inputs.ids import Id
from fastntk.jacobians.products import tangent
from fastntk.memory.audit import Audit
from fastntk.memory.certificate import Answer
from fastntk.memory.exact import forgettable, solved_anew
from fastntk.memory.finish import multiplied
from fastntk.memory.memory import Memory, check_kept, current
from fastntk.memory.state import State
from fastntk.tuning.loss import check_labels, predictions
from fastntk.tuning.outputs import logits_of, margins, model_at
from fastntk.tuning.parameters import check_values, tuned
from fastntk.tuning.recipe import Recipe

_LEFT_OUT = 1000  # members at most
_TOGETHER = 64  # of them at a time
_ROUNDING = 1e-6  # of the predictions: two models that differ by less differ by the order of additions alone

LIMIT_DIFFERENCE = 1e-5
"""Of the weights' norm, up to which two fits that forget exactly are the same: in other batches, float32 rounds the
Jacobians otherwise."""

Retraining = Callable[[Dataset, int], Mapping[str, Tensor]]
"""A user's own training from the parameters before fitting: the data and a seed to the tuned parameters."""


def audit(
    memory: Memory,
    recipe: Recipe | Retraining,
    *,
    fraction: float = 0.1,
    ids: Iterable[Id] | None = None,
    held_out: Dataset | None = None,
    seed: int = 0,
) -> Audit:
    """Answer a drawn request from the memory, retrain twice without its samples, and compare.

    The request is not carried out. Its samples are in the audit as a number alone. The audit is ``memory.audit`` from
    now on, until ``refresh``; the certificates of requests carry it, and their verdict heeds it.

    Args:
        memory: with a data source that has all of its members.
        recipe: how the model was fitted, or a function that fits it: ``recipe(data, seed)`` starts from the parameters
            before fitting and returns the tuned ones after it. The model itself may be used: it is put back.
        fraction: of the members, drawn at random, for the request.
        ids: the request, in place of a drawn one: say, a class, where classes are what will be asked for.
        held_out: labelled samples that the model was not fitted to. With them the accuracy on members left out one by
            one is compared with that on unseen samples, see ``left_out``.
        seed: of the draw; the retrained models' are the two after the recipe's, or 1 and 2.

    Raises:
        InputError: the request is empty or everything, samples are missing or have changed, the memory's folder cannot
            be written to, retraining returns other parameters than the tuned ones, or two retrained models are equal.
    """
    check_kept(memory)
    state = current(memory)
    unseen = _checked(state, recipe, held_out, seed)
    drawn = state.members.positions(_asked(ids, memory.ids, fraction, seed))
    state.check_complete()
    retain = Subset(state.members, state.positions[~torch.isin(state.positions, drawn)].tolist())
    started = time.perf_counter()
    first, second = (_fitted(memory, retain, recipe, number) for number in track((1, 2), "auditing, retraining"))
    seconds = time.perf_counter() - started
    memory.ready()  # which every request to come needs
    answer = memory.preview(state.members.by_position[position] for position in drawn.tolist())
    result = _compared(state, Subset(state.members, drawn.tolist()), (first, second), answer, seconds)
    if unseen is not None:
        result = _beside_unseen(result, state, unseen)
    memory.enter(result, state)
    return result


@dataclass(frozen=True)
class Sameness:
    """An answer of a fit that forgets exactly, beside the same fit without the samples.

    Attributes:
        samples: of the request.
        difference: ``|theta - theta'| / |theta'|`` with theta the answer's tuned parameters and theta' the fit's.
        moved: by the request, of the same norm.
        seconds: that the fit took.
    """

    samples: int
    difference: float
    moved: float
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether they are the same, to ``LIMIT_DIFFERENCE``."""
        return self.difference <= LIMIT_DIFFERENCE

    def __str__(self) -> str:
        return (
            f"forgetting {self.samples:,} samples gives the weights of the same fit without them, solved anew from the "
            f"core's model, up to {self.difference:.1e} of their norm (limit {LIMIT_DIFFERENCE:.0e}; forgetting moves "
            f"them by {self.moved:.1e})"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "passed": self.passed, "verdict": "exact" if self.passed else "not exact"}


def audit_exact(memory: Memory, *, fraction: float = 0.1, ids: Iterable[Id] | None = None, seed: int = 0) -> Sameness:
    """Answer a drawn request from the memory of ``fastntk.fit_exact``, fit anew without its samples, and compare.

    The request is not carried out.

    Args:
        memory: with a data source that has all of its members.
        fraction: of the members that can be forgotten, drawn at random.
        ids: the request, in place of a drawn one.
        seed: of the draw.

    Raises:
        InputError: this is the memory of another fit, the request is empty or of the core, or samples are missing.
    """
    state = memory.state
    if state.core is None:
        raise InputError("this fit does not forget exactly: use fastntk.audit, which retrains.")
    check_seed(seed)
    asked = _asked(ids, forgettable(state), fraction, seed)
    state.check_complete()
    answered = memory.preview(asked).parameters
    started = time.perf_counter()
    fitted = solved_anew(state, state.members.positions(asked))
    seconds = time.perf_counter() - started
    ours, theirs, before = (state.layout.flatten(each) for each in (answered, fitted, memory.parameters))
    difference, moved = (float((ours - each).norm() / theirs.norm()) for each in (theirs, before))
    return Sameness(len(asked), difference, moved, seconds)


def _checked(state: State, recipe: Recipe | Retraining, held_out: Dataset | None, seed: int) -> Dataset | None:
    """Of held-out samples, if there are any, those to compare with.

    Raises:
        InputError: for arguments of an audit that would fail it after the retraining.
    """
    state.check_anchored("no retrained model is near or far: audit_exact does that fit anew; leave held-out data out")
    check_seed(seed)
    if not isinstance(recipe, Recipe) and not callable(recipe):
        raise InputError(f"an audit retrains by a fastntk.Recipe or a function, not a {type(recipe).__name__}.")
    if held_out is None:
        return None
    _check_leaves_out(state)
    return _unseen(state, held_out)


def _check_leaves_out(state: State) -> None:
    """Raises ``InputError`` unless the memory knows what leaving out each sample alone changes."""
    if state.network.numerics.probes is not None:
        raise InputError("samples can be left out one by one without class probes alone.")
    if not state.solution.leaves_out:
        raise InputError(
            f"samples cannot be left out one by one in the {state.solution.name} form. Prepare in another, or do "
            "without held-out samples."
        )


def _asked(ids: Iterable[Id] | None, of: list[Id], fraction: float, seed: int) -> list[Id]:
    """The request of an audit: the ids that were given, or else a share of some, at random."""
    if ids is None:
        if not 0 < fraction < 1:
            raise InputError(f"the fraction of the samples must be between 0 and 1, not {fraction}.")
        ids = [of[place] for place in random_order(len(of), seed)[: round(fraction * len(of))].tolist()]
    if not (asked := list(ids)):
        raise InputError("the audit's request is empty. Give a larger fraction.")
    return asked


def _compared(
    state: State, forget: Dataset, models: tuple[Mapping[str, Tensor], ...], answer: Answer, seconds: float
) -> Audit:
    """An answer beside the two retrained models, each by its tuned parameters."""
    device, labels, certificate = state.network.device, labels_of(forget), answer.certificate

    def logits(parameters: Mapping[str, Tensor]) -> Tensor:
        return logits_of(model_at(state.model, parameters), forget, device).cpu()

    unit = state.network.loss.unit

    def distance(left: Tensor, right: Tensor) -> float:
        return logit_distance(predictions(left, unit), predictions(right, unit))

    def errors(answered: Tensor) -> tuple[float, float]:
        more = torch.stack([margins(each, labels) - margins(answered, labels) for each in (one, other)]).double()
        return float(more.mean()), float(more.std(correction=0))

    one, other, ours = (logits(parameters) for parameters in (*models, answer.parameters))
    floor = distance(one, other)
    if floor <= _ROUNDING * distance(one, torch.zeros_like(one)):
        raise InputError(
            "the two retrained models are equal, up to rounding: there is no floor to compare with. Retraining must "
            "depend on the seed that it is given, as it does where batches are smaller than the data."
        )
    right = ours.argmax(1) == labels
    differ = sum(int((right != (each.argmax(1) == labels)).sum()) for each in (one, other)) / 2
    gain = found(state, answer.parameters, forget, (one, other))
    gained = logits(multiplied(state, answer.parameters, gain))
    return Audit(
        samples=len(labels),
        accuracy=accuracy(ours, labels),
        retrained=(accuracy(one, labels), accuracy(other, labels)),
        deviation=100 * differ**0.5 / len(labels),
        distances=(distance(ours, one), distance(ours, other)),
        floor=floor,
        departures=(certificate.departure_requested or 0.0, certificate.departure_retained or 0.0),
        gain=gain,
        accuracy_with_gain=accuracy(gained, labels),
        distances_with_gain=(distance(gained, one), distance(gained, other)),
        seconds=seconds,
        unit=unit,
        errors=errors(ours),
        errors_with_gain=errors(gained),
    )


def left_out(state: State, positions: Int[Tensor, " samples"]) -> Float[Tensor, "samples classes"]:
    """The logits of each member at ``positions`` after forgetting it alone, as the linear prediction has them; with
    cross-entropy, up to a number that is the same for all classes of a sample.

    ``f(x_i; theta*) + J_i (theta - theta* + s(S - i) - s(S))`` with S the members and theta the current parameters.

    Raises:
        InputError: the memory's form would need a solve a sample, or its classes are probed.

    In the convex form each leaves by one step of Newton's method.
    """
    _check_leaves_out(state)
    network, layout, places = state.network, state.layout, positions.tolist()
    fitted = logits_of(model_at(state.model, state.anchor), Subset(state.members, places), network.device)
    moved = state.vector - layout.flatten(state.anchor)
    alone = fitted + _leaving(state, positions, fitted)
    return alone + tangent(network, places, moved) if moved.any() else alone


def _leaving(state: State, positions: Int[Tensor, " some"], fitted: Tensor) -> Float[Tensor, "some classes"]:
    """What leaving each alone changes of its logits, which at the anchor are ``fitted``."""
    network = state.network
    changes = torch.cat([state.solution.alone(network, some) for some in positions.split(_TOGETHER)])
    return changes if network.keep is not None else network.loss.whitened(changes, fitted)


def left_out_gain(memory: Memory, held_out: Dataset) -> float:
    """The gain by which members that are left out one by one are as sure of their labels as held-out samples; no model
    is retrained. For ``fastntk.finished(memory, gain=...)``.

    With ``p_y`` the softmax's probability of a sample's label, ``f(x_i)`` the memory's logits and ``c_i`` what leaving
    sample i out changes of them (``left_out``), g solves

        mean_i p_y(f(x_i) + g c_i) = mean over held-out samples of p_y(f(x)),    0.5 <= g <= 2,

    over at most 1,000 members, and the held-out samples of the classes that these have. docs/nearer.md has what it does
    beside the gain of an audit.

    Args:
        memory: with a data source that has these members.
        held_out: samples like the members' that were not fitted.

    Raises:
        InputError: the memory's form leaves nobody out (``left_out``).
    """
    state = current(memory)
    _check_leaves_out(state)
    positions = _some(state)
    members, unseen = Subset(state.members, positions.tolist()), _unseen(state, held_out)
    labels = labels_of(members)
    fitted = logits_of(model_at(state.model, state.anchor), members, state.network.device)
    model, change = model_at(state.model, state.parameters), _leaving(state, positions, fitted).cpu()
    here, there = (logits_of(model, data, state.network.device).cpu() for data in (members, unseen))
    wanted = label_probability(there, labels_of(unseen))
    return solved(lambda gain: label_probability(here + gain * change, labels) - wanted)


def _unseen(state: State, held_out: Dataset) -> Subset:
    """Held-out samples of the classes that the members have who are left out one by one: of a class that was forgotten,
    others are no likeness.

    Raises:
        InputError: there is none, or one of a class that the model does not know.
    """
    check_any(held_out, "held-out")
    labels = labels_of(held_out)
    check_labels(labels, state.network.classes)
    there = labels_of(Subset(state.members, _some(state).tolist()))
    places = torch.isin(labels, there).nonzero()[:, 0].tolist()
    if not places:
        raise InputError("no held-out sample is of a class that the memory still has. Give others.")
    return Subset(held_out, places)


def _some(state: State) -> Int[Tensor, " samples"]:
    """The positions of the members that are left out one by one."""
    order = random_order(len(state.positions))
    return state.positions[order[:_LEFT_OUT].sort().values]


def _beside_unseen(result: Audit, state: State, unseen: Dataset) -> Audit:
    """With the accuracies on some members left out and on unseen samples of their classes."""
    positions = _some(state)
    members = labels_of(Subset(state.members, positions.tolist()))
    alone, others = left_out(state, positions).cpu(), labels_of(unseen)
    there = logits_of(model_at(state.model, state.parameters), unseen, state.network.device).cpu()
    return replace(
        result,
        left_out=accuracy(alone, members),
        unseen=accuracy(there, others),
        compared=(len(members), len(others)),
    )


def _fitted(memory: Memory, retain: Dataset, recipe: Recipe | Retraining, number: int) -> Mapping[str, Tensor]:
    """The retrained model of a number, 1 or 2; the memory's own is put back as it was."""
    if isinstance(recipe, Recipe):
        again = replace(recipe, seed=recipe.seed + number)
        return retrained(memory.model, memory.state.initial, retain, again)[0]
    own = tuned(memory.model)
    with restored(memory.model):
        fitted = recipe(retain, number)
        check_values(fitted, own, "what retraining returns", "Return fastntk.snapshot of what tune gave.")
        return {name: tensor.detach().clone() for name, tensor in fitted.items()}
