"""Relearning and refitting, on a linear model where both can be followed by hand."""

from dataclasses import replace

import pytest
import torch
from fastntk.methods import Problem
from sklearn.linear_model import RidgeClassifier
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import TensorDataset

import fastntk
from fastntk.common.machine import peak_memory
from fastntk.evidence.recovery import (
    STEPS,
    barrier,
    first_reached,
    head_inputs,
    head_recovery,
    moved,
    relearn_steps,
    relearned_without,
)
from fastntk.tuning.recipe import Recipe


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(0)
    images, labels = torch.randn(40, 6), torch.arange(40) % 3
    images[torch.arange(40), labels] += 2
    model, train = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), TensorDataset(images, labels)
    fastntk.tune(model, "all")
    recipe = Recipe(epochs=20, learning_rate=3e-2)
    fit = fastntk.fit(model, train, recipe)
    memory = fastntk.prepare(model, train, fit.initial)
    return Problem(memory, list(range(0, 40, 4)), recipe)


def test_where_a_curve_reaches_a_level():
    assert first_reached([50.0, 80.0, 100.0], 90.0) == pytest.approx(1.5)
    assert first_reached([50.0, 80.0, 100.0], 80.0) == 1
    assert first_reached([95.0], 90.0) == 0
    assert first_reached([10.0, 20.0], 90.0) is None
    assert first_reached([10.0, 95.0, 20.0, 99.0], 90.0) == pytest.approx(80 / 85)


def test_relearning_is_training_on_what_was_forgotten(problem):
    images, labels = (tensor[problem.positions] for tensor in problem.memory.state.members.source.tensors)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    def accuracy():
        return 100 * float((model(images).argmax(1) == labels).double().mean())

    model.load_state_dict(problem.model.state_dict())
    enough = 0.9 * accuracy()
    anchor = problem.memory.anchor
    hidden = {**anchor, "2.bias": anchor["2.bias"] - torch.tensor([5.0, 0.0, 0.0])}
    model.load_state_dict(hidden)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-2)
    curve = [accuracy()]
    while curve[-1] < enough and len(curve) <= STEPS:
        optimiser.zero_grad()
        problem.recipe.loss(model(images), labels).backward()
        optimiser.step()
        curve.append(accuracy())
    steps = relearn_steps(problem, hidden)
    assert steps == first_reached(curve, enough)
    assert steps is not None
    assert steps > 1
    assert relearn_steps(problem, anchor) == 0
    far = {**anchor, "2.bias": anchor["2.bias"] - torch.tensor([99.0, 0.0, 0.0])}
    assert relearn_steps(problem, far) is None  # so many steps do not lead back


def test_what_retained_samples_give_back_is_counted_after_every_epoch(problem):
    torch.manual_seed(0)
    images, labels = problem.memory.state.members.source.tensors
    keep = torch.tensor([i for i in range(40) if i not in problem.forget])
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    hidden = {**problem.memory.anchor, "2.bias": problem.memory.anchor["2.bias"] - torch.tensor([5.0, 0.0, 0.0])}
    model.load_state_dict(hidden)
    optimiser, best = torch.optim.Adam(model.parameters(), lr=3e-2), 0.0
    whole = Problem(problem.memory, problem.forget, replace(problem.recipe, batch_size=100))  # an epoch is a step
    for _ in range(3):
        optimiser.zero_grad()
        problem.recipe.loss(model(images[keep]), labels[keep]).backward()
        optimiser.step()
        right = model(images[problem.positions]).argmax(1) == labels[problem.positions]
        best = max(best, 100 * float(right.double().mean()))
    assert relearned_without(whole, hidden) == pytest.approx(best)


def test_a_barrier_is_what_the_line_rises_above_its_ends(problem):
    anchor, far = problem.memory.anchor, {}
    generator = torch.Generator().manual_seed(1)
    for name, tensor in anchor.items():
        far[name] = tensor + 5 * torch.randn(tensor.shape, generator=generator)
    images, labels = problem.memory.state.members.source.tensors
    keep = torch.tensor([i for i in range(40) if i not in problem.forget])

    def loss(t):
        point = {name: anchor[name] + t * (far[name] - anchor[name]) for name in anchor}
        return float(
            problem.recipe.loss(torch.func.functional_call(problem.model, point, (images[keep],)), labels[keep])
        )

    line = [loss(t) - (1 - t) * loss(0) - t * loss(1) for t in (1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6)]
    assert barrier(problem, far) == pytest.approx(max(0.0, *line), abs=1e-5)
    assert barrier(problem, anchor) == pytest.approx(0, abs=1e-6)
    flat = torch.cat([(far[name] - anchor[name]).flatten() for name in anchor]).double()
    assert moved(problem, far) == pytest.approx(float(flat.norm()), rel=1e-6)


def test_a_new_head_is_fitted_to_half_of_what_was_forgotten(problem):
    part = torch.utils.data.Subset(problem.train, range(40))
    inputs = head_inputs(problem, problem.memory.anchor, part)
    torch.testing.assert_close(inputs, problem.model[:2](problem.memory.state.members.source.tensors[0]).detach())
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    known, asked = problem.positions[order[:5]], problem.positions[order[5:]]
    keep = torch.tensor([i for i in range(40) if i not in problem.forget])
    rows = torch.cat([known, keep])
    labels, scaler = problem.memory.state.members.source.tensors[1], StandardScaler().fit(inputs[rows])
    head = RidgeClassifier().fit(scaler.transform(inputs[rows]), labels[rows])
    expected = 100 * head.score(scaler.transform(inputs[asked]), labels[asked])
    assert head_recovery(problem, problem.memory.anchor) == pytest.approx(expected)
    one = Problem(problem.memory, problem.forget[:1], problem.recipe)
    assert head_recovery(one, problem.memory.anchor) is None


def test_the_memory_of_a_block_is_seen():
    with peak_memory(torch.device("cpu")) as small:
        pass
    with peak_memory(torch.device("cpu")) as large:
        torch.ones(30_000_000).sum()
    assert large.bytes - small.bytes > 100_000_000
