"""Cross-entropy by the generalised Gauss-Newton matrix, and the iteration that it needs."""

from dataclasses import replace

import oracles
import pytest
import torch
from cases import CASES, Case, LinearInTuned
from fastntk.methods import FastNTK, Iterated, Problem
from torch.func import functional_call

import fastntk
from fastntk.evidence.auditing import left_out
from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.numerics import Numerics
from fastntk.jacobians.per_sample import PerSampleJacobian
from fastntk.jacobians.products import gram
from fastntk.solve.sums import Sums
from fastntk.tuning.parameters import snapshot, tuned
from fastntk.tuning.recipe import Recipe

LOSS = fastntk.CrossEntropy()


def hessians(logits):
    p = logits.softmax(1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def fitted(case, loss=LOSS, form="auto", count=20, ridge=0.6):
    model, data = case.model(), case.data(count)
    recipe = Recipe(epochs=3, batch_size=5, loss=loss)
    done = fastntk.fit(model, data, recipe)
    memory = fastntk.prepare(model, data, done.initial, ridge=ridge, form=form, loss=loss)
    return Problem(memory, [2, 9, 15], recipe)


def test_the_root_and_what_it_takes_to_the_gradient():
    logits, labels = 3 * torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 4
    root, residual = LOSS.root(logits), LOSS.residual(logits, labels)
    torch.testing.assert_close(root @ root.mT, hessians(logits))
    torch.testing.assert_close((root @ LOSS.whitened(residual, logits)[..., None])[..., 0], residual)
    free = logits.clone().requires_grad_()
    [gradient] = torch.autograd.grad(LOSS(free, labels) * len(labels), free)
    torch.testing.assert_close(residual, -gradient)
    with pytest.raises(fastntk.InputError, match="label 4 is outside"):
        LOSS(logits, labels + 1)


@pytest.mark.parametrize("name", ["bn+head", "everything", "ln+head"])
@pytest.mark.parametrize("probed", [False, True])
def test_rows_sum_to_the_gauss_newton_matrix_and_the_gradient(name, probed):
    case = CASES[name]
    model, data = case.model(), case.data()
    network = PerSampleJacobian(model, snapshot(tuned(model)))
    linearised = Linearised(network, data, LOSS, Numerics(class_probes=3 if probed else None))
    rows = linearised.rows(range(14))
    jacobian = oracles.jacobian(model, snapshot(tuned(model)), linearised.layout, data.tensors[0])
    logits = model(data.tensors[0]).detach()
    curved = jacobian.mT @ hessians(logits) @ jacobian
    sums = Sums.of(rows.jacobian, rows.residual)
    vector = torch.randn(linearised.layout.size, dtype=torch.float64)
    torch.testing.assert_close(sums.matvec(vector), curved.sum(0) @ vector)
    torch.testing.assert_close(gram(linearised, range(14), vector), curved.sum(0) @ vector)
    downhill = torch.einsum("ncp,nc->p", jacobian, LOSS.residual(logits, data.tensors[1]))
    torch.testing.assert_close(sums.rhs, downhill)
    torch.testing.assert_close(rows.residual, linearised.residuals(range(14)))


def test_all_forms_answer_alike():
    answers = [FastNTK()(fitted(CASES["bn+head"], form=form)) for form in ("primal", "dual", "matrix-free")]
    for name, tensor in answers[0].parameters.items():
        for other in answers[1:]:
            torch.testing.assert_close(tensor, other.parameters[name], rtol=1e-3, atol=1e-5)


def test_a_memory_of_it_is_found_again(tmp_path):
    given = fitted(CASES["bn+head"])
    given.memory.save(tmp_path / "memory")
    memory = fastntk.load(tmp_path / "memory", given.model, given.train)
    assert memory.state.network.loss == LOSS
    expected = FastNTK()(given).parameters
    again = memory.forget([2, 9, 15])
    for name, tensor in expected.items():
        torch.testing.assert_close(again.parameters[name], tensor)


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_members_left_out_are_what_forgetting_each_alone_predicts(form):
    given = fitted(Case(LinearInTuned, ("head",)), form=form)
    images = given.memory.state.members.source.tensors[0]
    found = left_out(given.memory.state, torch.tensor([4, 7]))
    for place, i in enumerate((4, 7)):
        answer = given.memory.preview([i]).parameters
        logits = functional_call(given.model, answer, (images[i : i + 1],))[0].detach()
        torch.testing.assert_close(found[place] - found[place].mean(), logits - logits.mean())


def test_in_the_convex_form_they_are_so_up_to_the_second_order():
    memory = fitted(Case(LinearInTuned, ("head",)), form="convex").memory
    places = torch.arange(20)
    images = memory.state.members.source.tensors[0]
    before = memory.model(images).detach()
    predicted = (left_out(memory.state, places) - before).softmax(1)
    exact = torch.stack(
        [functional_call(memory.model, memory.preview([i]).parameters, (images[i : i + 1],))[0] for i in range(20)]
    ).detach()
    changed = (exact - before).softmax(1)
    assert (predicted - changed).norm() < 0.1 * (changed - 1 / 3).norm()


def optimum(given, keep):
    """Of the summed loss with the pull toward the initial parameters, by many steps of L-BFGS."""
    images, labels = (tensor[keep] for tensor in given.memory.state.members.source.tensors)
    free = {name: tensor.clone().requires_grad_() for name, tensor in given.initial.items()}
    settings = {"tolerance_grad": 1e-12, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    optimiser = torch.optim.LBFGS(free.values(), max_iter=2000, **settings)

    def objective():
        optimiser.zero_grad()
        pull = sum((free[name] - given.initial[name]).square().sum() for name in free) / 2
        loss = given.recipe.loss(functional_call(given.model, free, (images,)), labels) * len(labels) + 0.6 * pull
        loss.backward()
        return loss

    optimiser.step(objective)
    return {name: tensor.detach() for name, tensor in free.items()}


@pytest.mark.parametrize(("form", "at_once"), [("primal", False), ("dual", False), ("convex", True)])
def test_where_the_model_is_linear_the_iteration_is_retraining_and_the_convex_form_at_once(form, at_once):
    given = fitted(Case(LinearInTuned, ("head",)), form=form)
    everyone = torch.arange(20)
    given.model.load_state_dict(optimum(given, everyone), strict=False)
    memory = fastntk.prepare(
        given.model, given.memory.state.members.source, given.initial, ridge=0.6, form=form, loss=LOSS
    )
    given = replace(given, memory=memory)
    retrained = optimum(given, everyone[~torch.isin(everyone, given.positions)])
    single, several = FastNTK()(given).parameters, Iterated(steps=60, tolerance=1e-12)(given)

    def error(parameters):
        return max(float((parameters[name] - tensor).abs().max()) for name, tensor in retrained.items())

    assert error(several.parameters) < 1e-7
    assert (error(single) < 1e-7) == at_once
    assert at_once or error(single) > 1e-4
    assert "short enough" in several.note


def test_on_squared_loss_of_a_linear_model_the_first_step_is_all():
    given = fitted(Case(LinearInTuned, ("head",)), loss=fastntk.SquaredLoss())
    done = Iterated()(given)
    assert done.note.startswith("0 steps after the first")
    for name, tensor in FastNTK()(given).parameters.items():
        torch.testing.assert_close(done.parameters[name], tensor)


def test_the_iteration_ends_where_its_step_vanishes():
    given = fitted(CASES["bn+head"], form="primal", ridge=30.0)
    done = Iterated(steps=100, tolerance=1e-9)(given)
    assert "short enough" in done.note
    memory, layout = given.memory, given.memory.state.network.layout
    keep = given.staying
    images, labels = (tensor[keep] for tensor in given.memory.state.members.source.tensors)
    free = {name: tensor.clone().requires_grad_() for name, tensor in done.parameters.items()}
    pull = sum((free[name] - given.initial[name]).square().sum() for name in free) / 2
    objective = given.recipe.loss(functional_call(given.model, free, (images,)), labels) * len(labels) + 30.0 * pull
    objective.backward()
    gradient = layout.flatten({name: tensor.grad for name, tensor in free.items()})
    short = memory.state.solution.step
    offset = gram(memory.state.network, keep.tolist(), short) + 30.0 * short
    torch.testing.assert_close(gradient, -offset, rtol=1e-5, atol=1e-6)
