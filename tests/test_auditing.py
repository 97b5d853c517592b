"""An audit: what it compares, what the verdict makes of it, and what it leaves alone."""

import copy
import json
from dataclasses import replace
from itertools import product
from math import prod

import pytest
import torch
from cases import CASES
from fastntk.methods import Problem, Retrain
from memories import LINEAR, close, moved, prepared
from torch.func import functional_call
from torch.utils.data import TensorDataset

import fastntk
from fastntk.evidence.auditing import left_out
from fastntk.memory.audit import Audit, accuracy_doubt
from fastntk.tuning.outputs import margins
from fastntk.tuning.parameters import snapshot, tuned
from fastntk.tuning.recipe import Recipe

IDS = [2, 9, 11]


def around(parameters, seed, size):
    """Parameters some way off, another way for each seed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + size * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        for name, tensor in parameters.items()
    }


def near(memory, size=1e-3, offset=0.0):
    """A retraining that arrives at the memory's own answer, up to what the seed makes of it and an offset."""
    answer = memory.preview(IDS).parameters
    return lambda data, seed: {name: each + offset for name, each in around(answer, seed, size).items()}


def test_it_compares_the_answer_with_two_retrained_models():
    memory = prepared()
    images, labels = (part[IDS] for part in memory.state.members.source.tensors)
    fit = near(memory, 0.1)
    models = [*(fit(None, seed) for seed in (1, 2)), memory.preview(IDS).parameters]
    one, other, ours = (functional_call(memory.model, each, (images,)).detach() for each in models)

    def distance(left, right):
        return sum(((a - b) ** 2).sum() for a, b in zip(left, right, strict=True)).div(len(left)).sqrt().item()

    done = fastntk.audit(memory, fit, ids=IDS)
    assert done.samples == 3
    assert done.floor == pytest.approx(distance(one, other))
    assert done.distances == pytest.approx((distance(ours, one), distance(ours, other)))
    accuracies = [100 * (each.argmax(1) == labels).double().mean().item() for each in (one, other, ours)]
    assert (*done.retrained, done.accuracy) == pytest.approx(accuracies)
    right = [each.argmax(1) == labels for each in (one, other, ours)]
    differ = ((right[2] != right[0]).sum() + (right[2] != right[1]).sum()) / 2
    assert done.deviation == pytest.approx(100 * differ.sqrt().item() / 3)
    assert done.ratio == pytest.approx(sum(done.distances) / 2 / done.floor)
    assert done.gap == pytest.approx(accuracies[2] - (accuracies[0] + accuracies[1]) / 2)
    certificate = memory.preview(IDS).certificate
    assert done.departures == pytest.approx((certificate.departure_requested, certificate.departure_retained))


def test_it_retrains_without_the_samples_and_changes_nothing():
    memory, seen = prepared(), []
    before, state = memory.parameters, copy.deepcopy(memory.model.state_dict())
    memory.forget([4])
    fit = near(memory)

    def remembering(data, seed):
        seen.append((sorted(memory.ids[index] for index in range(len(memory.ids))), len(data), seed))
        return fit(data, seed)

    after = memory.parameters
    fastntk.audit(memory, remembering, ids=IDS)
    everyone = [index for index in range(14) if index != 4]
    assert seen == [(everyone, len(everyone) - 3, 1), (everyone, len(everyone) - 3, 2)]
    close(memory.parameters, after, 0)
    assert any(not torch.equal(after[name], before[name]) for name in after)
    assert all(torch.equal(tensor, state[name]) for name, tensor in memory.model.state_dict().items())


def test_a_recipe_fits_as_the_method_retrain_does():
    case, recipe = CASES["bn+head"], Recipe(epochs=2, batch_size=5, seed=3, loss=fastntk.SquaredLoss())
    model, data = case.model(), case.data(20)
    done = fastntk.fit(model, data, recipe)
    memory = fastntk.prepare(model, data, done.initial, ridge=0.6, loss=fastntk.SquaredLoss())
    problem = Problem(memory, IDS, recipe)
    stored = {number: Retrain(3 + number)(problem).parameters for number in (1, 2)}
    by_recipe = fastntk.audit(memory, recipe, ids=IDS)
    by_hand = fastntk.audit(memory, lambda data, seed: stored[seed], ids=IDS)
    assert by_recipe.distances == pytest.approx(by_hand.distances)
    assert by_recipe.floor == pytest.approx(by_hand.floor)


def test_a_share_is_drawn_by_its_seed():
    memory, drawn = prepared(), []
    preview = memory.preview

    def watched(ids, **options):
        drawn.append(list(ids))
        return preview(drawn[-1], **options)

    fit = near(memory)
    memory.preview = watched
    for seed in (0, 0, 1):
        assert fastntk.audit(memory, fit, fraction=0.3, seed=seed).samples == 4
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("accuracy", "retrained", "deviation", "distance", "passed"),
    [
        (50.0, (48.0, 47.0), 1.0, 1.5, True),
        (50.0, (48.0, 47.0), 1.0, 1.51, False),
        (54.0, (50.0, 50.0), 1.0, 1.0, True),
        (45.9, (50.0, 50.0), 1.0, 1.0, False),
        (57.0, (54.0, 46.0), 1.0, 1.0, True),
        (59.0, (54.0, 46.0), 1.0, 1.0, False),
        (55.8, (50.0, 50.0), 3.0, 1.0, True),
        (55.9, (50.0, 50.0), 3.0, 1.0, False),
    ],
)
def test_limits(accuracy, retrained, deviation, distance, passed):
    done = Audit(
        100,
        accuracy,
        retrained,
        deviation,
        (distance + 0.1, distance - 0.1),
        1.0,
        (0.2, 0.1),
        1.1,
        accuracy,
        (1.0, 1.0),
        60.0,
    )
    assert done.passed is passed
    assert Audit.from_dict(json.loads(json.dumps(done.to_dict()))) == done


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_left_out_is_what_forgetting_each_alone_predicts(form):
    memory = prepared(form=form)
    for request in ([], [4, 12]):
        memory.forget(request)
        places = torch.tensor([1, 2, 7])
        layout = memory.state.network.layout
        dense, logits = (
            memory.state.rows(places).jacobian.dense(),
            memory.model(memory.state.members.source.tensors[0][places]).detach(),
        )
        expected = [
            logits[k] + dense[k] @ (layout.flatten(memory.preview([i]).parameters) - layout.flatten(memory.anchor))
            for k, i in enumerate(places.tolist())
        ]
        torch.testing.assert_close(left_out(memory.state, places), torch.stack(expected), rtol=1e-8, atol=1e-8)


def test_left_out_and_unseen_samples_should_be_classified_alike():
    memory = prepared()
    memory.forget([4])
    images, labels = CASES["bn+head"].images(9, seed=8), torch.arange(9) % 3
    done = fastntk.audit(memory, near(memory), ids=IDS, held_out=TensorDataset(images, labels))
    everyone = torch.tensor([place for place in range(14) if place != 4])
    right = left_out(memory.state, everyone).argmax(1) == memory.state.members.source.tensors[1][everyone]
    unseen = functional_call(memory.model, memory.parameters, (images,)).argmax(1) == labels
    assert done.left_out == pytest.approx(100 * right.double().mean().item())
    assert done.unseen == pytest.approx(100 * unseen.double().mean().item())
    assert f"unseen ones in {done.unseen:.1f} %" in str(done)
    assert done.compared == (13, 9)
    matched = Audit(
        100, 50.0, (50.0, 50.0), 1.0, (1.0, 1.0), 1.0, (0.2, 0.1), 1.1, 50.0, (1.0, 1.0), 60.0, 83.0, 80.0, (9000, 9000)
    )
    assert matched.passed
    assert not replace(matched, left_out=83.1).passed
    assert not replace(matched, left_out=76.9).passed
    few = replace(matched, left_out=70.0, unseen=60.0, compared=(200, 200))
    assert few.allowed_unseen == pytest.approx(1.96 * (70 * 30 / 200 + 60 * 40 / 200) ** 0.5)
    assert not few.passed
    assert replace(few, left_out=69.0).passed


def test_left_out_needs_a_stored_solution():
    memory = prepared(form="matrix-free")
    with pytest.raises(fastntk.InputError, match="one by one in the matrix-free form"):
        left_out(memory.state, torch.tensor([1]))
    with pytest.raises(fastntk.InputError, match="one by one in the matrix-free form"):  # before it retrains
        fastntk.audit(memory, lambda data, seed: pytest.fail("it has retrained"), held_out=LINEAR.data(9, seed=5))


def test_the_verdict_heeds_it():
    model = LINEAR.model()
    memory = fastntk.prepare(model, LINEAR.data(), moved(model), ridge=0.5, loss=fastntk.SquaredLoss())
    assert memory.preview(IDS).certificate.trusted
    assert "no audit" in memory.preview(IDS).certificate.explanation
    fastntk.audit(memory, near(memory), ids=IDS)
    certificate = memory.preview([1]).certificate
    assert certificate.trusted
    assert "audited on 3 samples" in certificate.explanation
    assert certificate.to_dict()["audit"]["passed"]
    fastntk.audit(memory, near(memory, offset=0.1), ids=IDS)
    certificate = memory.preview([1]).certificate
    assert certificate.verdict == "retrain needed"
    failed = certificate.audit
    for answered, said in ((failed.retrained[0], True), (failed.retrained[0] + 50, False)):
        made = {"accuracy_with_gain": answered, "distances_with_gain": (failed.floor, failed.floor), "gain": 1.2}
        audit = replace(failed, **made)
        assert ("with the gain, which passes" in replace(certificate, audit=audit).explanation) == said
        refused = replace(audit, gain=0.8)  # by export, without an exact head
        assert "which passes" not in replace(certificate, audit=refused).explanation
    assert not certificate.to_ledger()["audit"]["passed"]
    fastntk.refresh(memory)
    assert memory.preview([1]).certificate.audit is None


def test_the_doubt_is_what_the_errors_of_the_audits_margins_make_of_an_accuracy():
    memory = prepared()
    fits = {}

    def fitting(data, seed):
        fits[seed] = near(memory, 0.5)(data, seed)
        return fits[seed]

    audit = fastntk.audit(memory, fitting, ids=IDS)

    def logits(parameters, ids):
        images, labels = (part[ids] for part in memory.state.members.source.tensors)
        return functional_call(memory.model, parameters, (images,)).detach(), labels

    answer = memory.preview(IDS)
    own = margins(*logits(answer.parameters, IDS))
    more = torch.cat([margins(*logits(fits[k], IDS)) - own for k in (1, 2)])
    assert audit.errors == pytest.approx((more.mean().item(), more.var(correction=0).sqrt().item()))
    assert audit.with_gain.errors == audit.errors_with_gain

    given = logits(memory.preview([1, 5, 8]).parameters, [1, 5, 8])
    found = audit.doubt(*given)
    scattered = margins(*given) + audit.errors[0] + audit.errors[1] * torch.randn(50_000, 3, dtype=torch.double)
    off = 100 * ((scattered > 0).double().mean(1) - (margins(*given) > 0).double().mean()).abs()
    assert (off <= found + 1e-9).double().mean() >= 0.95 - 0.005
    assert (off <= found - 100 / 3 + 1e-9).double().mean() < 0.95 + 0.005
    certificate = memory.preview([1, 5, 8]).certificate
    assert certificate.doubt == found
    assert "points of the answer's" in certificate.explanation
    assert "doubt" not in certificate.to_ledger()
    assert replace(audit, errors=None).doubt(*given) is None


@pytest.mark.parametrize("count", [1, 2, 7, 10])
def test_the_doubt_beside_every_outcome(count):
    generator = torch.Generator().manual_seed(count)
    for _ in range(20):
        given = torch.randn(count, generator=generator, dtype=torch.double)
        shift, scatter = torch.randn(2, generator=generator).abs().tolist()
        right = torch.special.ndtr((given + shift) / scatter).tolist()
        own, off = int((given > 0).sum()), {}
        for outcome in product((0, 1), repeat=count):
            chance = prod(p if hit else 1 - p for p, hit in zip(right, outcome, strict=True))
            off[abs(sum(outcome) - own)] = off.get(abs(sum(outcome) - own), 0.0) + chance
        least = min(k for k in range(count + 1) if sum(off.get(each, 0.0) for each in range(k + 1)) >= 0.95 - 1e-12)
        assert accuracy_doubt(given, shift, scatter) == pytest.approx(100 * least / count)


def test_there_is_no_doubt_without_an_audit_or_samples():
    memory = prepared()
    assert memory.preview([1]).certificate.doubt is None
    assert "points of the answer's" not in memory.preview([1]).certificate.explanation
    audit = fastntk.audit(memory, near(memory), ids=IDS)
    assert memory.preview([]).certificate.doubt is None
    memory.forget([4])
    assert memory.remember([4]).certificate.doubt is None
    sure = torch.eye(3).double() * 1e6
    assert audit.doubt(sure, torch.arange(3)) == 0
    said = replace(memory.preview([1]).certificate, doubt=3.1).explanation
    assert "too many" in said
    assert "too many" not in replace(memory.preview([1]).certificate, doubt=2.9).explanation


@pytest.mark.parametrize(
    ("passed", "departures", "verdict"),
    [
        (True, (0.5, 0.2), "trusted"),
        (True, (0.47, 0.2), "retrain needed"),
        (True, (0.5, 0.15), "retrain needed"),
        (False, (0.5, 0.2), "retrain needed"),
    ],
)
def test_what_passed_an_audit_may_depart_as_far_again(passed, departures, verdict):
    memory = prepared()
    fastntk.audit(memory, near(memory), ids=IDS)
    audit = replace(memory.audit, departures=departures, accuracy=memory.audit.accuracy if passed else 200.0)
    certificate = memory.preview([1]).certificate
    certificate = replace(certificate, audit=audit, departure_requested=0.6, departure_retained=0.2, moved=False)
    assert certificate.verdict == verdict
    assert replace(certificate, departure_requested=0.5, departure_retained=0.15).trusted == passed


@pytest.mark.parametrize("saved_first", [True, False])
def test_it_is_durable_until_a_refresh(saved_first, tmp_path):
    memory, folder = prepared(), tmp_path / "m"
    if saved_first:
        memory.save(folder)
    done = fastntk.audit(memory, near(memory), ids=IDS)
    if not saved_first:
        memory.save(folder)
    again = fastntk.load(folder, memory.model, memory.state.members.source)
    assert again.audit == done
    [entry] = again.requests()
    assert (entry.kind, entry.state, entry.certificate["verdict"]) == ("audit", "purged", "passed")
    assert again.forget([1]).certificate.audit == done
    memory.forget([3])  # the other process's request is known
    assert fastntk.load(folder, memory.model, memory.state.members.source).audit == done
    again.purge()
    assert fastntk.load(folder, memory.model, memory.state.members.source).audit == done
    fastntk.refresh(again)
    assert fastntk.load(folder, memory.model, memory.state.members.source).audit is None


def test_an_audited_memory_can_be_prepared_anew(tmp_path):
    memory = prepared()
    memory.save(tmp_path / "m")
    fastntk.audit(memory, near(memory), ids=IDS)
    prepared(ridge=0.7).save(tmp_path / "m")
    assert fastntk.load(tmp_path / "m", memory.model, memory.state.members.source).audit is None


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("audit's request is empty", {"fraction": 0.01}),
        ("must be between 0 and 1", {"fraction": 1.0}),
        ("id 99 is not in the memory", {"ids": [99]}),
    ],
)
def test_bad_requests(message, options):
    memory = prepared()
    with pytest.raises(fastntk.InputError, match=message):
        fastntk.audit(memory, near(memory), **options)
    assert memory.audit is None


def test_a_retraining_without_a_seed_is_refused():
    memory = prepared()
    with pytest.raises(fastntk.InputError, match="must depend on the seed"):
        fastntk.audit(memory, lambda data, seed: moved(memory.model), ids=IDS)
    assert memory.audit is None


def test_a_loop_of_ones_own_may_use_the_model_itself():
    memory = prepared()
    before, fit = memory.parameters, near(memory)

    def in_place(data, seed):
        memory.model.load_state_dict(fit(data, seed), strict=False)
        return tuned(memory.model)

    expected = fastntk.audit(memory, fit, ids=IDS)
    done = fastntk.audit(memory, in_place, ids=IDS)
    assert (done.distances, done.floor) == (expected.distances, expected.floor)
    close(snapshot(tuned(memory.model)), before, 0)


def test_whatever_a_loop_does_to_the_model_is_put_back():
    """Its modes, its buffers, what it trains."""
    memory = prepared()
    model, fit = memory.model, near(memory)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    trained = [each.requires_grad for each in model.parameters()]

    def careless(data, seed):
        model.train()
        for each in model.parameters():
            each.requires_grad_(True)
        with torch.no_grad():
            model(data.dataset.source.tensors[0])
            model.load_state_dict(fit(data, seed), strict=False)
        return {name: model.get_parameter(name) for name in before if name in memory.anchor}

    fastntk.audit(memory, careless, ids=IDS)
    close(model.state_dict(), before, 0)
    assert not any(module.training for module in model.modules())
    assert [each.requires_grad for each in model.parameters()] == trained
    memory.forget([4])


def test_other_parameters_than_the_tuned_ones_are_refused():
    memory = prepared()
    with pytest.raises(fastntk.InputError, match=r"what retraining returns .* they differ in 'head.bias'"):
        fastntk.audit(memory, lambda data, seed: {n: t for n, t in memory.parameters.items() if n != "head.bias"})
