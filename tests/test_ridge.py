import pytest
import torch
from cases import CASES

from fastntk.jacobians.jacobian import PerSampleJacobian
from fastntk.solve import ridge
from fastntk.solve.ridge import calibrate
from fastntk.solve.sums import Rows, Sums
from fastntk.tuning.selectors import snapshot, tuned


def problem(count=12):
    case = CASES["bn+head"]
    model = case.model()
    jacobian = PerSampleJacobian(model, snapshot(tuned(model)))(case.images(count))
    generator = torch.Generator().manual_seed(2)
    residual = torch.randn(jacobian.rest.shape[:2], generator=generator, dtype=torch.float64)
    return Rows(jacobian, residual), 0.5 * torch.randn(jacobian.size, generator=generator, dtype=torch.float64)


def mismatch(rows, u, total):
    """``|J s(D)|`` from a dense solve."""
    dense = rows.jacobian.dense().flatten(0, 1)
    gram = dense.T @ dense + total * torch.eye(len(u), dtype=torch.float64)
    return float((dense @ torch.linalg.solve(gram, dense.T @ rows.residual.flatten() - total * u)).norm())


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_the_ridge_is_the_one_whose_optimum_has_the_networks_outputs(form):
    rows, u = problem()
    found = calibrate(rows if form == "dual" else Sums.of(rows.jacobian, rows.residual), u)
    moved = float(rows.jacobian.matvec(u).norm())
    assert found.mismatch == pytest.approx(mismatch(rows, u, found.ridge) / moved, rel=1e-6)
    for factor in (0.3, 0.8, 1.25, 3.0):
        assert mismatch(rows, u, factor * found.ridge) > found.mismatch * moved
    assert found.factor == pytest.approx(found.ridge / float(rows.kernel().diagonal().mean()))


def test_both_forms_find_the_same():
    rows, u = problem()
    primal, dual = calibrate(Sums.of(rows.jacobian, rows.residual), u), calibrate(rows, u)
    assert primal.ridge == pytest.approx(dual.ridge)
    assert primal.mismatch == pytest.approx(dual.mismatch, rel=1e-6)


def test_an_optimal_fit_gives_back_its_ridge():
    """``u = J'r / ridge`` makes the fitted parameters stationary under exactly that ridge."""
    rows, _ = problem()
    dense = rows.jacobian.dense().flatten(0, 1)
    total = 0.05 * float(dense.square().sum()) / len(dense)
    found = calibrate(rows, dense.T @ rows.residual.flatten() / total)
    assert found.mismatch < 0.01
    assert found.factor == pytest.approx(0.05, rel=0.03)


def test_few_krylov_steps_are_enough_for_a_wide_spectrum(monkeypatch):
    rows, u = problem(40)
    exact = calibrate(rows, u)
    monkeypatch.setattr(ridge, "STEPS", 25)
    assert calibrate(rows, u).ridge == pytest.approx(exact.ridge, rel=0.03)
