"""The convex form under cross-entropy, against solves that know nothing of it: all classes, all parameters, float64."""

from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from cases import CASES, Case, LinearInTuned
from memories import LINEAR, close, moved
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from torch.utils.data import Subset, TensorDataset

import fastntk
from fastntk.jacobians.linearised import Linearised, likeliest
from fastntk.jacobians.per_sample import PerSampleJacobian
from fastntk.solve import convex, newton
from fastntk.solve.forms import FORMS
from fastntk.solve.kernel import kernel
from fastntk.solve.solution import Task
from fastntk.tuning.loss import contrasts, kept_of
from fastntk.tuning.losses import CrossEntropy, SquaredLoss
from fastntk.tuning.parameters import snapshot, tuned

RIDGE = 0.3
LOSSES = [CrossEntropy(), CrossEntropy(smoothing=0.1)]


@pytest.fixture(autouse=True)
def tight(monkeypatch):
    monkeypatch.setattr(convex.Convex, "tolerance", 1e-10)


def optimum(dense, logits, labels, u, ridge, loss):
    """``argmin_d sum CE(f + J d) + ridge/2 |d + u|^2`` by a quasi-Newton method over all parameters and classes."""

    def objective(vector):
        d = torch.tensor(vector, requires_grad=True)
        value = len(labels) * loss(logits + dense @ d, labels) + ridge / 2 * (d + u).square().sum()
        value.backward()
        return float(value), d.grad.numpy()

    options = {"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-16, "gtol": 1e-11, "maxcor": 50}
    return torch.tensor(minimize(objective, np.zeros(len(u)), jac=True, method="L-BFGS-B", options=options).x)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["bn+head", "ln+head", "bn"])
def test_it_is_the_optimum_of_the_linearised_network(name, loss):
    case = CASES[name]
    model, data = case.model(), case.data(12)
    network = Linearised(PerSampleJacobian(model, snapshot(tuned(model))), data, loss)
    dense = oracles.jacobian(model, snapshot(tuned(model)), network.layout, data.tensors[0])
    logits, labels = model(data.tensors[0]).detach(), data.tensors[1]
    u = 0.3 * torch.randn(dense.shape[2], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = replace(network, keep=network.classes)
    solution = FORMS["convex"].prepare(Task(kept, 12, u, RIDGE)).solution
    torch.testing.assert_close(solution.step, optimum(dense, logits, labels, u, RIDGE, loss), rtol=1e-6, atol=1e-6)
    gone = torch.tensor([2, 7, 8])
    stay = ~torch.isin(torch.arange(12), gone)
    update = solution.update(kept, gone, -1)
    expected = optimum(dense[stay], logits[stay], labels[stay], u, RIDGE, loss)
    torch.testing.assert_close(solution.step + update.change, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", [*LOSSES, SquaredLoss()])
def test_a_start_is_the_optimum_of_the_loss_s_second_order(loss):
    case = CASES["bn+head"]
    model, data = case.model(), case.data(12)
    network = Linearised(PerSampleJacobian(model, snapshot(tuned(model))), data, loss)
    u = 0.3 * torch.randn(network.layout.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = replace(network, keep=3).rows(range(12))
    dense, point = rows.jacobian.dense(), rows.point
    root, slope = loss.root_of(newton.SOFT * point.z, point.kept), loss.gradient_of(point.z, point.kept)
    hessian = torch.einsum("nkp,nka,nla,nlq->pq", dense, root, root, dense) + RIDGE * torch.eye(len(u)).double()
    expected = -torch.linalg.solve(hessian, torch.einsum("nkp,nk->p", dense, slope) + RIDGE * u)
    everyone = torch.ones(12, dtype=torch.bool)
    problem = newton.DualProblem(loss, point.kept, point.z - rows.jacobian.matvec(u), kernel(rows), RIDGE, everyone)
    a = newton.NewtonMethod().start(problem, point.z)
    torch.testing.assert_close(rows.jacobian.rmatvec(a.view_as(rows.residual)) - u, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", [*LOSSES, SquaredLoss()])
@pytest.mark.parametrize("keep", [2, 3])
def test_alone_is_one_newton_step_without_the_sample(loss, keep):
    case = CASES["bn+head"]
    model, data = case.model(), case.data(12)
    network = Linearised(PerSampleJacobian(model, snapshot(tuned(model))), data, loss)
    u = 0.3 * torch.randn(network.layout.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = replace(network, keep=keep)
    rows, solution = kept.rows(range(12)), FORMS["convex"].prepare(Task(kept, 12, u, RIDGE)).solution
    dense, point = rows.jacobian.dense(), rows.point
    z = point.z + dense @ solution.step
    root, gradient = loss.root_of(z, point.kept), loss.gradient_of(z, point.kept)
    curved = torch.einsum("nkp,nka,nla,nlq->npq", dense, root, root, dense)
    for i in (0, 5, 11):
        without = curved.sum(0) - curved[i] + RIDGE * torch.eye(len(u), dtype=torch.float64)
        change = dense[i] @ torch.linalg.solve(without, dense[i].T @ gradient[i])
        expected = rows.jacobian.combined()[i] @ change
        torch.testing.assert_close(solution.alone(kept, torch.tensor([i]))[0], expected, rtol=1e-6, atol=1e-8)
    together = solution.alone(kept, torch.arange(12))
    torch.testing.assert_close(together[[5]], solution.alone(kept, torch.tensor([5])))


def test_what_comes_to_no_number_is_an_error_and_no_answer():
    case = CASES["bn+head"]
    model, data = case.model(), case.data(12)
    network = replace(Linearised(PerSampleJacobian(model, snapshot(tuned(model))), data, LOSSES[0]), keep=3)
    u = torch.full((network.layout.size,), 0.1, dtype=torch.float64)
    solution = FORMS["convex"].prepare(Task(network, 12, u, RIDGE)).solution
    broken = replace(solution.optimum, start=solution.optimum.start * torch.nan)
    none = r"came to no number|is not positive definite"  # whichever is noticed first
    with pytest.raises(fastntk.InputError, match=none):
        replace(solution, known=broken).update(network, torch.tensor([2]), -1)
    with pytest.raises(fastntk.InputError, match=none):
        solution.resolve(network, torch.tensor([2]), u * torch.nan, RIDGE)


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_full_step_that_goes_too_far_is_not_taken(scale, seed):
    """Samples whose features are all but the same, from a start that is far off."""
    generator, n, c = torch.Generator().manual_seed(seed), 30, 4
    draw = {"generator": generator, "dtype": torch.float64}
    logits, labels = 3 * torch.randn(n, c, **draw), torch.randint(c, (n,), generator=generator)
    features = 1 + 1e-3 * torch.randn(n, 6, **draw)
    kernel = scale * torch.kron(features @ features.T, torch.eye(c - 1, dtype=torch.float64))
    kept = kept_of(LOSSES[1], logits, labels, torch.arange(c).expand(n, c))
    everyone = torch.ones(n, dtype=torch.bool)
    problem = newton.DualProblem(LOSSES[1], kept, logits @ contrasts(c), kernel, 1.5, everyone)
    a, _ = newton.NewtonMethod().minimise(problem, torch.randn(n * (c - 1), **draw), 1e-10)
    assert problem.inexactness(a, problem.logits(a)) < 1e-8


def fitted_linear(count=20, ridge=0.7):
    """Frozen features and the optimum of the head on them, as scikit-learn finds it."""
    model, data = LINEAR.model(), LINEAR.data(count)
    images, labels = data.tensors
    with torch.no_grad():
        features = torch.cat([model.body(images), torch.ones(count, 1, dtype=torch.float64)], 1)

    def retrained(keep):
        fit = LogisticRegression(C=1 / ridge, fit_intercept=False, tol=1e-12, max_iter=10_000)
        found = torch.tensor(fit.fit(features[keep].numpy(), labels[keep].numpy()).coef_)
        return {"head.weight": found[:, :-1], "head.bias": found[:, -1]}

    model.load_state_dict(retrained(list(range(count))), strict=False)
    return model, data, {name: torch.zeros_like(t) for name, t in snapshot(tuned(model)).items()}, retrained


def test_a_linear_model_is_returned_as_retrained_after_many_requests_in_any_order():
    model, data, zero, retrained = fitted_linear()
    left, right = (
        fastntk.prepare(model, data, zero, ridge=0.7, loss=CrossEntropy(), form="convex", classes="all")
        for _ in range(2)
    )
    for memory, requests in ((left, [[3, 11], [0], [19, 5]]), (right, [[5], [19, 0, 11], [3]])):
        gone = []
        for request in requests:
            gone += request
            answer = memory.forget(request)
            assert answer.certificate.departure_requested < 1e-6
            assert answer.certificate.trusted
        close(memory.parameters, retrained([i for i in range(20) if i not in gone]), 1e-6)
    left.remember([11, 5])
    close(left.parameters, retrained([i for i in range(20) if i not in (0, 3, 19)]), 1e-6)


def test_auto_takes_it_for_cross_entropy_and_not_for_squared_loss():
    case = CASES["bn+head"]
    model = case.model()
    assert fastntk.prepare(model, case.data(), moved(model), loss=CrossEntropy()).form == "convex"
    assert fastntk.prepare(model, case.data(), moved(model), loss=SquaredLoss()).form in ("primal", "dual")


def test_it_is_kept_in_a_folder_purged_and_opened(tmp_path):
    case, folder = CASES["bn+head"], tmp_path / "m"
    model, data = case.model(), case.data()
    memory = fastntk.prepare(model, data, moved(model), ridge=0.5, loss=CrossEntropy(smoothing=0.1))
    memory.save(folder)
    for kind, ids in (("forget", [3, 8]), ("remember", [8]), ("forget", [0])):
        answer = getattr(memory, kind)(ids)
        again = fastntk.load(folder, model, data)
        close(again.parameters, answer.parameters, 0)
        close(again.preview([1]).parameters, memory.preview([1]).parameters, 1e-9)
    memory.purge()
    again = fastntk.load(folder, model, data)
    assert again.state.network.loss == CrossEntropy(smoothing=0.1)
    assert again.state.network.keep == memory.state.network.keep
    never = fastntk.prepare(
        model, Subset(data, [i for i in range(14) if i not in (0, 3)]), moved(model), ridge=0.5,
        loss=CrossEntropy(smoothing=0.1), classes=memory.state.network.keep,
    )  # fmt: skip
    torch.testing.assert_close(again.state.solution.step, never.state.solution.step, rtol=1e-6, atol=1e-7)
    gone = again.state.solution.rows
    for place in (0, 3):
        assert not any(tensor[place].any() for name, tensor in gone.tensors().items() if name != "classes")
    fastntk.refresh(memory)
    memory.forget([5])


def test_classes_that_are_kept_are_the_label_and_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 4.0, 3.0, 0.0]])
    assert likeliest(logits, torch.tensor([2, 3]), 3).tolist() == [[2, 1, 3], [3, 0, 1]]
    with pytest.raises(fastntk.InputError, match="label 4 is outside"):
        likeliest(logits, torch.tensor([2, 4]), 3)


WEIGHTED = CrossEntropy(smoothing=0.2, weights=[1.0, 0.5, 2.0, 1.5, 1.0, 3.0])


@pytest.mark.parametrize("loss", [*LOSSES, WEIGHTED, SquaredLoss()])
def test_the_loss_of_some_logits_is_that_of_all_with_the_others_fixed(loss):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 6, generator=generator, dtype=torch.float64) * 2
    labels = torch.tensor([0, 5, 2, 2, 1])
    classes = likeliest(logits, labels, 3)
    kept, z = kept_of(loss, logits, labels, classes), logits.gather(1, classes)
    rows = z.shape[1] - loss.contrasted
    z = (z @ contrasts(3) if loss.contrasted else z).requires_grad_()
    whole = len(labels) * loss(logits.scatter(1, classes, kept.logits(z) if loss.contrasted else z), labels)
    [expected] = torch.autograd.grad(whole, z, create_graph=True)
    torch.testing.assert_close(loss.gradient_of(z, kept), expected)
    [slope] = torch.autograd.grad(loss.value_of(z, kept).sum(), z)
    torch.testing.assert_close(slope, expected)
    hessian = torch.stack([torch.autograd.grad(expected[:, k].sum(), z, retain_graph=True)[0] for k in range(rows)], 1)
    root = loss.root_of(z, kept).detach()
    torch.testing.assert_close(root @ root.mT, hessian)


def test_fewer_classes_leave_out_what_the_tail_says():
    generator = torch.Generator().manual_seed(0)

    class Wide(LinearInTuned):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(5, 12)

    case = Case(Wide, ("head",))
    model = case.model()
    images = case.images(60)
    labels = torch.randint(12, (60,), generator=generator)
    data = TensorDataset(images, labels)
    fastntk.fit(model, data, epochs=30, learning_rate=0.05, loss=CrossEntropy())
    initial = moved(model)
    steps = {
        m: fastntk.prepare(model, data, initial, ridge=1.0, loss=CrossEntropy(), form="convex", classes=m)
        for m in (2, 6, 11, 12)
    }
    exact = steps[12].preview([1, 2, 3]).parameters["head.weight"]
    errors = [float((steps[m].preview([1, 2, 3]).parameters["head.weight"] - exact).norm()) for m in (2, 6, 11)]
    assert errors[0] > errors[1] > errors[2]
    for wrong in (1, 13, "most"):
        with pytest.raises(fastntk.InputError, match="classes must be"):
            fastntk.prepare(model, data, initial, loss=CrossEntropy(), classes=wrong)


def test_smoothing_is_checked():
    for wrong in (-0.1, 1.0):
        with pytest.raises(fastntk.InputError, match="label smoothing must be"):
            CrossEntropy(smoothing=wrong)


def test_what_is_left_of_a_class_that_is_gone_is_noticed():
    """Under a ridge that hardly lets go, the answer still knows a class that nobody is left of."""

    class Blind(torch.utils.data.Dataset):
        """The same samples; their labels are not offered."""

        def __init__(self, data):
            self.data = data

        def __len__(self):
            return len(self.data)

        def __getitem__(self, index):
            return self.data[index]

    case = CASES["bn+head"]
    model, data = case.model(), case.data(20)
    fastntk.fit(model, data, epochs=60, batch_size=5, learning_rate=0.05, loss=CrossEntropy())
    labels, known = data.tensors[1], model(data.tensors[0]).argmax(1)
    best = int(known[known == labels].mode().values)
    gone = (labels == best).nonzero()[:, 0].tolist()
    start = {name: 0.9 * tensor for name, tensor in snapshot(tuned(model)).items()}
    memory = fastntk.prepare(model, data, start, ridge=1e4, loss=CrossEntropy())
    certificate = memory.preview(gone).certificate
    assert certificate.still == 100 * float((known == labels)[gone].double().mean())
    assert certificate.verdict == "exact head needed"
    assert "nobody is left of" in certificate.explanation
    assert not {"still", "salt", "doubt"} & set(certificate.to_ledger())
    assert memory.preview(gone[:-1]).certificate.still == 0
    unknown = fastntk.prepare(model, Blind(data), start, ridge=1e4, loss=CrossEntropy()).preview(gone).certificate
    assert unknown.still is None
    assert "is not known, as the data do not offer all labels" in unknown.explanation
    assert unknown.trusted


def test_departures_are_of_probabilities():
    case = CASES["bn+head"]
    model, data = case.model(), case.data(20)
    memory = fastntk.prepare(model, data, moved(model), ridge=0.3, loss=CrossEntropy(), classes="all")
    answer = memory.preview([3, 8])
    images, state = data.tensors[0][[3, 8]], memory.state
    old = model(images).detach()
    new = torch.func.functional_call(model, answer.parameters, (images,)).detach()
    dense = oracles.jacobian(model, memory.anchor, state.layout, images)
    change = state.layout.flatten(answer.parameters) - state.layout.flatten(memory.anchor)
    foreseen = (old + dense @ change).softmax(1)
    departed = (new.softmax(1) - foreseen).norm() / (foreseen - old.softmax(1)).norm()
    assert answer.certificate.departure_requested == pytest.approx(float(departed), rel=1e-6)
    assert answer.certificate.unit == "probabilities"
    assert answer.certificate.tail == 0
    fewer = fastntk.prepare(model, data, moved(model), ridge=0.3, loss=CrossEntropy(), classes=2)
    left = memory.state.network.loss.residual(old, data.tensors[1][[3, 8]]).abs()
    assert 0 < fewer.preview([3]).certificate.tail < float(left.sum(1).max())
