import copy

import pytest
import torch
from cases import CASES
from torch import nn
from torch.utils.data import TensorDataset

import fastntk
from fastntk.tuning.parameters import snapshot, tuned
from fastntk.tuning.recipe import Recipe


def small():
    case = CASES["bn+head"]
    return case.model(), case.data(20)


def test_fit_learns_and_reports_what_it_started_from():
    model, data = small()
    for image, label in zip(*data.tensors, strict=True):
        image[label] += 3
    before = snapshot(tuned(model))
    done = fastntk.fit(model, data, epochs=40, batch_size=5, learning_rate=0.1)
    assert done.losses[-1] < 0.5 * done.losses[0]
    assert all(torch.equal(before[name], done.initial[name]) for name in before)
    assert done.recipe == Recipe(epochs=40, batch_size=5, learning_rate=0.1)


def test_everything_frozen_and_every_statistic_stays_as_it_was():
    model, data = small()
    before = copy.deepcopy(model.state_dict())
    fastntk.fit(model.train(), data, epochs=2)
    free = set(tuned(model))
    assert not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in free), name


def test_same_seed_same_result_and_another_seed_another_order():
    results = []
    for seed in (3, 3, 4):
        model, data = small()
        fastntk.fit(model, data, epochs=2, batch_size=4, seed=seed)
        results.append(snapshot(tuned(model)))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert any(not torch.equal(results[0][name], results[2][name]) for name in results[0])


def test_weight_decay_pulls_toward_the_start_not_toward_zero():
    """With no data gradient, parameters stay where they started."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    data = TensorDataset(torch.zeros(4, 1, 1, 2), torch.tensor([0, 1, 0, 1]))
    before = model[1].weight.detach().clone()
    fastntk.fit(model, data, epochs=2, weight_decay=10.0)
    assert torch.equal(model[1].weight, before)


def test_first_step_is_adams_on_loss_and_pull():
    """One epoch of one batch, by hand: Adam's first step is the sign of the gradient."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    nn.init.zeros_(model[1].weight)
    fastntk.fit(model, TensorDataset(torch.ones(1, 1, 1, 1), torch.tensor([1])), epochs=1, learning_rate=0.1)
    torch.testing.assert_close(model[1].weight.detach(), torch.tensor([[-0.1], [0.1]]), rtol=1e-5, atol=1e-6)


def test_targets_are_centred_and_scaled():
    targets = fastntk.SquaredLoss(6.0).targets(torch.tensor([0, 2]), 3)
    torch.testing.assert_close(targets, torch.tensor([[4.0, -2.0, -2.0], [-2.0, -2.0, 4.0]]))
    loss = fastntk.SquaredLoss(6.0)(torch.tensor([[4.0, 0.0, -2.0]]), torch.tensor([0]))
    assert float(loss) == pytest.approx(2.0)


def test_bad_input_is_refused():
    model, data = small()
    with pytest.raises(fastntk.InputError, match="at least 1"):
        fastntk.fit(model, data, epochs=0)
    with pytest.raises(fastntk.InputError, match="NaN"):
        fastntk.fit(model, TensorDataset(data.tensors[0] * float("nan"), data.tensors[1]))
    with pytest.raises(fastntk.InputError, match="label 4 is outside"):
        fastntk.fit(model, TensorDataset(data.tensors[0], torch.full((20,), 4)))
    bright = TensorDataset(data.tensors[0] * 1e250, data.tensors[1])
    with pytest.raises(fastntk.InputError, match="no longer finite"):
        fastntk.fit(model, bright, epochs=60, learning_rate=1e6, optimizer="sgd")
    model.requires_grad_(False)
    with pytest.raises(fastntk.InputError, match="no parameter of the model is tuned"):
        fastntk.fit(model, data)
