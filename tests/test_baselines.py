"""What each baseline's paper says, written out on a case small enough to check.

The batches hold everything, so that a step is an epoch and the order does not matter.
"""

import copy
from dataclasses import replace

import oracles
import pytest
import torch
from cases import CASES
from fastntk.methods import (
    BadTeacher,
    Dampening,
    Delete,
    FineTune,
    FisherForgetting,
    Golatkar,
    GradientAscent,
    HeadAlone,
    Newton,
    Problem,
    RandomLabel,
    Scrub,
)
from test_methods import dense, problem
from torch.func import functional_call

import fastntk
from fastntk.evidence.methods.descent import descend
from fastntk.evidence.methods.random_label import salient
from fastntk.evidence.metrics.predictions import divergence
from fastntk.inputs.batches import labels_of
from fastntk.tuning.parameters import tuned
from fastntk.tuning.recipe import Recipe

RATE = 1e-3
PARTS = "retain", "forget"


@pytest.fixture
def given():
    whole = problem()
    return replace(whole, recipe=replace(whole.recipe, batch_size=100))


def data(given, part):
    keep = torch.isin(torch.arange(20), given.positions)
    images, labels = given.memory.state.members.source.tensors
    chosen = {"forget": keep, "retain": ~keep, "all": keep | True}[part]
    return images[chosen], labels[chosen]


def squared(logits, labels):
    """``mean 1/2 |f - 10 (onehot - 1/3)|^2``."""
    targets = 10 * (torch.nn.functional.one_hot(labels, 3).double() - 1 / 3)
    return ((logits - targets) ** 2).sum(1).mean() / 2


def kl(left, right, temperature):
    """``mean_i sum_c p_ic log(p_ic / q_ic)``."""
    p, q = ((logits / temperature).exp() for logits in (left, right))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    return (p * (p / q).log()).sum(1).mean()


def taken(given, method, steps):
    """The losses of a method's steps while the model stays where it is."""
    losses = [float(loss) for loss in method.losses(given, given.model)]
    assert len(losses) == steps
    return losses


def test_divergence_is_that_of_the_softmax():
    left, right = torch.randn(2, 7, 4, dtype=torch.float64)
    torch.testing.assert_close(divergence(left, right, 3.0), kl(left, right, 3.0))
    assert float(divergence(left, left)) == 0


def test_descending_is_adam_along_every_loss(given):
    images, labels = data(given, "forget")
    model = copy.deepcopy(given.model)
    optimiser = torch.optim.Adam(tuned(model).values(), lr=RATE)
    for _ in range(3):
        optimiser.zero_grad()
        (-squared(model(images), labels)).backward()
        optimiser.step()
    done = GradientAscent(share=1.0, rate=1.0)(given)
    for name, tensor in tuned(model).items():
        torch.testing.assert_close(done.parameters[name], tensor.detach())


def test_a_mask_holds_parameters(given):
    mask = {name: torch.zeros_like(tensor) for name, tensor in given.memory.anchor.items()}
    mask["head.bias"][1] = 1
    moved = descend(given, FineTune(share=2 / 3).losses, RATE, mask).parameters
    for name, tensor in given.memory.anchor.items():
        assert torch.equal(moved[name] != tensor, mask[name] == 1)


def test_fine_tuning_fits_what_is_retained(given):
    images, labels = data(given, "retain")
    expected = float(squared(given.model(images), labels))
    assert taken(given, FineTune(share=2 / 3), 2) == pytest.approx([expected] * 2)
    size = sum(float(tensor.abs().sum()) for tensor in tuned(given.model).values())
    sparse = taken(given, FineTune(share=4 / 3, sparsity=0.1), 4)
    assert sparse == pytest.approx([expected + 0.1 * (1 - step / 4) * size for step in range(4)])


def test_ascent_climbs_the_forgotten_samples_loss(given):
    retain, forget = (float(squared(given.model(images), y)) for images, y in (data(given, p) for p in PARTS))
    assert taken(given, GradientAscent(share=2 / 3), 2) == pytest.approx([-forget] * 2)
    both = taken(given, GradientAscent(retained_share=0.8, share=2 / 3), 2)
    assert both == pytest.approx([0.8 * retain - 0.2 * forget] * 2)


def test_an_epoch_of_negative_gradient_is_one_over_the_retained(given):
    given = replace(given, recipe=replace(given.recipe, batch_size=5))
    assert len(taken(given, GradientAscent(retained_share=0.5, share=2 / 3), 8)) == 8
    assert len(taken(given, GradientAscent(share=1.0), 3)) == 3


def test_random_labels_are_wrong_for_the_forgotten_alone(given):
    method = RandomLabel(share=1 / 3)
    before, after = labels_of(given.train), method.relabelled(given).labels
    assert torch.equal((before != after).nonzero()[:, 0], given.positions)
    drawn = {int(RandomLabel(seed=seed).relabelled(given).labels[2]) for seed in range(20)}
    assert drawn == {0, 1, 2} - {int(before[2])}
    expected = float(squared(given.model(given.memory.state.members.source.tensors[0]), after))
    assert taken(given, method, 1) == pytest.approx([expected])


def test_saliency_moves_the_parameters_with_the_largest_gradients(given):
    images, labels = data(given, "forget")
    gradients = torch.autograd.grad(squared(given.model(images), labels), list(tuned(given.model).values()))
    flat = torch.cat([gradient.abs().flatten() for gradient in gradients])
    chosen = torch.cat([each.flatten() for each in salient(given, 0.25).values()])
    assert int(chosen.sum()) == round(0.25 * len(flat))
    assert flat[chosen == 1].min() >= flat[chosen == 0].max()
    moved = RandomLabel(saliency=0.25, share=1 / 3)(given).parameters
    change = torch.cat([(moved[name] - tensor).flatten() for name, tensor in given.memory.anchor.items()])
    assert torch.equal(change != 0, chosen == 1)


def test_scrub_turns_from_the_teacher_and_back(given):
    student = copy.deepcopy(given.model)
    with torch.no_grad():
        student.head.weight.mul_(0.7)
    logits = {}
    for part in PARTS:
        images, labels = data(given, part)
        logits[part] = given.model(images), student(images), labels
    away = -16 * kl(*logits["forget"][:2], 4.0)
    near = 0.3 * 16 * kl(*logits["retain"][:2], 4.0) + 0.9 * squared(*logits["retain"][1:])
    method = Scrub(teaching=0.3, fitting=0.9, share=1.0)
    losses = [float(loss) for loss in method.losses(given, student)]
    assert losses == pytest.approx([float(each) for each in (near, away, near, away, near)])


def test_bad_teaching_takes_the_unfitted_model_for_what_goes(given):
    student = copy.deepcopy(given.model)
    with torch.no_grad():
        student.head.weight.mul_(0.7)
    images, _ = data(given, "all")
    good, bad = given.model(images), functional_call(given.model, dict(given.initial), (images,))
    teacher = good.clone()
    teacher[given.positions] = bad[given.positions]
    losses = [float(loss) for loss in BadTeacher(retained_share=1.0, share=2 / 3).losses(given, student)]
    assert losses == pytest.approx([float(kl(teacher, student(images), 1.0))] * 2)
    some = BadTeacher(retained_share=0.3).marked(given)
    assert sorted(int(some[place][1]) for place in range(len(some))) == [0] * 5 + [1] * 3


def test_fisher_forgetting_adds_noise_of_the_fourth_root(given):
    jacobian, _, _, keep, moved = dense(given)
    information = (jacobian[keep] ** 2).sum(1).mean(0)
    draw = torch.randn(information.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = 0.02 * draw / (information + 0.1 * information.mean()) ** 0.25
    torch.testing.assert_close(moved(FisherForgetting(0.02, 0.1, seed=4)(given)), expected)
    noisy, plain = (moved(Golatkar(0.02, noise=noise, seed=4)(given)) for noise in (0.02, 0.0))
    unfloored = 0.02 * draw / (information + 1e-6 * information.mean()) ** 0.25
    torch.testing.assert_close(noisy - plain, unfloored)


@pytest.mark.parametrize("method", [FisherForgetting(seed=4), Golatkar(noise=1e-3, seed=4)], ids=["fisher", "golatkar"])
def test_noise_leaves_nothing_of_the_row_of_a_class_that_goes(given, method):
    layout, labels = given.memory.state.layout, labels_of(given.train)
    whole = replace(given, forget=[i for i in range(20) if labels[i] == 1])
    before, after = (layout.flatten(each) for each in (given.memory.anchor, method(whole).parameters))
    row = layout.head_of(after)[1]
    draw = torch.Generator().manual_seed(5)
    torch.testing.assert_close(row, 0.01 * torch.randn((1, len(row)), generator=draw)[0].double())
    plain = before if isinstance(method, FisherForgetting) else layout.flatten(Golatkar()(whole).parameters)
    torch.testing.assert_close(layout.head_of(after)[0], layout.head_of(plain)[0], rtol=0, atol=0.2)


def test_climbing_takes_cross_entropy_where_it_is_asked_for(given):
    images, labels = data(given, "forget")
    expected = -float(torch.nn.functional.cross_entropy(given.model(images), labels))
    assert taken(given, GradientAscent(climbed="cross-entropy"), 1) == pytest.approx([expected])
    with pytest.raises(fastntk.InputError, match="'fit' or 'cross-entropy', not 'hinge'"):
        GradientAscent(climbed="hinge")


def test_wrong_labels_are_drawn_anew_for_every_epoch(given):
    drawn = [RandomLabel().relabelled(given, epoch).labels[given.places].tolist() for epoch in range(12)]
    assert len({tuple(each) for each in drawn}) > 2


def test_deleting_distils_what_is_left_without_the_right_class(given):
    student = copy.deepcopy(given.model)
    with torch.no_grad():
        student.head.weight.mul_(0.7)
    images, labels = data(given, "forget")
    q = given.model(images).softmax(1).scatter(1, labels[:, None], 0.0)
    q = q / q.sum(1, keepdim=True)
    p = student(images).log_softmax(1)
    expected = float(((q * (q.clamp_min(1e-300).log() - p)).sum(1)).mean())
    losses = [float(loss) for loss in Delete(share=2 / 3).losses(given, student)]
    assert losses == pytest.approx([expected] * 2)


def test_the_head_alone_leaves_the_body_as_it_is(given):
    done, anchor = HeadAlone()(given).parameters, given.memory.anchor
    moved = [name for name, tensor in done.items() if not torch.equal(tensor, anchor[name])]
    assert moved == ["head.weight", "head.bias"]
    again = fastntk.finished(given.memory, anchor, exact_head=True, without=given.forget)
    assert all(torch.equal(tensor, again[name]) for name, tensor in done.items())


def test_dampening_shrinks_what_the_forgotten_need_most(given):
    jacobian, residual, _, _, moved = dense(given)
    gradients = torch.einsum("ncp,nc->np", jacobian, residual)
    everything, forgotten = (gradients**2).mean(0), (gradients[given.positions] ** 2).mean(0)
    layout = given.memory.state.network.layout
    before = layout.flatten(given.memory.anchor)
    expected = torch.zeros_like(before)
    for j in range(len(before)):
        if forgotten[j] > 0.18 * 20 / 3 * everything[j]:
            expected[j] = before[j] * (min(0.9 * everything[j] / forgotten[j], 1) - 1)
    assert 0 < int((expected != 0).sum()) < len(before)
    torch.testing.assert_close(moved(Dampening(0.18, 0.9)(given)), expected)


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_newton_takes_the_fit_for_optimal(form):
    given = problem(form)
    jacobian, residual, _, keep, moved = dense(given)
    rows, errors = jacobian[keep].flatten(0, 1), jacobian[~keep].flatten(0, 1).T @ residual[~keep].flatten()
    matrix = rows.T @ rows + 0.6 * torch.eye(rows.shape[1], dtype=torch.float64)
    torch.testing.assert_close(moved(Newton()(given)), -torch.linalg.solve(matrix, errors), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("form", ["convex", "convex-disk", "layerwise"])
def test_newton_s_step_has_all_classes_whatever_rows_the_memory_has(form):
    loss = fastntk.CrossEntropy(smoothing=0.1)
    case, recipe = CASES["bn+head"], Recipe(epochs=3, batch_size=5, loss=loss)
    model, data = case.model(), case.data(20)
    fit = fastntk.fit(model, data, recipe)
    memory = fastntk.prepare(model, data, fit.initial, ridge=0.6, form=form, loss=loss, classes=2)
    given = Problem(memory, [2, 9, 15], recipe)
    jacobian, residual, _, keep, moved = dense(given)
    p = model(data.tensors[0]).detach().softmax(1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    matrix = torch.einsum("ncp,ncd,ndq->pq", jacobian[keep], curvature[keep], jacobian[keep])
    matrix.diagonal().add_(0.6)
    expected = -torch.linalg.solve(matrix, torch.einsum("ncp,nc->p", jacobian[~keep], residual[~keep]))
    torch.testing.assert_close(moved(Newton()(given)), expected, rtol=1e-4, atol=1e-6 * float(expected.norm()))
    nobody = moved(Newton()(replace(given, forget=[])))
    assert float(nobody.norm()) == 0


def test_newton_is_our_step_where_the_fit_is_optimal():
    given = problem("dual")
    jacobian, residual, *_, moved = dense(given)
    stationary = torch.einsum("ncp,nc->p", jacobian, residual) / 0.6  # u of an optimum with this residual
    keep = ~torch.isin(torch.arange(20), given.positions)
    ours = oracles.anchored_step(jacobian[keep], residual[keep], stationary, 0.6)
    assert float(oracles.anchored_step(jacobian, residual, stationary, 0.6).norm()) < 1e-9
    torch.testing.assert_close(moved(Newton()(given)), ours, rtol=1e-7, atol=1e-9)
