"""The gain on the step that an audit finds."""

import math
from dataclasses import replace

import pytest
import torch
from cases import CASES
from fastntk.methods import FastNTK
from fastntk.metrics import label_probability
from memories import close
from test_heads import problem
from torch.func import functional_call
from torch.utils.data import Subset, TensorDataset

import fastntk
from fastntk.cli.run import Run
from fastntk.evidence.auditing import left_out
from fastntk.evidence.card import card
from fastntk.evidence.gain import LEAST, MOST, found
from fastntk.memory.finish import multiplied

IDS = [2, 9, 15]


def scaled(memory, gain):
    """Parameters as if the answer to a request were a step of this gain."""
    answer, anchor = memory.preview(IDS).parameters, memory.anchor
    return {name: anchor[name] + gain * (tensor - anchor[name]) for name, tensor in answer.items()}


@pytest.mark.parametrize(("true", "expected"), [(0.7, 0.7), (1.0, 1.0), (1.4, 1.4), (0.2, LEAST), (2.5, MOST)])
def test_the_step_so_multiplied_is_as_sure_of_the_labels_as_retrained_models(true, expected):
    memory = problem("bn", "head").memory
    forget = Subset(memory.state.members, IDS)
    images = torch.stack([forget[place][0] for place in range(3)])
    retrained = functional_call(memory.model, scaled(memory, true), (images,)).detach()
    answer = memory.preview(IDS).parameters
    assert found(memory.state, answer, forget, [retrained]) == pytest.approx(expected)


def test_the_probability_of_the_label():
    logits = torch.tensor([[5.0, 5.0], [0.0, math.log(3)]])
    assert label_probability(logits, torch.tensor([1, 0])) == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_an_audit_finds_it():
    memory = problem("bn", "head").memory
    done = fastntk.audit(memory, lambda data, seed: scaled(memory, 1.2 + 0.1 * seed), ids=IDS)
    assert done.gain == pytest.approx(1.35, abs=0.02)
    assert f"the step times {done.gain:.2f} is as sure of their labels as they, at" in str(done)
    for gain, words in (
        (LEAST, "0.50, the least that is tried, comes nearest"),
        (MOST, "2.00, the most that is tried"),
    ):
        assert f"the step times {words}" in str(replace(done, gain=gain))


def audited(given, gain=1.3):
    """The problem with a memory whose audit found a gain."""
    done = fastntk.audit(given.memory, given.recipe, fraction=0.3)
    given.memory.enter(replace(done, gain=gain), given.memory.state)
    return given


def test_the_answer_is_the_step_multiplied_and_then_the_head():
    given = audited(problem("bn", "head"))
    anchor, plain = given.memory.anchor, FastNTK()(given).parameters
    gained, both = FastNTK(gain=True)(given), FastNTK(gain=True, exact_head=True)(given)
    for name, tensor in gained.parameters.items():
        torch.testing.assert_close(tensor, anchor[name] + 1.3 * (plain[name] - anchor[name]))
    expected = fastntk.finished(given.memory, gained.parameters, exact_head=True, without=given.forget)
    torch.testing.assert_close(both.parameters, expected)
    audit = given.memory.audit
    assert str(audit.with_gain) in gained.note
    assert str(audit) in FastNTK()(given).note
    given.memory.enter(replace(audit, floor=1e-9), given.memory.state)
    for method in (FastNTK(), FastNTK(gain=1.5), FastNTK(gain=1.5, exact_head=True)):
        assert method(given).note.startswith("retrain needed"), "as a request is told of after an audit that failed"


@pytest.mark.parametrize("loss", [fastntk.CrossEntropy(), fastntk.SquaredLoss()])
def test_a_gain_from_samples_left_out_makes_them_as_sure_as_unseen_ones(loss):
    case = CASES["bn+head"]
    model, data = case.model(), case.data(30)
    done = fastntk.fit(model, data, epochs=60, batch_size=10, learning_rate=0.05, loss=loss)
    memory = fastntk.prepare(model, data, done.initial, ridge=0.5, loss=loss)
    (images, labels), here = data.tensors, model(data.tensors[0]).detach()
    change = left_out(memory.state, memory.state.positions) - here

    def sure(logits, labels):
        return float(logits.softmax(1).gather(1, labels[:, None]).mean())

    least, most = (sure(here + gain * change, labels) for gain in (LEAST, MOST))
    assert least > most
    for wrong in range(31):  # the same images, as many of them with a wrong label as it takes
        others = torch.where(torch.arange(30) < wrong, (labels + 1) % 3, labels)
        gain = fastntk.left_out_gain(memory, TensorDataset(images, others))
        wanted = sure(here, others)
        if most < wanted < least:
            assert sure(here + gain * change, labels) == pytest.approx(wanted, abs=0.02 * (least - most))
        else:
            assert gain == (MOST if wanted <= most else LEAST)
    answer = memory.preview([1, 2]).parameters
    gained = fastntk.finished(memory, answer, gain=1.3)
    for name, tensor in gained.items():
        torch.testing.assert_close(tensor, memory.anchor[name] + 1.3 * (answer[name] - memory.anchor[name]))
    with pytest.raises(fastntk.InputError, match="positive number"):
        fastntk.finished(memory, answer, gain=-1.0)


def test_an_audit_judges_answers_with_the_gain_too():
    memory = problem("bn", "head").memory
    images = torch.stack([memory.state.members.source[index][0] for index in IDS])
    labels = torch.tensor([int(memory.state.members.source[index][1]) for index in IDS])
    fits = [scaled(memory, 1.2), scaled(memory, 1.5)]
    done = fastntk.audit(memory, lambda data, seed: fits[seed - 1], ids=IDS)

    def logits(parameters):
        return functional_call(memory.model, parameters, (images,)).detach()

    gained = logits(scaled(memory, done.gain))
    distances = [(gained - logits(fit)).square().sum(1).mean().sqrt().item() for fit in fits]
    assert done.distances_with_gain == pytest.approx(distances)
    assert done.accuracy_with_gain == pytest.approx(100 * (gained.argmax(1) == labels).double().mean().item())
    assert done.with_gain.ratio == pytest.approx(sum(distances) / 2 / done.floor)
    assert done.with_gain.ratio < done.ratio
    assert done.with_gain.gap == pytest.approx(done.accuracy_with_gain - sum(done.retrained) / 2)
    assert replace(done, left_out=90.0, unseen=50.0, compared=(1000, 500)).with_gain.passed == done.with_gain.passed


def test_a_gain_below_1_is_for_an_exact_head_to_follow():
    given = audited(problem("bn", "head"), 0.7)
    anchor, plain = given.memory.anchor, FastNTK()(given).parameters
    alone, audit = FastNTK(gain=True)(given), given.memory.audit
    torch.testing.assert_close(alone.parameters, plain)
    assert str(audit) in alone.note, "the gain is not in the answer"
    assert str(audit.with_gain) in FastNTK(gain=True, exact_head=True)(given).note
    drawn = {name: anchor[name] + 0.7 * (tensor - anchor[name]) for name, tensor in plain.items()}
    torch.testing.assert_close(multiplied(given.memory.state, plain, 0.7), drawn)
    expected = fastntk.finished(given.memory, drawn, exact_head=True, without=given.forget)
    torch.testing.assert_close(FastNTK(gain=True, exact_head=True)(given).parameters, expected)


def test_it_is_not_exported_alone(tmp_path, monkeypatch):
    given, out = audited(problem("bn", "head"), 0.7), tmp_path / "out.safetensors"
    given.memory.save(tmp_path / "memory")
    monkeypatch.setattr(Run, "memory", lambda self: (given.memory, given.train))
    with pytest.raises(fastntk.InputError, match=r"0\.70.* draws the answer back.*--exact-head"):
        Run(tmp_path).export(out, gain=True)
    assert not out.exists()
    Run(tmp_path).export(out, exact_head=True, gain=True)
    assert out.exists()


def test_held_out_samples_of_a_class_that_is_gone_say_nothing():
    """Neither of a gain nor of whether members that are left out look like unseen ones."""
    case = CASES["bn+head"]
    model, data = case.model(), case.data(30)
    done = fastntk.fit(model, data, epochs=60, batch_size=10, learning_rate=0.05)
    memory = fastntk.prepare(model, data, done.initial, ridge=0.5)
    images, labels = case.data(60, seed=5).tensors
    gone, held_out = int(data.tensors[1][0]), TensorDataset(images, labels)
    memory.forget((data.tensors[1] == gone).nonzero()[:, 0].tolist())
    there = TensorDataset(images[labels != gone], labels[labels != gone])
    assert fastntk.left_out_gain(memory, held_out) == fastntk.left_out_gain(memory, there)
    fits = [fastntk.audit(memory, done.recipe, held_out=each) for each in (held_out, there)]
    assert fits[0].unseen == fits[1].unseen
    assert fits[0].compared == fits[1].compared
    with pytest.raises(fastntk.InputError, match="class that the memory still has"):
        fastntk.left_out_gain(memory, TensorDataset(images[labels == gone], labels[labels == gone]))


def test_it_multiplies_what_all_requests_have_changed(tmp_path):
    together, apart = audited(problem("bn", "head")), audited(problem("bn", "head"))
    expected = FastNTK(gain=True)(together).parameters
    apart.memory.save(tmp_path / "memory")
    for index in together.forget:
        apart.memory.forget([index])
    found = fastntk.finished(
        fastntk.load(tmp_path / "memory", apart.model, apart.memory.state.members.source), gain=True
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    fastntk.refresh(apart.memory)  # its audit was of the steps before
    with pytest.raises(fastntk.InputError, match="a gain comes from an audit"):
        fastntk.finished(apart.memory, gain=True)


def test_a_refresh_says_what_it_began_from(tmp_path):
    memory = audited(problem("bn", "head"), 0.7).memory
    memory.save(tmp_path / "memory")
    with pytest.raises(fastntk.InputError, match=r"0\.70.* draws the answer back"):
        fastntk.refresh(memory, gain=True, exact_head=False)
    assert "There was no audit." not in card(memory, None, False)
    fastntk.refresh(memory, gain=True)
    entry = memory.requests()[-1].certificate
    assert (entry["gain"], entry["exact_head"]) == (0.7, True)
    told = card(memory, None, False)
    assert "multiplied by 0.70 and the head was solved anew, which is measured only" in told
    assert "There was no audit since the latest refresh." in told


@pytest.mark.parametrize("gain", [False, True])
def test_a_refresh_keeps_what_is_served(gain, tmp_path):
    """The anchor of what follows is the answer as it is finished, and finishing it again changes nothing."""
    memory = audited(problem("bn", "head")).memory
    memory.forget([3, 5])
    served = fastntk.finished(memory, gain=gain, exact_head=True)
    alone = memory.parameters
    memory.save(tmp_path / "memory")
    fastntk.refresh(memory, gain=gain)
    again = fastntk.load(tmp_path / "memory", memory.model, memory.state.members.source)
    for each in (memory.anchor, again.parameters, fastntk.exact_head(again)):
        close(each, served, 1e-9)
    assert max((alone[name] - served[name]).abs().max() for name in served) > 1e-3


def test_without_an_audit_there_is_none():
    with pytest.raises(fastntk.InputError, match="a gain comes from an audit"):
        FastNTK(gain=True)(problem("bn", "head"))


def test_what_another_process_did_meanwhile_is_known(tmp_path):
    """To who finishes an answer; an audit of what was before it is not entered."""
    given = problem("bn", "head")
    mine, source = given.memory, given.memory.state.members.source
    mine.save(tmp_path / "memory")
    other = fastntk.load(tmp_path / "memory", given.model, source)
    other.forget([3, 5])
    close(fastntk.exact_head(mine), fastntk.exact_head(other), 0)

    def slowly(data, seed):
        if seed == 2:
            other.forget([7])
        return {name: tensor + 0.01 * seed for name, tensor in mine.anchor.items()}

    with pytest.raises(fastntk.InputError, match="while it was audited"):
        fastntk.audit(mine, slowly)
    assert fastntk.load(tmp_path / "memory", given.model, source).audit is None
