import pytest
import torch
from cases import CASES

from fastntk import ridge
from fastntk.jacobian import PerSampleJacobian
from fastntk.plan import choose_form, price
from fastntk.ridge import calibrate
from fastntk.statistics import Rows, Sums
from fastntk.tunable import snapshot, tuned


def problem(count=12):
    case = CASES["bn+head"]
    model = case.model()
    jacobian = PerSampleJacobian(model, snapshot(tuned(model)))(case.images(count))
    generator = torch.Generator().manual_seed(2)
    residual = torch.randn(jacobian.logits.shape, generator=generator, dtype=torch.float64)
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
    monkeypatch.setattr(ridge, "_STEPS", 25)
    assert calibrate(rows, u).ridge == pytest.approx(exact.ridge, rel=0.03)


def test_the_cheaper_form_is_chosen():
    assert choose_form(100_000, 10, 10_000, 0, int(1e12)).form == "primal"
    assert choose_form(500, 10, 50_000, 0, int(1e12)).form == "dual"


def test_the_form_that_fits_is_chosen():
    primal = price("primal", 3_000, 10, 20_000, 0)
    dual = price("dual", 3_000, 10, 20_000, 0)
    assert primal.operations < dual.operations
    assert primal.bytes < dual.bytes
    assert choose_form(3_000, 10, 35_000, 0, 10**12).form == "dual"
    assert choose_form(200_000, 10, 35_000, 0, 40 * 10**9).form == "primal"


def test_what_does_not_fit_says_what_to_do():
    from fastntk import InputError

    message = r"100,000 tuned.*90,000 samples.*primal form 320\.0 GB and the dual form .* 8\.0 GB are free.*Tune fewer"
    with pytest.raises(InputError, match=message):
        choose_form(90_000, 10, 100_000, 0, 8 * 10**9)
    with pytest.raises(InputError, match=r"would be needed"):
        choose_form(100, 10, 100_000, 0, 8 * 10**9, "primal")
