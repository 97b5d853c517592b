"""A state does not change, whatever is asked of its memory."""

import copy
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from memories import close, prepared

import fastntk
from fastntk.jacobians.numerics import Numerics
from fastntk.memory.state import State
from fastntk.solve.forms import FORMS


def seen(state):
    """Everything of a state that can be looked at without solving."""
    tensors = (state.fingerprints, state.vector, state.order, state.head_shortfall)
    known = [None if tensor is None else tensor.clone() for tensor in tensors]
    return known, state.members.by_position, state.solution.over.clone(), state.audit, state.ridge


def same(left, right):
    pairs = zip((*left[0], left[2]), (*right[0], right[2]), strict=True)
    return all(a is b or torch.equal(a, b) for a, b in pairs) and (left[1], *left[3:]) == (right[1], *right[3:])


@pytest.mark.parametrize("form", FORMS)
def test_a_request_yields_another_state_and_leaves_this_one(form):
    memory = prepared(form=form)
    for kind, ids in (("forget", [3, 9]), ("remember", [9]), ("forget", [0])):
        before = memory.state
        known, parameters = seen(before), before.parameters
        getattr(memory, kind)(ids)
        assert memory.state is not before
        assert same(seen(before), known)
        close(before.parameters, parameters, 0)
        assert not same(seen(memory.state), known)


@pytest.mark.parametrize("form", FORMS)
def test_looking_changes_nothing(form, tmp_path):
    memory = prepared(form=form)
    memory.save(tmp_path / "m")
    state, files = memory.state, sorted(path.name for path in (tmp_path / "m").iterdir())
    tensors = {name: tensor.clone() for name, tensor in state.solution.tensors().items()}
    for _ in range(2):
        memory.preview([2, 5])
        memory.requests()
        state.error()
        assert memory.state is state
    assert all(torch.equal(tensor, state.solution.tensors()[name]) for name, tensor in tensors.items())
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == files


def test_a_preview_that_solves_anew_keeps_it_to_itself():
    memory, exact = prepared(form="primal"), prepared(form="primal")
    solution = memory.state.solution
    memory.state = replace(memory.state, solution=replace(solution, step=(1 + 1e-6) * solution.step))
    state = memory.state
    close(memory.preview([2, 6]).parameters, exact.preview([2, 6]).parameters)
    assert memory.state is state


def test_who_fails_to_join_or_leave_changes_nothing():
    memory = prepared()
    state = memory.state
    for ask in (lambda: memory.forget([99]), lambda: memory.remember([3]), lambda: memory.remember([99])):
        with pytest.raises(fastntk.InputError):
            ask()
        assert memory.state is state


def test_no_field_can_be_set():
    state = prepared().state
    for each in fields(State):
        with pytest.raises(FrozenInstanceError):
            setattr(state, each.name, None)


def test_numerics_are_checked_and_come_back_from_json():
    numerics = Numerics(batch_size=3, dtype=torch.float32, class_probes=2)
    assert Numerics.from_dict(replace(numerics, workers=2).to_dict()) == numerics
    for wrong in ({"precision": "half"}, {"dtype": torch.float16}, {"batch_size": 0}, {"workers": -1}):
        with pytest.raises(fastntk.InputError, match="must be"):
            Numerics(**wrong)


def test_an_answer_is_the_callers_own():
    memory = prepared()
    answer = memory.forget([3])
    before = memory.parameters
    for tensors in (answer.parameters, memory.parameters, memory.state.initial):
        for tensor in tensors.values():
            tensor.add_(1)
    memory.anchor.clear()
    close(memory.parameters, before, 0)


def test_a_memory_can_be_copied():
    memory = prepared()
    other = copy.deepcopy(memory)
    close(memory.forget([3]).parameters, other.forget([3]).parameters, 0)
    close(memory.forget([4]).parameters, other.forget([4]).parameters, 0)
