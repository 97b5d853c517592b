"""One contract for every method, and what each method's paper says on cases that can be solved otherwise."""

import copy
from dataclasses import replace

import oracles
import pytest
import torch
from cases import CASES
from fastntk.methods import (
    BadTeacher,
    Dampening,
    Delete,
    FastNTK,
    FineTune,
    FisherForgetting,
    Golatkar,
    GradientAscent,
    HeadAlone,
    Iterated,
    Newton,
    Problem,
    RandomLabel,
    Retrain,
    Scrub,
)
from torch.utils.data import Subset, TensorDataset

import fastntk
from fastntk.evidence.bench import config
from fastntk.evidence.compare import compare, one_shot, references
from fastntk.evidence.methods.golatkar import trapezium_factor
from fastntk.evidence.methods.problem import measured
from fastntk.inputs.batches import labels_of
from fastntk.memory.members import Members
from fastntk.memory.memory import Memory
from fastntk.tuning.parameters import snapshot, tuned
from fastntk.tuning.recipe import Recipe

METHODS = {
    "retrain": Retrain(),
    "retrain other seed": Retrain(1),
    "ridge": FastNTK(ridge=0.9),
    **one_shot(),
    "golatkar with noise": Golatkar(noise=1e-3),
    "newton": Newton(),
    "iterated": Iterated(),
    "fine-tune": FineTune(),
    "l1-sparse": FineTune(sparsity=1e-3),
    "gradient ascent": GradientAscent(),
    "neggrad+": GradientAscent(retained_share=0.9),
    "random label": RandomLabel(),
    "salun": RandomLabel(saliency=0.5),
    "scrub": Scrub(),
    "bad teacher": BadTeacher(),
    "fisher": FisherForgetting(),
    "ssd": Dampening(),
    "delete": Delete(),
    "head alone": HeadAlone(),
}


def problem(form="auto", ridge=0.6, name="bn+head") -> Problem:
    case = CASES[name]
    model, data, recipe = case.model(), case.data(20), Recipe(epochs=3, batch_size=5, loss=fastntk.SquaredLoss())
    done = fastntk.fit(model, data, recipe)
    memory = fastntk.prepare(model, data, done.initial, ridge=ridge, form=form, loss=fastntk.SquaredLoss())
    return Problem(memory, [2, 9, 15], recipe)


@pytest.mark.parametrize("selection", ["bn+head", "everything", "prompts+head"])
@pytest.mark.parametrize("name", METHODS)
def test_contract(name, selection):
    given = problem(name=selection)
    state, memory = copy.deepcopy(given.model.state_dict()), given.memory.parameters
    first, second = measured(METHODS[name], given), METHODS[name](given)
    assert first.seconds > 0
    assert list(first.parameters) == list(tuned(given.model))
    for key, tensor in first.parameters.items():
        assert torch.isfinite(tensor).all()
        assert tensor.shape == tuned(given.model)[key].shape
        torch.testing.assert_close(tensor, second.parameters[key])
    assert any(not torch.equal(tensor, memory[key]) for key, tensor in first.parameters.items())
    assert all(torch.equal(tensor, state[key]) for key, tensor in given.model.state_dict().items())
    assert all(torch.equal(tensor, memory[key]) for key, tensor in given.memory.parameters.items())
    assert given.memory.state.members.present.all()


def dense(given):
    layout = given.memory.state.layout
    jacobian = oracles.jacobian(given.model, given.memory.anchor, layout, given.memory.state.members.source.tensors[0])
    residual = given.memory.state.network.loss.residual(
        given.model(given.memory.state.members.source.tensors[0]).detach(), labels_of(given.train)
    )
    u = layout.flatten(given.memory.anchor) - layout.flatten(given.initial)
    keep = ~torch.isin(torch.arange(20), given.positions)
    return (
        jacobian,
        residual,
        u,
        keep,
        lambda done: layout.flatten(done.parameters) - layout.flatten(given.memory.anchor),
    )


@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("ridge", [None, 0.2])
def test_fast_ntk_is_the_difference_of_two_least_squares_solutions(form, ridge):
    given = problem(form)
    jacobian, residual, u, keep, moved = dense(given)
    total = ridge or 0.6
    step = oracles.anchored_step(jacobian[keep], residual[keep], u, total) - oracles.anchored_step(
        jacobian, residual, u, total
    )
    torch.testing.assert_close(moved(FastNTK(ridge)(given)), step, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_golatkar_solves_twice_with_a_ridge_per_sample_and_no_anchor(form):
    given = problem(form)
    jacobian, residual, u, keep, moved = dense(given)
    retain = oracles.anchored_step(jacobian[keep], residual[keep], 0 * u, 0.02 * 17)
    step = retain - oracles.anchored_step(jacobian, residual, 0 * u, 0.02 * 20)
    torch.testing.assert_close(moved(Golatkar(0.02, trapezium=False)(given)), step, rtol=1e-8, atol=1e-9)
    factor = trapezium_factor(step, u - retain)
    assert factor > 1
    torch.testing.assert_close(moved(Golatkar(0.02)(given)), factor * step, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(moved(Golatkar()(given)), moved(Golatkar(0.03)(given)))


@pytest.mark.parametrize("head", [False, True])
def test_a_note_says_of_labels_that_are_known_nothing_else(head):
    given = problem()
    assert given.memory.state.emptied(torch.tensor(given.forget)) is not None
    assert "do not offer all labels" not in FastNTK(exact_head=head)(given).note


def test_samples_may_have_names_of_their_own():
    given = problem()
    named = TensorDataset(*given.memory.state.members.source.tensors)
    named.ids = [f"sample {number}" for number in reversed(range(20))]
    memory = fastntk.prepare(given.model, named, given.initial, ridge=0.6, loss=fastntk.SquaredLoss())
    answer = FastNTK()(replace(given, forget=[named.ids[place] for place in given.forget], memory=memory))
    for name, tensor in FastNTK()(given).parameters.items():
        torch.testing.assert_close(answer.parameters[name], tensor)


def test_retrain_is_fitting_without_the_forgotten():
    given = problem()
    model = copy.deepcopy(given.model)
    model.load_state_dict(given.initial, strict=False)
    fastntk.fit(model, given.retain, given.recipe)
    for name, tensor in Retrain()(given).parameters.items():
        assert torch.equal(tensor, snapshot(tuned(model))[name])
    assert len(given.retain) == 17
    assert not set(given.staying.tolist()) & {2, 9, 15}


def test_comparison_measures_every_method_beside_the_original():
    given = problem()
    report, notes = compare(given, given.train, references(1) | one_shot(), 3.0)
    assert list(report.rows) == [
        "original",
        "retrain",
        "retrain_2",
        "fastntk",
        "fastntk_exact_head",
        "golatkar",
        "golatkar_step",
    ]
    assert report.rows["original"]["seconds"] == 3.0
    assert report.rows["retrain"]["forget_distance"] == report.rows["retrain_2"]["forget_distance"] > 0
    assert list(references(3, 4)) == ["retrain", "retrain_2", "retrain_3", "retrain_4"]
    assert references(3, 4)["retrain_4"] == Retrain(5)
    assert references(3, 0) == {}
    assert notes.keys() == {"fastntk", "fastntk_exact_head"}
    assert "the network departs" in notes["fastntk"]


def test_a_request_whose_others_are_partly_gone_is_of_those_that_are_there():
    given = problem()
    images, labels = given.memory.state.members.source.tensors
    fewer = TensorDataset(images[:-2], labels[:-2])
    memory = Memory(given.memory.state.with_members(Members(fewer, range(20))))
    here = replace(given, memory=memory)
    assert here.staying.tolist() == [i for i in range(18) if i not in given.forget]
    assert len(here.retain) == 15
    assert labels_of(here.retain).tolist() == labels[here.staying].tolist()
    with pytest.raises(fastntk.InputError, match="no sample 19, which must be read"):
        memory.state.members[19]


def test_labels_are_what_a_dataset_gives_and_not_what_it_stores():
    class Relabelling(TensorDataset):
        targets = torch.zeros(20, dtype=torch.long)
        labels = ("a",) * 20

    images, labels = CASES["bn+head"].data(20).tensors
    data = Relabelling(images, labels)
    assert torch.equal(labels_of(Subset(data, [3, 5])), labels[[3, 5]])
    assert torch.equal(labels_of(Members(data)), labels)


def test_every_method_is_held_to_the_contract():
    asked = {type(method) for method in METHODS.values()}
    assert {kind for kind in config.METHODS.values() if kind not in asked} == set()
