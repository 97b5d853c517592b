"""The step as it was published, sums and kernels, and the linear algebra beneath; forms are in test_contracts."""

import oracles
import pytest
import torch
from cases import CASES

import fastntk
from fastntk.evidence.methods.golatkar import trapezium_factor
from fastntk.jacobians.per_sample import PerSampleJacobian
from fastntk.jacobians.rows import Rows
from fastntk.solve.dual import Dual
from fastntk.solve.kernel import Stored, kernel
from fastntk.solve.linalg import add_product_, conjugate_gradients, lanczos, mirror_, ridge_inverse
from fastntk.solve.sums import Sums, accumulate
from fastntk.tuning.parameters import snapshot, tuned

RIDGE = 0.3
NAMES = ["bn+head", "head", "bn", "bias"]


def problem(name, count=9):
    """Rows of a case's data, its dense Jacobian, and a displacement."""
    case = CASES[name]
    model = case.model()
    data = case.data(count)
    jacobian = PerSampleJacobian(model, snapshot(tuned(model)))(data.tensors[0])
    generator = torch.Generator().manual_seed(3)
    residual = torch.randn(jacobian.rest.shape[:2], generator=generator, dtype=torch.float64)
    displacement = torch.randn(jacobian.size, generator=generator, dtype=torch.float64)
    return Rows(jacobian, residual), jacobian.dense(), displacement


def sums_of(rows):
    return Sums.of(rows.jacobian, rows.residual)


def dual_step(rows, u):
    return Dual(rows, fastntk.SquaredLoss(), u, RIDGE, torch.arange(len(rows))).step


def close(left, right):
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["bn+head", "bn"])
def test_two_solves_of_the_published_step_are_pmv(name):
    rows, dense, u = problem(name)
    forget = torch.tensor([1, 6])
    keep = ~torch.isin(torch.arange(len(dense)), forget)
    two_solves = dual_step(rows[keep], 0 * u) - dual_step(rows, 0 * u)
    close(two_solves, oracles.projected_step(dense, rows.residual, forget, RIDGE))


def test_anchor_is_what_sets_the_steps_apart():
    rows, _, u = problem("bn+head")
    assert not torch.allclose(dual_step(rows, u), dual_step(rows, 0 * u), rtol=1e-3)


def test_trapezium_factor_by_hand():
    step, error = torch.tensor([3.0, 4.0]), torch.tensor([1.0, -2.0])
    assert trapezium_factor(step, error) == pytest.approx(1 + 2 * 5 / 25)


@pytest.mark.parametrize("name", NAMES)
def test_sums_are_the_dense_ones_and_a_group(name):
    rows, dense, _ = problem(name)
    flat = dense.flatten(0, 1)
    whole = sums_of(rows)
    close(whole.gram(), flat.T @ flat)
    close(whole.rhs, flat.T @ rows.residual.flatten())
    close(whole.matvec(whole.rhs), whole.gram() @ whole.rhs)
    assert whole.trace == pytest.approx(float(flat.square().sum()))
    assert int(whole.count) == len(dense)
    order = torch.tensor([8, 2, 0, 5, 1, 7, 3, 6, 4])
    for parts in ([[0, 3], [3, 9]], [[0, 1], [1, 2], [2, 9]]):
        batches = [rows[order[a:b]] for a, b in parts]
        shuffled = accumulate(((b.jacobian, b.residual) for b in batches), Sums.zero(rows.jacobian)).complete_()
        close(shuffled.gram(), whole.gram())
        close(shuffled.square, whole.square)
    close((whole - sums_of(rows[:4])).gram(), sums_of(rows[4:]).gram())


@pytest.mark.parametrize("name", NAMES)
def test_kernel_is_the_dense_one(name):
    rows, dense, _ = problem(name)
    flat = dense.flatten(0, 1)
    close(kernel(rows), flat @ flat.T)
    close(kernel(rows[:2] + rows[2:]), flat @ flat.T)
    assert Stored(rows).trace == pytest.approx(float(flat.square().sum()))


@pytest.mark.parametrize("size", [3, 513, 1500])
def test_inverses(size):
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(size, size // 2, generator=generator, dtype=torch.float64)
    matrix = factor @ factor.T + 0.1 * torch.eye(size, dtype=torch.float64)
    expected = torch.linalg.inv(matrix)
    inverse = ridge_inverse(matrix.tril() - 0.1 * torch.eye(size, dtype=torch.float64), 0.1)
    torch.testing.assert_close(inverse, expected, rtol=1e-8, atol=1e-8)
    assert torch.equal(inverse, inverse.T)
    matrix[-1, -1] = -1
    with pytest.raises(fastntk.InputError, match="not positive definite"):
        ridge_inverse(matrix, 0.1)


@pytest.mark.parametrize("size", [1, 2048, 2500])
def test_symmetric_products_across_blocks(size):
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    matrix = torch.eye(size, dtype=torch.float64)
    mirror_(add_product_(matrix, factor, factor * weight, sign=-1))
    close(matrix, torch.eye(size, dtype=torch.float64) - factor * weight @ factor.T)


def spectrum(size=40):
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(-3, 2, size, dtype=torch.float64)
    return basis * values @ basis.T, torch.randn(size, generator=generator, dtype=torch.float64)


def test_krylov_methods_are_the_dense_solves():
    matrix, start = spectrum()
    inverse = ridge_inverse(matrix, 0.1)
    close(inverse @ (matrix + 0.1 * torch.eye(40, dtype=torch.float64)), torch.eye(40, dtype=torch.float64))
    solved = conjugate_gradients(lambda v: matrix @ v + 0.1 * v, start, lambda v: v)
    torch.testing.assert_close(solved, inverse @ start, rtol=1e-8, atol=1e-9)
    basis, small = lanczos(lambda v: matrix @ v, start, 40)
    close(basis.T @ basis, torch.eye(40, dtype=torch.float64))
    close(basis.T @ matrix @ basis, small)
    first = start.norm() * torch.eye(40, dtype=torch.float64)[0]
    torch.testing.assert_close(basis @ (ridge_inverse(small, 0.1) @ first), inverse @ start)
