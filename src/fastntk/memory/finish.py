"""What can be done to an answer once it is there: a gain on the step, and a head solved exactly after it.

The linear prediction says in which direction the parameters move when samples are taken out; how far rests on a ridge
that was found from the training data alone. An audit has two retrained models to compare with, and finds a gain g
(``fastntk.evidence.gain``): the answer to all requests so far becomes ``theta* + g (s(R) - s(D))``. Any gain but 1
takes the exactness for the linearised network away. One below 1 draws the parameters back towards those that knew the
samples (on three models of docs/nearer.md a third of a class or more came back), so it is for an exact head to follow;
alone, it is taken for 1.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastntk.common.errors import InputError
from fastntk.inputs.ids import Id
from fastntk.memory.memory import Memory, current
from fastntk.memory.state import State
from fastntk.solve.head import new_head


def finished(
    memory: Memory,
    parameters: Mapping[str, Tensor] | None = None,
    *,
    gain: bool | float = False,
    exact_head: bool = False,
    without: Iterable[Id] = (),
) -> dict[str, Tensor]:
    """An answer's parameters with the audit's gain, then with an exact head, as asked.

    The memory does not change, and what it answers next starts from the step as it is; so finish the parameters that
    are to be used, whenever they are to be.

    Args:
        memory: whose answer it is.
        parameters: the answer's; None takes the memory's after all requests so far.
        gain: multiply the step by the gain of the memory's audit, or by this number (``fastntk.left_out_gain``); one
            below 1 only if an exact head follows.
        exact_head: solve the head anew at the features after the step: a forward pass over the members.
        without: ids of members that are not in R although they are in the memory.

    Raises:
        InputError: there is no audit for the gain, or no exact head (see ``exact_head``).
    """
    state = current(memory)
    if gain is not False or exact_head:
        state.check_anchored("a gain or another head would make them others")
    return _finished(state, parameters, _factor(state, gain), exact_head, without)


def _finished(
    state: State, parameters: Mapping[str, Tensor] | None, factor: float | None, exact_head: bool, without: Iterable[Id]
) -> dict[str, Tensor]:
    done = dict(state.parameters if parameters is None else parameters)
    if factor is not None:
        done = multiplied(state, done, max(factor, 0.0 if exact_head else 1.0))
    return _with_head(state, done, without) if exact_head else done


def _factor(state: State, gain: bool | float) -> float | None:
    """The audit's gain, the number that is given, or none. Raises ``InputError`` where there is no audit, or it is not
    positive."""
    if gain is False:
        return None
    factor = audited_gain(state) if gain is True else float(gain)
    if not 0 < factor < float("inf"):
        raise InputError(f"a gain must be a positive number, not {gain!r}.")
    return factor


def refresh(
    memory: Memory, checkpoint: Path | None = None, *, gain: bool | float = False, exact_head: bool | None = None
) -> float:
    """Linearise the network anew at the answer to all requests, by one pass over the members; returns the seconds.

    The anchor, which was fitted to samples that have been forgotten since, is replaced; so the predictions are good
    again, and nothing in the memory has been computed at weights that saw them. What is served from then on starts from
    the new anchor: so the answer is finished first, as the weights are that are served. The options are those of
    ``prepare``, an automatic ridge is found anew, an audit is gone. If the memory is kept in a folder it is rewritten
    there, as by ``purge``.

    Args:
        memory: which is changed.
        checkpoint: as for ``prepare``.
        gain: as for ``finished``.
        exact_head: likewise; None: where the memory has one.

    Raises:
        InputError: a member is missing in the data source or has changed, the gain is below 1 and no head follows, or
            the disk is full; nothing changes then.
    """

    def found(state: State) -> tuple[dict[str, Tensor], dict[str, object]]:
        factor, head = ways(state, gain, exact_head)
        return _finished(state, None, factor, head, ()), {"gain": factor, "exact_head": head}

    return memory.anchored_at(found, checkpoint)


def ways(state: State, gain: bool | float, exact_head: bool | None) -> tuple[float | None, bool]:
    """The factor, if there is one, and whether there is an exact head, of an answer that is to be re-anchored as
    ``refresh`` has it.

    Raises:
        InputError: there is no exact head, no audit has a gain, or it is below 1 and no head follows.
    """
    head = state.head_shortfall is not None if exact_head is None else exact_head
    if head:
        _shortfall(state)
    factor = _factor(state, gain)
    check_gain(factor, head)
    return factor, head


def check_gain(gain: float | None, exact_head: bool) -> None:
    """Raises ``InputError`` for one below 1 that no exact head follows."""
    if gain is not None and gain < 1 and not exact_head:
        raise InputError(
            f"the gain is {gain:.2f}, and one below 1 draws the answer back towards what was forgotten. Take an exact "
            "head (--exact-head) too, or leave it out."
        )


def exact_head(memory: Memory) -> dict[str, Tensor]:
    """The parameters after all requests so far with their head solved exactly over the members
    (``fastntk.solve.head``), as ``finished`` has them.

    Raises:
        InputError: the head is not tuned, what it puts out are not the logits, the memory's classes are probed, or a
            member is missing in the data source.
    """
    return finished(memory, exact_head=True)


def multiplied(state: State, parameters: Mapping[str, Tensor], gain: float) -> dict[str, Tensor]:
    """``theta* + gain (theta - theta*)`` with theta the ``parameters``."""
    anchor = state.anchor
    return {name: anchor[name] + gain * (tensor - anchor[name]) for name, tensor in parameters.items()}


def audited_gain(state: State) -> float:
    """The gain of the memory's audit. Raises ``InputError`` where there is none."""
    if state.audit is None:
        raise InputError(
            "a gain comes from an audit, and this memory has had none since it was linearised: fastntk audit RUN."
        )
    return state.audit.gain


def _shortfall(state: State) -> Tensor:
    """What the fitted head fell short of. Raises ``InputError`` where there is no exact head."""
    if state.head_shortfall is None:
        raise InputError(
            "an exact head needs a tuned head that gives the logits, and a memory without class probes. Tune the head "
            "(fastntk.tune(model, 'bn', 'head')) and prepare so."
        )
    return state.head_shortfall


def _with_head(state: State, parameters: Mapping[str, Tensor], without: Iterable[Id]) -> dict[str, Tensor]:
    shortfall = _shortfall(state)
    retain = state.positions[~torch.isin(state.positions, state.members.positions(without))]
    missing = state.members.missing(retain)
    if missing:
        raise InputError(
            f"an exact head needs all {len(retain):,} retained samples; the data source lacks {missing:,}."
        )
    center = state.layout.unflatten(state.center, state.anchor)
    return new_head(state.network, parameters, center, retain.tolist(), state.ridge, shortfall)


def every_way(memory: Memory) -> dict[str, dict[str, Tensor]]:
    """The memory's parameters, and every way to finish them that it has."""
    gains = {"": False, "_gain": True} if memory.audit else {"": False}
    heads = {"": False, "_exact_head": True} if memory.state.head_shortfall is not None else {"": False}
    return {
        f"fastntk{gained}{headed}": finished(memory, gain=gain, exact_head=head)
        for headed, head in heads.items()
        for gained, gain in gains.items()
    }
