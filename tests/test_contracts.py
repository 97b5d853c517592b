"""The contracts of ``fastntk.solve``: every Gram operator and every form inherits the tests of its own, against oracles
that use neither normal equations nor updates."""

import copy
from dataclasses import replace
from functools import cache

import oracles
import pytest
import torch
from cases import CASES

import fastntk
from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.per_sample import PerSampleJacobian
from fastntk.solve import convex, iterative, layers, on_disk, reading, speeds
from fastntk.solve.forms import FORMS
from fastntk.solve.gram import Krylov
from fastntk.solve.head import convex_shortfall
from fastntk.solve.kernel import Stored
from fastntk.solve.passes import Passes
from fastntk.solve.prices import Workload
from fastntk.solve.ridge import calibrate
from fastntk.solve.solution import Task
from fastntk.solve.speeds import Speeds
from fastntk.solve.sums import Sums
from fastntk.tuning.parameters import snapshot, tuned

RIDGE = 0.3
NAMES = ["bn+head", "head", "bn", "bias"]


@cache
def linearised(name):
    case = CASES[name]
    model = case.model()
    return Linearised(PerSampleJacobian(model, snapshot(tuned(model))), case.data(9))


@cache
def of_all(name):
    return linearised(name).rows(range(9))


class Contract:
    """A problem, written out, that operators and forms are given and leave as it is."""

    @pytest.fixture(params=NAMES)
    def name(self, request):
        return request.param

    @pytest.fixture
    def network(self, name):
        return linearised(name)

    @pytest.fixture
    def rows(self, name):
        return of_all(name)

    @pytest.fixture
    def dense(self, rows):
        return rows.jacobian.dense()

    @pytest.fixture
    def u(self, rows):
        generator = torch.Generator().manual_seed(3)
        return torch.randn(rows.jacobian.size, generator=generator, dtype=torch.float64)

    def close(self, left, right, tolerance=1e-9):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


class GramContract(Contract):
    """What ``fastntk.solve.gram.Gram`` says."""

    exact_trace = True

    def operator(self, network, positions):
        """Over the samples at some positions."""
        raise NotImplementedError

    def test_it_is_the_gram_matrix(self, network, rows, dense, u):
        for positions in ([0, 3, 7, 8], list(range(9))):
            gram, flat = self.operator(network, positions), dense[positions].flatten(0, 1)
            self.close(gram.matvec(u), flat.T @ (flat @ u))
            self.close(gram.rhs, flat.T @ rows.residual[positions].flatten())
            assert (gram.count, gram.outputs) == (len(positions), 3)
            if self.exact_trace:
                assert gram.trace == pytest.approx(float(flat.square().sum()))
            assert gram.trace > 0

    def test_its_spectrum_gives_the_outputs_at_every_ridge(self, network, rows, dense, u):
        spectrum = Krylov.of(self.operator(network, range(9)), u, 200).spectrum
        flat, ridges = dense.flatten(0, 1), torch.tensor([0.01, RIDGE, 7.0], dtype=torch.float64)
        for total, found in zip(ridges, spectrum.outputs(ridges), strict=True):
            step = oracles.anchored_step(dense, rows.residual, u, float(total))
            assert float(found) == pytest.approx(float((flat @ step).square().sum()), rel=1e-6)
        assert float(spectrum.square) == pytest.approx(float((flat @ u).square().sum()))

    def test_the_ridge_is_the_one_whose_optimum_has_the_networks_outputs(self, network, rows, dense, u):
        u = 0.5 * u
        found, flat = calibrate(self.operator(network, range(9)), u), dense.flatten(0, 1)

        def mismatch(total):
            return float((flat @ oracles.anchored_step(dense, rows.residual, u, total)).norm())

        assert found.mismatch == pytest.approx(mismatch(found.ridge) / float((flat @ u).norm()), rel=1e-5)
        scale = float(flat.square().sum()) / len(flat)
        if self.exact_trace:
            assert found.factor == pytest.approx(found.ridge / scale)
        if 2e-4 < found.factor < 50:  # not at an end of what is tried
            for factor in (0.8, 1.25):
                assert mismatch(factor * found.ridge) > mismatch(found.ridge)


class TestSums(GramContract):
    def operator(self, network, positions):
        rows = network.rows(list(positions))
        return Sums.of(rows.jacobian, rows.residual)


class TestKernel(GramContract):
    def operator(self, network, positions):
        return Stored(network.rows(list(positions)))


class TestPasses(GramContract):
    exact_trace = False

    def operator(self, network, positions):
        return Passes(network, torch.tensor(positions))


class SolutionContract(Contract):
    """What ``fastntk.solve.solution.Solution`` says."""

    form = ""
    direct = hands_over = leaves_out = True

    def task(self, network, u, total=RIDGE, count=9):
        return Task(self.adapted(network), count, u, total)

    def adapted(self, network):
        return replace(network, keep=network.classes) if FORMS[self.form].likeliest else network

    def solved(self, network, u, total=RIDGE, count=9):
        return FORMS[self.form].prepare(self.task(network, u, total, count)).solution

    def updated(self, solution, network, positions, sign):
        network = self.adapted(network)
        rows = network.rows(positions.tolist()) if solution.reads(sign) else None
        return solution.update(network, positions, sign, rows)

    def test_it_is_the_least_squares_solution(self, network, rows, dense, u):
        solution = self.solved(network, u)
        self.close(solution.step, oracles.anchored_step(dense, rows.residual, u, RIDGE))
        assert (solution.name, solution.ridge, solution.over.tolist()) == (self.form, RIDGE, list(range(9)))
        assert torch.equal(solution.displacement, u)
        assert solution.inexactness() <= solution.limit

    def test_preparing_gives_the_residuals_and_finds_the_ridge(self, network, rows, u):
        given = FORMS[self.form].prepare(self.task(network, u))
        assert given.calibration is None
        self.close(given.residuals, self.adapted(network).rows(range(9)).residual)
        found = FORMS[self.form].prepare(self.task(network, u, None))
        assert found.solution.ridge == found.calibration.ridge

    def test_leaving_is_solving_without(self, network, rows, dense, u):
        solution = self.solved(network, u)
        before, gone = solution.step.clone(), []
        for request in (torch.tensor([4, 7]), torch.tensor([0])):
            untouched = solution.step.clone()
            update = self.updated(solution, network, request, -1)
            stated = solution.inexactness(update)
            assert torch.equal(solution.step, untouched)
            change, solution = update.change, solution.apply(update)
            assert max(stated, solution.inexactness()) < 1e-10
            gone += request.tolist()
            keep = torch.tensor([i not in gone for i in range(len(dense))])
            assert solution.over.tolist() == keep.nonzero()[:, 0].tolist()
            expected = oracles.anchored_step(dense[keep], rows.residual[keep], u, RIDGE)
            self.close(solution.step, expected)
            before = before + change
            self.close(before, expected)

    def test_joining_is_solving_with(self, network, rows, dense, u):
        solution = self.solved(network, u, count=6)
        for request in (torch.tensor([6, 7]), torch.tensor([8])):
            update = self.updated(solution, network, request, 1)
            stated, solution = solution.inexactness(update), solution.apply(update)
            assert max(stated, solution.inexactness()) < 1e-10
            upto = int(request[-1]) + 1
            assert solution.over.tolist() == list(range(upto))
            self.close(solution.step, oracles.anchored_step(dense[:upto], rows.residual[:upto], u, RIDGE))
        for key, tensor in self.solved(network, u).ready().tensors().items() if self.direct else ():
            self.close(solution.tensors()[key], tensor, 1e-6 if key == "factor" else 1e-9)

    def test_who_leaves_and_joins_again_changes_nothing(self, network, u):
        solution = self.solved(network, u)
        step = solution.step.clone()
        for sign in (-1, 1):
            solution = solution.apply(self.updated(solution, network, torch.tensor([2, 8]), sign))
        self.close(solution.step, step)

    def test_who_joined_since_the_factor_was_made_can_leave_again(self, network, u):
        solution = self.solved(network, u, 1e-6).ready()
        for sign in (-1, 1):
            solution = solution.apply(self.updated(solution, network, torch.tensor([2]), sign))
            solution = solution.ready() if sign < 0 else solution
        step = solution.step.clone()
        for sign in (-1, 1):
            solution = solution.apply(self.updated(solution, network, torch.tensor([2]), sign))
        self.close(solution.step, step, 1e-4)

    @pytest.mark.parametrize("total", [1e-3, 1e-5])
    def test_resolving_at_a_much_smaller_ridge_is_solving_without(self, network, rows, dense, u, total):
        if not self.direct:
            return
        solution, keep = self.solved(network, u), torch.arange(len(dense)) != 4
        expected = oracles.anchored_step(dense[keep], rows.residual[keep], 0 * u, total)
        self.close(solution.resolve(network, torch.tensor([4]), 0 * u, total), expected, 1e-4)

    def test_a_solution_of_the_past_answers_rightly_or_not_at_all(self, network, u):
        past = self.solved(network, u)
        step = past.step.clone()
        past.apply(self.updated(past, network, torch.tensor([3]), -1))
        assert past.over.tolist() == list(range(9))
        nobody = torch.tensor([], dtype=torch.long)
        if not self.hands_over:
            self.close(past.step, step)
            self.close(past.resolve(network, nobody, u, RIDGE), step)
            return
        with pytest.raises(fastntk.InputError, match="taken this solution's matrices over"):
            past.resolve(network, nobody, u, RIDGE)
        with pytest.raises(fastntk.InputError, match="taken this solution's matrices over"):
            self.updated(past, network, torch.tensor([5]), -1)

    def test_what_shares_its_matrices_does_not_survive_it_either(self, network, u):
        past = self.solved(network, u)
        step, fresh = past.step.clone(), past.anew(network)
        fresh.apply(self.updated(fresh, network, torch.tensor([3]), -1))
        for each in (past, fresh):
            if self.direct:
                with pytest.raises(fastntk.InputError, match="taken this solution's matrices over"):
                    each.inexactness()
            else:
                self.close(each.step, step)

    def test_a_copy_is_another_solution(self, network, u):
        solution = self.solved(network, u)
        copied = copy.deepcopy(solution)
        solution = solution.apply(self.updated(solution, network, torch.tensor([3]), -1))
        copied = copied.apply(self.updated(copied, network, torch.tensor([3]), -1))
        assert torch.equal(solution.step, copied.step)

    def test_solved_anew_it_is_the_same_and_exact(self, network, u):
        solution = self.solved(network, u)
        solution = solution.apply(self.updated(solution, network, torch.tensor([2]), -1))
        fresh = solution.anew(network)
        self.close(fresh.step, solution.step)
        assert fresh.inexactness() < 1e-11
        assert fresh.over.tolist() == solution.over.tolist()

    @pytest.mark.parametrize("total", [0.01, RIDGE, 7.0])
    def test_resolving_at_another_ridge_is_solving_without(self, network, rows, dense, u, total):
        solution = self.solved(network, u)
        for request in (torch.tensor([2, 5, 6]), torch.tensor([], dtype=torch.long)):
            keep = ~torch.isin(torch.arange(len(dense)), request)
            expected = oracles.anchored_step(dense[keep], rows.residual[keep], 0 * u, total)
            self.close(solution.resolve(network, request, 0 * u, total), expected, 1e-7)

    def test_alone_is_each_sample_leaving_by_itself(self, network, dense, u):
        solution, everyone = self.solved(network, u), torch.arange(len(dense))
        if not self.leaves_out:
            with pytest.raises(fastntk.InputError, match="one by one"):
                solution.alone(network, everyone)
            return
        expected = torch.stack(
            [dense[i] @ self.updated(solution, network, torch.tensor([i]), -1).change for i in everyone]
        )
        self.close(solution.alone(network, everyone), expected)
        self.close(solution.alone(network, everyone[[5, 2]]), expected[[5, 2]])

    def test_the_heads_shortfall_is_that_of_ridge_regression(self, network, rows, u):
        if not network.layout.head:
            return
        found = self.solved(network, u).head_shortfall(network.layout)
        features, start = rows.jacobian.features, -network.layout.head_of(u)
        assert (found is None) == (
            self.form in ("matrix-free", "convex", "convex-disk", "layerwise")
        )  # which takes a pass
        head = network.layout.head_of(network.layout.flatten(network.jacobian.parameters))
        found = convex_shortfall(network, range(len(rows)), head + start, RIDGE) if found is None else found
        self.close(found, oracles.retrained_head(features, rows.residual, start, RIDGE))

    def test_stored_and_restored_it_is_the_same(self, network, u):
        for solution in (self.solved(network, u), self.solved(network, u).ready()):
            tensors = {name: tensor.clone() for name, tensor in solution.tensors().items()}
            again = FORMS[self.form].restore(tensors, solution.ridge)
            assert again.over.tolist() == solution.over.tolist()
            assert torch.equal(again.step, solution.step)
            left, right = (self.updated(each, network, torch.tensor([1, 5]), -1).change for each in (solution, again))
            assert torch.equal(left, right)

    def test_it_says_what_preparing_takes(self, network, monkeypatch):
        monkeypatch.setattr(speeds, "_TRIAL", 256)
        work = Workload.of(network)
        price, timing = FORMS[self.form].price(work), FORMS[self.form].timing(work, Speeds(network, 64))
        assert price.form == self.form
        assert price.bytes > 0
        assert timing.operations > 0
        assert all(seconds >= 0 for seconds in timing.seconds.values())


class TestPrimal(SolutionContract):
    form = "primal"

    def test_the_inexactness_is_that_of_the_normal_equations(self, network, rows, dense, u):
        solution, flat = self.solved(network, u), dense.flatten(0, 1)
        off = replace(solution, step=solution.step + 1e-3)
        rhs = flat.T @ rows.residual.flatten() - RIDGE * u
        left = flat.T @ (flat @ off.step) + RIDGE * off.step - rhs
        assert off.inexactness() == pytest.approx(float(left.norm() / rhs.norm()))
        self.stated_is_true(off, network)

    def stated_is_true(self, solution, network):
        update = self.updated(solution, network, torch.tensor([2]), -1)
        stated = solution.inexactness(update)
        assert solution.apply(update).inexactness() == pytest.approx(stated, rel=1e-6)


class TestDual(SolutionContract):
    form = "dual"

    def test_the_inexactness_is_that_of_the_normal_equations(self, network, rows, dense, u):
        solution, flat = self.solved(network, u), dense.flatten(0, 1)
        a = solution.optimum.coefficients + 1e-3
        off = replace(solution, known=replace(solution.optimum, coefficients=a))
        left = flat.T @ (flat @ (flat.T @ a) + RIDGE * a - rows.residual.flatten() - flat @ u)
        assert off.inexactness() == pytest.approx(float(left.norm() / (RIDGE * flat.T @ a).norm()))

    def test_nothing_of_the_forgotten_is_left_behind(self, network, u):
        solution = self.solved(network, u)
        solution = solution.apply(self.updated(solution, network, torch.tensor([3]), -1))
        assert not solution.rows.jacobian.dense()[3].any()
        assert not solution.rows.residual[3].any()
        square = solution.optimum.kernel
        assert not square[9:12].any()
        assert not square[:, 9:12].any()
        again = solution.tensors()["factor"]  # made anew
        assert torch.equal(again[9:12].nonzero()[:, 1], torch.arange(9, 12))
        assert torch.equal(again[:, 9:12].nonzero()[:, 0], torch.arange(9, 12))


class TestIterative(SolutionContract):
    form = "matrix-free"
    direct = hands_over = leaves_out = False

    @pytest.fixture(autouse=True)
    def tight(self, monkeypatch):
        monkeypatch.setattr(iterative, "TOLERANCE", 1e-12)


class TestOnDisk(SolutionContract):
    form = "convex-disk"
    direct = leaves_out = False

    @pytest.fixture(autouse=True)
    def tight(self, monkeypatch):
        monkeypatch.setattr(reading, "TOLERANCE", 1e-12)
        monkeypatch.setattr(on_disk, "SAMPLED", 12)


class TestConvex(SolutionContract):
    """With squared loss and all classes it is the other forms."""

    form = "convex"
    direct = False

    @pytest.fixture(autouse=True)
    def tight(self, monkeypatch):
        monkeypatch.setattr(convex.Convex, "tolerance", 1e-12)


class TestLayerwise(TestConvex):
    form = "layerwise"

    @pytest.fixture(autouse=True)
    def in_groups(self, monkeypatch):
        monkeypatch.setattr(layers, "HELD", 2000)


def test_every_form_has_its_contract_tested():
    kinds = [*SolutionContract.__subclasses__(), *TestConvex.__subclasses__()]
    tested = {kind.form for kind in kinds}
    assert tested == set(FORMS)
