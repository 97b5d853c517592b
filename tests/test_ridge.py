import pytest
import torch
from cases import CASES

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
