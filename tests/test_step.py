"""The laws of the step, against oracles that use neither normal equations nor updates."""

import oracles
import pytest
import torch
from cases import CASES
from fastntk.methods.golatkar import trapezium_factor

import fastntk
from fastntk.jacobians.jacobian import PerSampleJacobian
from fastntk.solve.linalg import add_product_, conjugate_gradients, invert_, lanczos, mirror_, ridge_inverse
from fastntk.solve.primal import DualSolution, PrimalSolution
from fastntk.solve.sums import Rows, Sums, accumulate
from fastntk.tuning.selectors import snapshot, tuned

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


def close(left, right):
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_primal_and_dual_are_the_least_squares_solution(name):
    rows, dense, u = problem(name)
    expected = oracles.anchored_step(dense, rows.residual, u, RIDGE)
    close(PrimalSolution.of(sums_of(rows), u, RIDGE).step, expected)
    close(DualSolution.of(rows, u, RIDGE).step, expected)


@pytest.mark.parametrize(
    "make", [lambda r, u: PrimalSolution.of(sums_of(r), u, RIDGE), lambda r, u: DualSolution.of(r, u, RIDGE)]
)
@pytest.mark.parametrize("name", NAMES)
def test_alone_is_each_sample_leaving_by_itself(name, make):
    rows, dense, u = problem(name)
    solution, everyone = make(rows, u), torch.arange(len(dense))
    expected = torch.stack(
        [dense[i] @ solution.update(torch.tensor([i]), rows.__getitem__, -1).change for i in everyone]
    )
    close(solution.alone(everyone, rows.__getitem__), expected)
    close(solution.alone(everyone[[5, 2]], rows.__getitem__), expected[[5, 2]])


@pytest.mark.parametrize(
    "make", [lambda r, u: PrimalSolution.of(sums_of(r), u, RIDGE), lambda r, u: DualSolution.of(r, u, RIDGE)]
)
@pytest.mark.parametrize("name", NAMES)
def test_leaving_is_solving_without(name, make):
    rows, dense, u = problem(name)
    solution = make(rows, u)
    close(solution.step, oracles.anchored_step(dense, rows.residual, u, RIDGE))
    before, gone = solution.step.clone(), []
    for request in (torch.tensor([4, 7]), torch.tensor([0])):
        untouched = solution.step.clone()
        update = solution.update(request, rows.__getitem__, -1)
        change = update.change
        stated = solution.residual(update)
        assert torch.equal(solution.step, untouched)
        solution.apply_(update)
        assert max(stated, solution.residual()) < 1e-10
        gone += request.tolist()
        keep = torch.tensor([i not in gone for i in range(len(dense))])
        expected = oracles.anchored_step(dense[keep], rows.residual[keep], u, RIDGE)
        close(solution.step, expected)
        before = before + change
        close(before, expected)


@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("name", NAMES)
def test_joining_is_solving_with(name, form):
    rows, dense, u = problem(name)
    part = rows[:6]
    solution = PrimalSolution.of(sums_of(part), u, RIDGE) if form == "primal" else DualSolution.of(part, u, RIDGE)
    for request in (torch.tensor([6, 7]), torch.tensor([8])):
        update = solution.update(request, rows.__getitem__, 1)
        stated = solution.residual(update)
        solution.apply_(update)
        assert max(stated, solution.residual()) < 1e-10
        upto = int(request[-1]) + 1
        close(solution.step, oracles.anchored_step(dense[:upto], rows.residual[:upto], u, RIDGE))
    whole = PrimalSolution.of(sums_of(rows), u, RIDGE) if form == "primal" else DualSolution.of(rows, u, RIDGE)
    for key, tensor in whole.tensors().items():
        close(solution.tensors()[key], tensor)


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_the_residual_is_that_of_the_normal_equations(form):
    rows, dense, u = problem("bn+head")
    solution = PrimalSolution.of(sums_of(rows), u, RIDGE) if form == "primal" else DualSolution.of(rows, u, RIDGE)
    flat = dense.flatten(0, 1)
    if form == "primal":
        solution.step += 1e-3
        rhs = flat.T @ rows.residual.flatten() - RIDGE * u
        left = flat.T @ (flat @ solution.step) + RIDGE * solution.step - rhs
    else:
        solution.coefficients += 1e-3
        rhs = rows.residual.flatten() + flat @ u
        left = flat @ (flat.T @ solution.coefficients) + RIDGE * solution.coefficients - rhs
    assert solution.residual() == pytest.approx(float(left.norm() / rhs.norm()))
    update = solution.update(torch.tensor([2]), rows.__getitem__, -1)
    stated = solution.residual(update)
    solution.apply_(update)
    assert solution.residual() == pytest.approx(stated, rel=1e-6)
    assert solution.anew().residual() < 1e-12


@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("ridge", [0.01, RIDGE, 7.0])
def test_resolving_at_another_ridge_is_solving_without(form, ridge):
    rows, dense, u = problem("bn+head")
    solution = PrimalSolution.of(sums_of(rows), u, RIDGE) if form == "primal" else DualSolution.of(rows, u, RIDGE)
    for request in (torch.tensor([2, 5, 6]), torch.tensor([], dtype=torch.long)):
        keep = ~torch.isin(torch.arange(len(dense)), request)
        expected = oracles.anchored_step(dense[keep], rows.residual[keep], 0 * u, ridge)
        close(solution.resolve(request, rows.__getitem__, 0 * u, ridge), expected)


def test_dual_leaves_nothing_of_the_forgotten_behind():
    rows, _, u = problem("bn+head")
    solution = DualSolution.of(Rows(rows.jacobian[:], rows.residual.clone()), u, RIDGE)
    solution.apply_(solution.update(torch.tensor([3]), rows.__getitem__, -1))
    assert not solution.rows.jacobian.dense()[3].any()
    assert not solution.rows.residual[3].any()
    for square in (solution.kernel, solution.inverse):
        assert not square[9:12].any()
        assert not square[:, 9:12].any()


@pytest.mark.parametrize("name", ["bn+head", "bn"])
def test_two_solves_of_the_published_step_are_pmv(name):
    rows, dense, u = problem(name)
    forget = torch.tensor([1, 6])
    keep = ~torch.isin(torch.arange(len(dense)), forget)
    two_solves = DualSolution.of(rows[keep], 0 * u, RIDGE).step - DualSolution.of(rows, 0 * u, RIDGE).step
    close(two_solves, oracles.projected_step(dense, rows.residual, forget, RIDGE))


def test_anchor_is_what_sets_the_steps_apart():
    rows, _, u = problem("bn+head")
    assert not torch.allclose(DualSolution.of(rows, u, RIDGE).step, DualSolution.of(rows, 0 * u, RIDGE).step, rtol=1e-3)


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
    close(rows.kernel(), flat @ flat.T)
    close((rows[:2] + rows[2:]).kernel(), flat @ flat.T)
    assert rows.trace == pytest.approx(float(flat.square().sum()))


@pytest.mark.parametrize("size", [3, 513, 1500])
def test_inverses_in_place(size):
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(size, size // 2, generator=generator, dtype=torch.float64)
    matrix = factor @ factor.T + 0.1 * torch.eye(size, dtype=torch.float64)
    expected = torch.linalg.inv(matrix)
    lower = matrix.tril()
    torch.testing.assert_close(invert_(lower), expected, rtol=1e-8, atol=1e-8)
    assert torch.equal(lower, lower.T)
    matrix[-1, -1] = -1
    with pytest.raises(fastntk.InputError, match="not positive definite"):
        invert_(matrix)


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
