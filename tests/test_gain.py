"""The gain on the step that held-out data ask for."""

from dataclasses import replace

import pytest
import torch
from test_heads import problem
from torch.nn.functional import one_hot
from torch.utils.data import TensorDataset

import fastntk
from fastntk.auditing import left_out
from fastntk.gain import LEAST, MOST, calibrated
from fastntk.methods import FastNTK


def logits(seed, samples):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (samples,), generator=generator)
    return torch.randn(samples, 3, generator=generator) + 2 * one_hot(labels, 3), labels


@pytest.mark.parametrize(
    ("true", "samples", "expected"),
    [
        (0.7, 4000, 0.7),
        (1.0, 4000, 1.0),
        (1.4, 4000, 1.4),
        (1.4, 40, 1.0),  # chance could make it
        (1.02, 4000, 1.0),
        (0.1, 4000, LEAST),
        (3.0, 4000, MOST),
    ],
)
def test_members_left_out_are_as_sure_as_unseen_samples(true, samples, expected):
    fitted, labels = logits(0, samples)
    change = -0.9 * one_hot(labels, 3)
    assert calibrated(fitted, change, labels, fitted + true * change, labels) == pytest.approx(expected, abs=0.006)


def audited(given, gain=1.3):
    """The problem with a memory whose audit found a gain."""
    images, labels = given.train.tensors
    held_out = TensorDataset(images.flip(0) + 0.1, labels.flip(0))
    done = fastntk.audit(given.memory, given.recipe, fraction=0.3, held_out=held_out)
    assert LEAST <= done.gain <= MOST
    given.memory.audited_(replace(done, gain=gain))
    return given


def test_an_audit_with_held_out_data_finds_it(monkeypatch):
    monkeypatch.setattr("fastntk.gain.CHANCE", 0.0)  # the data are few
    given = problem("bn", "head")
    images, labels = given.train.tensors
    held_out = TensorDataset(images + 0.3, labels)
    unseen = given.model(held_out.tensors[0]).detach()
    expected = calibrated(*left_out(given.memory, torch.arange(20)), labels, unseen, labels)
    done = fastntk.audit(given.memory, given.recipe, fraction=0.3, held_out=held_out)
    assert done.gain == expected != 1
    assert str(done).endswith(f"gain {expected:.2f}")
    assert fastntk.audit(given.memory, given.recipe, fraction=0.3).gain is None


def test_the_answer_is_the_step_multiplied_and_then_the_head():
    given = audited(problem("bn", "head"))
    anchor, plain = given.memory.anchor, FastNTK()(given).parameters
    gained, both = FastNTK(gain=True)(given), FastNTK(gain=True, exact_head=True)(given)
    for name, tensor in gained.parameters.items():
        torch.testing.assert_close(tensor, anchor[name] + 1.3 * (plain[name] - anchor[name]))
    expected = fastntk.exact_head(given.memory, gained.parameters, given.forget.tolist())
    torch.testing.assert_close(both.parameters, expected)
    assert gained.note == FastNTK()(given).note


def test_it_multiplies_what_all_requests_have_changed(tmp_path):
    together, apart = audited(problem("bn", "head")), audited(problem("bn", "head"))
    expected = FastNTK(gain=True)(together).parameters
    apart.memory.save(tmp_path / "memory")
    for index in together.forget.tolist():
        apart.memory.forget([index])
    found = fastntk.amplified(fastntk.load(tmp_path / "memory", apart.model, apart.train))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    fastntk.refresh(apart.memory)
    with pytest.raises(fastntk.InputError, match="a gain comes from an audit with held-out data"):
        fastntk.amplified(apart.memory)


def test_without_held_out_data_there_is_none():
    given = problem("bn", "head")
    for _ in range(2):
        with pytest.raises(fastntk.InputError, match="a gain comes from an audit with held-out data"):
            FastNTK(gain=True)(given)
        fastntk.audit(given.memory, given.recipe, fraction=0.3)
