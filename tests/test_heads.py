"""The head solved exactly at the features after the step."""

from dataclasses import replace

import pytest
import torch
from cases import CASES
from fastntk.methods import FastNTK, HeadAlone, Problem
from torch.utils.data import TensorDataset

import fastntk
from fastntk.common.errors import InputError
from fastntk.tuning.recipe import Recipe


def problem(*select, form="auto", **options) -> Problem:
    case = CASES["bn+head"]
    model, data, recipe = case.model(), case.data(20), Recipe(epochs=3, batch_size=5, loss=fastntk.SquaredLoss())
    fastntk.tune(model, *select)
    done = fastntk.fit(model, data, recipe)
    memory = fastntk.prepare(model, data, done.initial, ridge=0.6, form=form, loss=fastntk.SquaredLoss(), **options)
    return Problem(memory, [2, 9, 15], recipe)


def ridge_regression(inputs, targets, start, ridge):
    """By least squares with the ridge as further rows."""
    count = start.shape[1]
    rows = torch.cat([inputs, ridge**0.5 * torch.eye(count, dtype=inputs.dtype)])
    wanted = torch.cat([targets, ridge**0.5 * start.T])
    return torch.linalg.lstsq(rows, wanted).solution.T


@pytest.mark.parametrize("form", ["primal", "dual", "convex", "matrix-free"])
@pytest.mark.parametrize("select", [("bn", "head"), ("bn", r"head\.weight")])
def test_it_is_ridge_regression_on_the_moved_features(select, form):
    given = problem(*select, form=form)
    images, labels = given.memory.state.members.source.tensors
    plain, exact = FastNTK()(given).parameters, FastNTK(exact_head=True)(given).parameters
    keep = given.staying
    with_bias = "head.bias" in given.initial

    def features(parameters):
        inputs = []
        hook = given.model.head.register_forward_pre_hook(lambda _, x: inputs.append(x[0].detach()))
        torch.func.functional_call(given.model, dict(parameters), (images,))
        hook.remove()
        return torch.cat([inputs[0], torch.ones(20, 1)], 1) if with_bias else inputs[0]

    def head(parameters):
        parts = [parameters["head.weight"]] + ([parameters["head.bias"][:, None]] if with_bias else [])
        return torch.cat(parts, 1)

    targets = given.recipe.loss.targets(labels, 3) - (0 if with_bias else given.model.head.bias.detach())
    start, anchor = head(given.initial), given.memory.anchor
    new = ridge_regression(features(plain)[keep], targets[keep], start, 0.6)
    old = ridge_regression(features(anchor), targets, start, 0.6)
    torch.testing.assert_close(head(exact), head(anchor) + new - old)
    alone = ridge_regression(features(anchor)[keep], targets[keep], start, 0.6)
    torch.testing.assert_close(head(HeadAlone()(given).parameters), head(anchor) + alone - old)
    assert all(torch.equal(exact[name], plain[name]) for name in plain if not name.startswith("head"))
    assert not torch.allclose(head(exact), head(plain), rtol=1e-3)


def test_where_the_head_alone_is_tuned_it_is_the_step():
    given = problem("head")
    plain, exact = FastNTK()(given).parameters, FastNTK(exact_head=True)(given).parameters
    for name, tensor in plain.items():
        torch.testing.assert_close(exact[name], tensor)


def test_nothing_forgotten_changes_nothing():
    given = problem("bn", "head")
    nothing = replace(given, forget=given.forget[:0])
    for name, tensor in FastNTK(exact_head=True)(nothing).parameters.items():
        torch.testing.assert_close(tensor, given.memory.anchor[name])


def test_after_requests_it_is_that_of_all_of_them_in_any_order(tmp_path):
    together, apart = problem("bn", "head"), problem("bn", "head")
    expected = FastNTK(exact_head=True)(together).parameters
    apart.memory.save(tmp_path / "memory")
    apart.memory.forget([9])
    fastntk.exact_head(apart.memory)
    apart.memory.forget([15, 2])
    found = fastntk.exact_head(fastntk.load(tmp_path / "memory", apart.model, apart.memory.state.members.source))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


def test_a_member_that_is_missing_is_noticed(tmp_path):
    given = problem("bn", "head")
    images, labels = given.memory.state.members.source.tensors
    data = TensorDataset(images, labels)
    data.ids = list(range(20))
    fastntk.prepare(given.model, data, given.initial, ridge=0.6, loss=fastntk.SquaredLoss()).save(tmp_path / "memory")
    fewer = TensorDataset(images[:-1], labels[:-1])
    fewer.ids = data.ids[:-1]
    with pytest.raises(InputError, match="all 20 retained samples; the data source lacks 1"):
        fastntk.exact_head(fastntk.load(tmp_path / "memory", given.model, fewer))


@pytest.mark.parametrize(
    ("select", "options"),
    [
        (("bn",), {}),
        (("bn", "head"), {"class_probes": 2}),
    ],
)
def test_where_there_can_be_none_it_says_so(select, options):
    given = problem(*select, **options)
    with pytest.raises(InputError, match="needs a tuned head"):
        FastNTK(exact_head=True)(given)
    with pytest.raises(InputError, match="own ridge"):
        FastNTK(ridge=0.3, exact_head=True)
