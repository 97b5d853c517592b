import pytest
import torch
from cases import CASES

import fastntk
from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.per_sample import PerSampleJacobian
from fastntk.jacobians.rows import Rows
from fastntk.solve import ridge
from fastntk.solve.kernel import Stored
from fastntk.solve.ridge import calibrate
from fastntk.solve.sums import Sums
from fastntk.tuning.parameters import snapshot, tuned


def problem(count=12):
    case = CASES["bn+head"]
    model = case.model()
    jacobian = PerSampleJacobian(model, snapshot(tuned(model)))(case.images(count))
    generator = torch.Generator().manual_seed(2)
    residual = torch.randn(jacobian.rest.shape[:2], generator=generator, dtype=torch.float64)
    return Rows(jacobian, residual), 0.5 * torch.randn(jacobian.size, generator=generator, dtype=torch.float64)


def test_both_forms_find_the_same():
    rows, u = problem()
    primal, dual = calibrate(Sums.of(rows.jacobian, rows.residual), u), calibrate(Stored(rows), u)
    assert primal.ridge == pytest.approx(dual.ridge)
    assert primal.mismatch == pytest.approx(dual.mismatch, rel=1e-6)


def test_an_optimal_fit_gives_back_its_ridge():
    """``u = J'r / ridge`` makes the fitted parameters stationary under exactly that ridge."""
    rows, _ = problem()
    dense = rows.jacobian.dense().flatten(0, 1)
    total = 0.05 * float(dense.square().sum()) / len(dense)
    found = calibrate(Stored(rows), dense.T @ rows.residual.flatten() / total)
    assert found.mismatch < 0.01
    assert found.factor == pytest.approx(0.05, rel=0.03)


def test_few_krylov_steps_are_enough_for_a_wide_spectrum(monkeypatch):
    case = CASES["bn+head"]
    model = case.model()
    rows = Linearised(PerSampleJacobian(model, snapshot(tuned(model))), case.data(40)).rows(range(40))
    generator = torch.Generator().manual_seed(2)
    u = 0.5 * torch.randn(rows.jacobian.size, generator=generator, dtype=torch.float64)
    exact = calibrate(Stored(rows), u)
    monkeypatch.setattr(ridge, "STEPS", 25)
    assert calibrate(Stored(rows), u).ridge == pytest.approx(exact.ridge, rel=0.03)


@pytest.mark.parametrize("factor", [0.1, 10.0])
@pytest.mark.parametrize("loss", [fastntk.SquaredLoss(), fastntk.CrossEntropy()], ids=["squared", "cross-entropy"])
def test_the_convex_form_gives_an_optimal_fit_back_its_ridge(loss, factor):
    """Above the kernel's mean diagonal too, where a short fit has hardly moved."""
    case = CASES["bn+head"]
    model, data = case.model(), case.data(12)
    here = snapshot(tuned(model))
    network, (images, labels) = Linearised(PerSampleJacobian(model, here), data), data.tensors
    dense = network.rows(range(12)).jacobian.dense().flatten(0, 1)
    ridge = factor * float(dense.square().sum()) / len(dense)
    residual = loss.residual(model(images).detach(), labels)
    pull = network.layout.unflatten(dense.T @ residual.flatten() / ridge, here)
    initial = {name: tensor - pull[name] for name, tensor in here.items()}
    found = fastntk.prepare(model, data, initial, form="convex", loss=loss, classes="all").calibration
    assert found.mismatch < 0.1
    assert found.factor == pytest.approx(factor, rel=0.8)
