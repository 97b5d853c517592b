"""The form that holds no Jacobian: its kernel beside one that is written out, its answers beside the convex form's."""

from dataclasses import replace

import oracles
import pytest
import torch
from cases import Attention, Case, Convolutional, Grouped, Prompted, SharedScale
from test_memory import close, moved

import fastntk
from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.outer import Layer, Outer
from fastntk.jacobians.per_sample import PerSampleJacobian
from fastntk.solve import collect, layers
from fastntk.solve.forms import FORMS
from fastntk.solve.kernel import kernel
from fastntk.solve.layers import layered_kernel
from fastntk.solve.solution import Task
from fastntk.tuning.loss import CrossEntropy, SquaredLoss
from fastntk.tuning.parameters import snapshot, tuned

ALL = [Case(make, ("all",)) for make in (Convolutional, Attention, Grouped, SharedScale, Prompted)]
LOSSES = [CrossEntropy(smoothing=0.1), SquaredLoss()]


@pytest.fixture(autouse=True, params=["a parameter at a time", "all at once"])
def held(request, monkeypatch):
    if request.param != "all at once":
        monkeypatch.setattr(layers, "HELD", 1)


@pytest.fixture(params=["cheapest", "paired", "written"])
def way(request, monkeypatch):
    """How outer products are multiplied."""
    if request.param != "cheapest":
        monkeypatch.setattr(Layer, "paired", lambda self, rows: request.param == "paired")
        monkeypatch.setattr(Layer, "smaller", lambda self, rows: self.inputs > 1)


def linearised(case, loss, keep=3, count=9):
    model = case.model()
    network = Linearised(PerSampleJacobian(model, snapshot(tuned(model))), case.data(count), loss)
    return replace(network, keep=keep)


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.make.__name__)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_the_kernel_is_that_of_the_jacobian_written_out(case, loss, way):
    network = linearised(case, loss)
    rows = network.rows(range(9))
    own, count = rows.jacobian.combined(), rows.residual.shape[1]
    images = torch.stack([network.train[i][0] for i in range(9)])
    dense = oracles.jacobian(network.jacobian.model, network.jacobian.parameters, network.layout, images)
    flat = torch.einsum("nck,ncp->nkp", own, dense).flatten(0, 1)
    head = kernel(network.narrowed(network.layout.head).rows(range(9)))
    found = layered_kernel(network, range(9), rows.jacobian.kept, count)
    torch.testing.assert_close(found + head, flat @ flat.T, rtol=1e-9, atol=1e-9)
    beside = layered_kernel(network, range(9), rows.jacobian.kept, count, joining=2)
    torch.testing.assert_close(beside, found[:, -2 * count :], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.make.__name__)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_it_answers_as_the_convex_form(case, loss):
    network = linearised(case, loss, keep=2, count=12)
    u = 0.3 * torch.randn(network.layout.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left, right = (FORMS[name].prepare(Task(network, 10, u, None)).solution for name in ("convex", "layerwise"))
    assert right.ridge == pytest.approx(left.ridge)
    torch.testing.assert_close(right.step, left.step, rtol=1e-6, atol=1e-7)
    for positions, sign in (([2, 7, 8], -1), ([10, 11], 1), ([0, 10], -1)):
        asked, joining = torch.tensor(positions), network.rows(positions) if sign > 0 else None
        updates = [each.update(network, asked, sign, joining) for each in (left, right)]
        torch.testing.assert_close(updates[1].change, updates[0].change, rtol=1e-6, atol=1e-7)
        left, right = (each.apply(update) for each, update in zip((left, right), updates, strict=True))
    resolved = [each.resolve(network, torch.tensor([3]), 0.5 * u, 2 * left.ridge) for each in (left, right)]
    torch.testing.assert_close(resolved[1], resolved[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(right.anew(network).step, right.step, rtol=1e-6, atol=1e-7)


def test_a_layer_s_sizes_are_those_of_its_outer_products():
    case, network = ALL[0], linearised(ALL[0], LOSSES[0])
    by_name = {layer.name: layer for layer in network.jacobian.layers(case.images(1))}
    assert by_name["body.0.weight"] == Layer("body.0.weight", 36, 27, 4)  # 6 x 6 places, patches of 3 x 9
    assert by_name["body.3.weight"] == Layer("body.3.weight", 1, 1, 36)  # depthwise
    assert by_name["body.1.weight"] == Layer("body.1.weight", 1, 1, 4)
    assert set(by_name) == set(network.layout.shapes) - set(network.layout.head)
    large = Layer("w", 4, 512, 256)
    assert large.numbers(2) == 4 * (512 + 2 * 256)
    assert large.smaller(2)
    assert large.multiplications(2) == 16 * (512 / 4 + 256 + 32)
    assert not Layer("w", 4096, 27, 32).smaller(2)


def test_outer_products_are_multiplied_both_ways_alike():
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "dtype": torch.float64}
    left, right = (Outer(torch.randn(n, 5, 4, **draw), torch.randn(n, 2, 5, 3, **draw)) for n in (6, 3))
    dense = [torch.einsum("nrto,nti->nroi", each.slopes, each.inputs).flatten(0, 1) for each in (left, right)]
    torch.testing.assert_close(left.written(slice(1, 3)), dense[0][:, 1:3].flatten(1))
    torch.testing.assert_close(left.inner(right), dense[0].flatten(1) @ dense[1].flatten(1).T)


def test_cut_off_it_goes_on_with_the_groups_that_are_left(tmp_path, monkeypatch):
    case = ALL[0]
    model, given = case.model(), {"form": "layerwise", "ridge": 0.5, "loss": CrossEntropy()}
    monkeypatch.setattr(layers, "HELD", 1)
    monkeypatch.setattr(collect, "_OVERHEAD", float("inf"))
    count, add = [0], layers._add_group_

    def cut(*arguments):
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        add(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(layers, "_add_group_", cut)
        with pytest.raises(KeyboardInterrupt):
            fastntk.prepare(model, case.data(), moved(model), checkpoint=tmp_path / "partial", **given)
    groups = len(network_groups(model, case))
    done = []
    monkeypatch.setattr(layers, "_add_group_", lambda *arguments: done.append(1) or add(*arguments))
    memory = fastntk.prepare(model, case.data(), moved(model), checkpoint=tmp_path / "partial", **given)
    assert len(done) == groups - 3
    assert not (tmp_path / "partial").exists()
    whole = fastntk.prepare(model, case.data(), moved(model), **given)
    close(memory.forget([3]).parameters, whole.forget([3]).parameters)


def network_groups(model, case):
    network = Linearised(PerSampleJacobian(model, snapshot(tuned(model))), case.data(), CrossEntropy())
    return layers.groups(network.jacobian.layers(network.one), 14, 2, 8)


def test_the_model_s_own_parameters_do_not_matter_once_it_is_prepared():
    case = ALL[0]
    model = case.model()
    memory = fastntk.prepare(model, case.data(), moved(model), form="layerwise", ridge=0.5, loss=CrossEntropy())
    expected = memory.preview([1, 5]).parameters
    model.load_state_dict(memory.forget([3]).parameters, strict=False)
    memory.remember([3])
    close(memory.preview([1, 5]).parameters, expected, 1e-6)
