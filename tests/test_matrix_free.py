"""The form that takes no Jacobian at all, against the one that forms the Gram matrix."""

import pytest
import torch
from cases import CASES
from memories import close, moved

import fastntk
from fastntk.jacobians import products
from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.numerics import Numerics
from fastntk.jacobians.per_sample import PerSampleJacobian
from fastntk.solve import iterative as matrix_free
from fastntk.solve.collect import shards
from fastntk.solve.kernel import kernel
from fastntk.solve.passes import Passes
from fastntk.tuning.parameters import snapshot, tuned

NAMES = ["bn+head", "ln+head", "grouped", "shared"]


def linearised(name):
    case = CASES[name]
    model = case.model()
    return Linearised(PerSampleJacobian(model, snapshot(tuned(model))), case.data(), numerics=Numerics(batch_size=5))


@pytest.mark.parametrize("name", NAMES)
def test_products_are_those_of_the_jacobian(name):
    network, ids = linearised(name), [0, 3, 7, 8, 9, 13]
    rows = network.rows(ids)
    dense = rows.jacobian.dense()
    vector = torch.randn(dense.shape[2], dtype=torch.float64)
    flat = dense.flatten(0, 1)
    torch.testing.assert_close(products.tangent(network, ids, vector), dense @ vector, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(products.gram(network, ids, vector), flat.T @ (flat @ vector), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        products.pull(network, network.residual(ids)), flat.T @ rows.residual.flatten(), rtol=1e-9, atol=1e-9
    )
    operator = Passes(network, torch.tensor(ids))
    left = flat.T @ (rows.residual.flatten() - flat @ vector)
    torch.testing.assert_close(operator.downhill(vector), left, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [3, 40])
def test_it_is_the_primal_form_to_its_residual(name, steps, monkeypatch):
    monkeypatch.setattr(matrix_free, "TOLERANCE", 1e-11)
    monkeypatch.setattr(matrix_free, "STEPS", steps)
    case = CASES[name]
    model = case.model()
    left, right = (
        fastntk.prepare(model, case.data(), moved(model), ridge=0.5, form=form, loss=fastntk.SquaredLoss())
        for form in ("primal", "matrix-free")
    )
    for request in ([1, 12], [4]):
        answer = right.forget(request)
        close(answer.parameters, left.forget(request).parameters, 1e-8)
        assert answer.certificate.inexactness < 1e-10


def test_the_stated_residual_is_the_true_one():
    case = CASES["bn+head"]
    model = case.model()
    memory = fastntk.prepare(
        model, case.data(), moved(model), ridge=0.5, form="matrix-free", loss=fastntk.SquaredLoss()
    )
    rows = memory.state.rows(torch.arange(14))
    flat = rows.jacobian.dense().flatten(0, 1)
    rhs = flat.T @ rows.residual.flatten() - 0.5 * memory.state.displacement
    left = rhs - flat.T @ (flat @ memory.state.solution.step) - 0.5 * memory.state.solution.step
    assert memory.state.solution.inexactness() == pytest.approx(float(left.norm() / rhs.norm()), rel=1e-3, abs=1e-12)
    assert memory.state.solution.inexactness() <= matrix_free.TOLERANCE


def test_it_finds_the_ridge_that_the_primal_form_finds(monkeypatch):
    case = CASES["bn+head"]
    model = case.model()
    exact = fastntk.prepare(model, case.data(), moved(model), form="primal", loss=fastntk.SquaredLoss())
    trace = float(exact.state.solution.sums.trace)
    monkeypatch.setattr(Passes, "trace", trace)
    found = fastntk.prepare(model, case.data(), moved(model), form="matrix-free", loss=fastntk.SquaredLoss())
    assert found.ridge == pytest.approx(exact.ridge, rel=1e-6)


def test_the_trace_is_estimated_without_bias():
    operator = Passes(linearised("bn+head"), torch.arange(14))
    draws = torch.tensor([operator.estimated_trace(seed) for seed in range(300)])
    exact = float(kernel(operator.network.rows(range(14))).trace())
    assert float(draws.mean()) == pytest.approx(exact, rel=4 * float(draws.std()) / exact / 300**0.5)


def test_saved_and_loaded_it_goes_on(tmp_path):
    case = CASES["bn+head"]
    model = case.model()
    memory = fastntk.prepare(
        model, case.data(), moved(model), ridge=0.5, form="matrix-free", loss=fastntk.SquaredLoss()
    )
    memory.forget([1])
    memory.save(tmp_path / "m")
    again = fastntk.load(tmp_path / "m", model, memory.state.members.source)
    close(again.preview([2, 6]).parameters, memory.forget([2, 6]).parameters, 1e-12)


def test_shards_cover_every_sample_once(monkeypatch):
    monkeypatch.setattr("fastntk.solve.collect.SHARD", 4)
    assert [list(shard) for shard in shards(10)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
