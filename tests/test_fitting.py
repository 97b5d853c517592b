"""Fitting as people do it: optimisers, decay, augmentation, validation, soft labels; and starts that are rebuilt."""

import json
import math

import oracles
import pytest
import torch
from cases import CASES, linear
from torch import nn
from torch.utils.data import TensorDataset

import fastntk
from fastntk.inputs.augmentations import augmented
from fastntk.inputs.batches import labels_of
from fastntk.tuning.frozen import check_frozen
from fastntk.tuning.losses import CrossEntropy, SquaredLoss
from fastntk.tuning.parameters import snapshot, tuned
from fastntk.tuning.recipe import Recipe


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.3)),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.3)),
    ],
)
def test_it_is_torchs_optimiser_with_decay_toward_zero(name, made):
    model, data = linear()
    expected, _ = linear()
    optimiser, steps = made(expected.parameters()), 3
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / steps)) / 2
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(expected(data.tensors[0]), data.tensors[1], label_smoothing=0.1).backward()
        optimiser.step()
    recipe = Recipe(
        epochs=3, batch_size=12, learning_rate=0.05, weight_decay=0.3, optimizer=name, decay_toward="zero",
        loss=CrossEntropy(smoothing=0.1),
    )  # fmt: skip
    done = fastntk.fit(model, data, recipe)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected.get_parameter(name), rtol=1e-5, atol=1e-6)
    assert done.shrinkage == recipe.shrinkage(12) < 1


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_what_the_data_say_nothing_of_ends_where_the_shrinkage_says(optimizer):
    """A pixel that is always 0 has no gradient: decay alone moves its weights."""
    model, data = linear()
    data.tensors[0][:, :, 0, 0] = 0
    done = fastntk.fit(
        model, data, epochs=4, batch_size=5, learning_rate=0.05, weight_decay=0.4, optimizer=optimizer,
        decay_toward="zero",
    )  # fmt: skip
    column = model[1].weight.detach()[:, 0]
    torch.testing.assert_close(column, done.shrinkage * done.initial["1.weight"][:, 0])
    assert 0 < done.shrinkage < 0.99


def test_a_pull_toward_zero_makes_ridge_regression_toward_the_shrunk_start():
    """Linear model, squared loss: the answer is the anchored difference of regressions toward ``s theta_0``."""
    case = CASES["bn+head"]
    model, data = case.model(), case.data(20)
    initial = {n: 0.5 + t for n, t in snapshot(tuned(model)).items()}
    memory = fastntk.prepare(model, data, initial, ridge=0.6, shrinkage=0.8, loss=fastntk.SquaredLoss())
    layout = memory.state.layout
    jacobian = oracles.jacobian(model, memory.anchor, layout, data.tensors[0])
    residual = SquaredLoss().residual(model(data.tensors[0]).detach(), data.tensors[1])
    u = layout.flatten(memory.anchor) - 0.8 * layout.flatten(initial)
    stay = torch.tensor([i not in (3, 7) for i in range(20)])
    expected = oracles.anchored_step(jacobian[stay], residual[stay], u, 0.6)
    expected = expected - oracles.anchored_step(jacobian, residual, u, 0.6)
    moved = layout.flatten(memory.forget([3, 7]).parameters) - layout.flatten(memory.anchor)
    torch.testing.assert_close(moved, expected, rtol=1e-7, atol=1e-9)
    for name, tensor in memory.state.initial.items():
        torch.testing.assert_close(tensor, initial[name])
    with pytest.raises(fastntk.InputError, match="above 0 and at most 1"):
        fastntk.prepare(model, data, initial, shrinkage=1.5)


def test_shrinkage_of_a_loop_is_the_product_of_its_steps():
    assert fastntk.shrinkage([0.1, 0.2], 0.5) == pytest.approx(0.95 * 0.9)
    assert fastntk.shrinkage([], 0.5) == 1
    with pytest.raises(fastntk.InputError, match="would leave"):
        fastntk.shrinkage([1.0], 2.0)


def test_an_augmentation_depends_on_the_image_and_its_seed_alone():
    images = torch.randn(4, 3, 16, 16)
    together = augmented(images, ("flip", "crop"), [5, 6, 7, 8])
    alone = augmented(images[2:3], ("flip", "crop"), [7])
    assert torch.equal(together[2:3], alone)
    assert not torch.equal(together, augmented(images, ("flip", "crop"), [1, 2, 3, 4]))
    before = torch.get_rng_state()
    flipped = augmented(images, ("flip",), range(4))
    assert torch.equal(before, torch.get_rng_state())
    kinds = [torch.equal(f, i) or torch.equal(f, i.flip(2)) for f, i in zip(flipped, images, strict=True)]
    assert all(kinds)
    assert augmented(images, (), range(4)) is images


def test_views_are_forgotten_together_and_the_same_every_time():
    case = CASES["bn+head"]
    model, data = case.model(), case.data(8)
    views = fastntk.Views(data, ["flip"], 3, seed=2)
    assert len(views) == 24
    assert torch.equal(views[3][0], data[1][0])
    assert all(torch.equal(views[i][0], views[i][0]) for i in range(6))
    assert labels_of(views).tolist() == labels_of(data).repeat_interleave(3).tolist()
    start = {n: t + 0.1 for n, t in snapshot(tuned(model)).items()}
    memory = fastntk.prepare(model, views, start, ridge=0.5, loss=CrossEntropy())
    assert memory.forget(views.of([3, 5])).certificate.samples == 6
    assert not {"3/0", "5/2"} & set(memory.ids)
    for wrong, message in (({"count": 0}, "at least 1"), ({"names": ["spin"]}, "no augmentation")):
        with pytest.raises(fastntk.InputError, match=message):
            fastntk.Views(data, **{"names": ["flip"], **wrong})


def test_a_fit_on_augmented_images_is_repeated_by_its_seed():
    found = []
    for seed in (0, 0, 1):
        model, data = CASES["bn+head"].model(), CASES["bn+head"].data(12)
        fastntk.fit(model, data, epochs=2, batch_size=5, augment=["flip"], seed=seed)
        found.append(snapshot(tuned(model)))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(not torch.equal(found[0][name], found[2][name]) for name in found[0])


def test_accuracies_of_training_and_validation():
    model, data = linear(30)
    for image, label in zip(*data.tensors, strict=True):
        image[0, 0] += 5 * torch.eye(3)[label]
    done = fastntk.fit(model, data, epochs=20, batch_size=6, learning_rate=0.1, validation=data)
    assert len(done.accuracies) == len(done.validation) == 20
    right = (model(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean()
    assert done.validation[-1] == pytest.approx(100 * float(right))
    assert done.validation[-1] > 95


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("one of adam, adamw, sgd", {"optimizer": "lion"}),
        ("toward start or zero", {"decay_toward": "one"}),
        ("Take adamw", {"decay_toward": "zero"}),
        ("no augmentation 'spin'", {"augment": ["spin"]}),
    ],
)
def test_a_recipe_that_cannot_be_followed(message, changes):
    with pytest.raises(fastntk.InputError, match=message):
        Recipe(**changes)


@pytest.mark.parametrize("loss", [CrossEntropy(smoothing=0.1), SquaredLoss()])
def test_soft_labels_that_name_one_class_are_that_class(loss):
    case = CASES["bn+head"]
    hard = case.data(14)
    soft = TensorDataset(hard.tensors[0], torch.nn.functional.one_hot(hard.tensors[1], 3).double())
    answers = []
    for data in (hard, soft):
        model = case.model()
        start = {n: t + 0.1 for n, t in snapshot(tuned(model)).items()}
        memory = fastntk.prepare(model, data, start, ridge=0.5, loss=loss, form="convex", classes=2)
        answers.append(memory.forget([1, 5]).parameters)
    for name, tensor in answers[0].items():
        torch.testing.assert_close(answers[1][name], tensor)
    assert torch.equal(labels_of(soft), labels_of(hard))
    with pytest.raises(fastntk.InputError, match="add up to 1"):
        loss(torch.zeros(2, 3), torch.ones(2, 3))


def test_class_weights_are_torchs_and_need_the_convex_form():
    loss, logits, labels = CrossEntropy(0.1, [1.0, 2.0, 0.5]), torch.randn(7, 3), torch.arange(7) % 3
    expected = torch.nn.functional.cross_entropy(
        logits, labels, torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.1, reduction="sum"
    )
    torch.testing.assert_close(7 * loss(logits, labels), expected)
    model, data = CASES["bn+head"].model(), CASES["bn+head"].data(12)
    with pytest.raises(fastntk.InputError, match="need the convex form"):
        fastntk.plan(model, data, loss=loss, form="dual")
    assert fastntk.plan(model, data, loss=loss).form == "convex"
    for wrong, message in (([1.0, -1.0, 1.0], "positive"), ([1.0, 1.0], "2 weights, and the model 3")):
        with pytest.raises(fastntk.InputError, match=message):
            CrossEntropy(weights=wrong)(logits, labels)


def test_a_rebuilt_start_is_the_pretrained_one_but_for_the_head():
    model, data = CASES["bn+head"].model(), CASES["bn+head"].data(12)
    pretrained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fastntk.fit(model, data, epochs=2)
    now = snapshot(tuned(model))
    for head, expected in (("zero", 0 * now["head.weight"]), ("fitted", now["head.weight"])):
        found = fastntk.rebuilt_start(model, pretrained, head=head)
        assert set(found.initial) == set(now)
        assert torch.equal(found.initial["head.weight"], expected)
        others = [name for name in now if not name.startswith("head.")]
        assert all(torch.equal(found.initial[name], pretrained[name]) for name in others)
        assert len(found.assumed) == 2
        fastntk.prepare(model, data, found.initial)
    del pretrained[others[0]]
    with pytest.raises(fastntk.InputError, match="is not in them"):
        fastntk.rebuilt_start(model, pretrained)
    with pytest.raises(fastntk.InputError, match="zero or fitted"):
        fastntk.rebuilt_start(model, pretrained, head="drawn")


def test_a_rebuilt_start_is_none_where_more_was_trained_than_is_tuned(caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    fastntk.tune(model, "bn", "head")
    pretrained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rounded = {name: tensor.half() for name, tensor in pretrained.items()}
    assert not [said for said in fastntk.rebuilt_start(model, rounded).assumed if "not trained" in said]
    with pytest.raises(fastntk.InputError, match=r"'0.bias' has moved"):  # of one training, where nothing rounds
        check_frozen(model, {name: tensor.float() for name, tensor in rounded.items()}, "")
    tuned_alone = fastntk.rebuilt_start(model, {name: pretrained[name] for name in tuned(model)})
    assert "'0.weight' was not trained (2 such, not tuned, and not in these weights)" in tuned_alone.assumed
    assert "moved" not in caplog.text
    model[1].running_mean.add_(1)
    fastntk.rebuilt_start(model, pretrained)
    assert "1.running_mean moved with the training (1 such)" in caplog.text
    with torch.no_grad():
        model[0].bias[2] *= 1 + 1e-3
    with pytest.raises(fastntk.InputError, match=r"'0.bias' has moved, and is not selected .* Select everything"):
        fastntk.rebuilt_start(model, pretrained)
    model.load_state_dict(pretrained)
    fastntk.tune(model, "bn")
    with pytest.raises(fastntk.InputError, match=r"'3.bias' has moved, and is not selected to be tuned \(2 such\)"):
        fastntk.rebuilt_start(model, {**pretrained, "3.weight": torch.zeros(9, 4 * 36), "3.bias": torch.zeros(9)})


def test_loras_rebuilt_start_has_no_product():
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fastntk.tune(model, r"lora:2:^1$", "head")
    with torch.no_grad():
        for parameter in tuned(model).values():
            parameter.add_(0.1)
    found = fastntk.rebuilt_start(model, weights)
    assert any(".lora_A." in name for name in found.initial)
    for name, tensor in found.initial.items():
        assert tensor.any() == (".lora_A." in name)
    assert json.dumps(found.assumed)
