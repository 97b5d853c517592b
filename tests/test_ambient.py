"""What is in force around a call: autocast, no gradients, inference mode, other threads that ask or use the model."""

from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
import torch
from cases import Convolutional, linear
from torch import nn
from torch.utils.data import TensorDataset

import fastntk
from fastntk.tuning.parameters import snapshot, tuned


def test_a_fit_as_a_whole_under_autocast_learns():
    """Which would otherwise go on with the parameters that it cast first."""
    ends = []
    for cached in (True, False):
        model, data = linear()
        initial = model[1].weight.detach().clone()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            fastntk.fit(model, data, learning_rate=0.05, epochs=3)
        ends.append(model[1].weight.detach() - initial)
    assert ends[1].abs().max() > 0.05
    assert torch.equal(*ends)


def test_a_fit_needs_no_gradients_around_it_and_no_inference_mode():
    model, data = linear()
    start = model[1].weight.detach().clone()
    with torch.no_grad():
        fastntk.fit(model, data, epochs=1)
    assert not torch.equal(model[1].weight, start)
    with torch.inference_mode(), pytest.raises(fastntk.InputError, match="Leave it outside"):
        fastntk.fit(model, data, epochs=1)


def test_solves_are_not_rounded_by_autocast():
    model, data = linear()
    initial = fastntk.fit(model, data, epochs=1).initial
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(fastntk.InputError, match="Leave it outside"):
        fastntk.prepare(model, data, initial)
    memory = fastntk.prepare(model, data, initial)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(fastntk.InputError, match="Leave it outside"):
        memory.forget([0])
    assert len(memory.ids) == len(data)


def memory_of(form, model=None, ridge=1.0):
    """A memory of 20 images, the same every time."""
    torch.manual_seed(0)
    model = (model or Convolutional()).double().eval()
    fastntk.tune(model, "bn", "head")
    data = TensorDataset(torch.randn(20, 3, 8, 8, dtype=torch.float64), torch.arange(20) % 3)
    initial = snapshot(tuned(model))
    with torch.no_grad():
        for parameter in tuned(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return fastntk.prepare(model, data, initial, ridge=ridge, form=form)


@pytest.mark.parametrize("kept", [False, True], ids=["in memory", "in a folder"])
@pytest.mark.parametrize("form", ["convex", "dual", "primal"])
def test_requests_of_several_threads_are_answered_one_after_the_other(form, kept, tmp_path):
    """None is lost, and the answer is that to all of them."""
    memory, once = memory_of(form), memory_of(form)
    if kept:
        memory.save(tmp_path / "memory")
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda i: memory.forget([i]), range(8)))
    assert sorted(answer.certificate.retained for answer in answers) == list(range(12, 20))
    assert memory.ids == list(range(8, 20))
    for name, tensor in once.forget(range(8)).parameters.items():
        torch.testing.assert_close(memory.parameters[name], tensor, rtol=1e-6, atol=1e-9)
    if kept:
        assert len(memory.requests()) == 8


class Served(Convolutional):
    """Looks, at every pass of whatever copy of it, at the model that somebody else is using."""

    others: nn.Module | None = None
    seen: ClassVar[list] = []

    def forward(self, x):
        if Served.others is not None:
            Served.seen.append([id(parameter) for parameter in Served.others.parameters()])
        return super().forward(x)


@pytest.mark.parametrize("opened", [False, True], ids=["prepared", "loaded"])
def test_the_model_in_use_elsewhere_has_its_own_parameters_while_a_request_is_answered(opened, tmp_path):
    torch.manual_seed(0)
    model = Served()
    memory = memory_of("dual", model)
    own = [id(parameter) for parameter in model.parameters()]
    if opened:
        memory.save(tmp_path / "memory")
        memory = fastntk.load(tmp_path / "memory", model, memory.state.members.source)
    Served.others, Served.seen = model, []
    try:
        memory.forget([0])
    finally:
        Served.others = None
    assert Served.seen
    assert all(seen == own for seen in Served.seen)
    assert [id(parameter) for parameter in memory.model.parameters()] == own


def test_a_model_that_cannot_be_copied_is_named():
    model = Convolutional()
    model.handle = (each for each in [])
    with pytest.raises(fastntk.InputError, match="cannot be copied"):
        memory_of("dual", model)


def test_what_else_is_asked_of_a_memory_meanwhile_is_answered():
    memory = memory_of("dual")

    def others():
        return [(fastntk.finished(memory, exact_head=True), memory.preview([19])) for _ in range(5)]

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(others)
        for i in range(8):
            memory.forget([i])
        assert len(asked.result()) == 5
    once = memory_of("dual").forget(range(8)).parameters
    for name, tensor in once.items():
        torch.testing.assert_close(memory.parameters[name], tensor, rtol=1e-6, atol=1e-9)
