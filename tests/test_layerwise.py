"""The form that holds no Jacobian: its kernel beside one that is written out, its answers beside the convex form's."""

from dataclasses import replace

import oracles
import pytest
import torch
from cases import Attention, Case, Convolutional, Grouped, Prompted, SharedScale
from memories import close, moved
from torch.utils.data import TensorDataset

import fastntk
from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.outer import Layer, Outer
from fastntk.jacobians.per_sample import PerSampleJacobian
from fastntk.memory.state import State
from fastntk.solve import collect, layers
from fastntk.solve.forms import FORMS
from fastntk.solve.kernel import kernel
from fastntk.solve.layers import layered_kernel
from fastntk.solve.solution import Task
from fastntk.tuning.losses import CrossEntropy, SquaredLoss
from fastntk.tuning.parameters import snapshot, tuned

ALL = [Case(make, ("all",)) for make in (Convolutional, Attention, Grouped, SharedScale, Prompted)]
LOSSES = [CrossEntropy(smoothing=0.1), SquaredLoss()]


@pytest.fixture(autouse=True)
def one_at_a_time(monkeypatch):
    """Every parameter is a group."""
    monkeypatch.setattr(layers, "HELD", 1)


@pytest.fixture(params=["cheapest, all at once", "paired", "written"])
def way(request, monkeypatch):
    """How outer products are multiplied."""
    if request.param.endswith("at once"):
        monkeypatch.setattr(layers, "HELD", 2**30)
    else:
        monkeypatch.setattr(Layer, "paired", lambda self, rows: request.param == "paired")
        monkeypatch.setattr(Layer, "smaller", lambda self, rows: self.inputs > 1)


def groups(network, samples, rows):
    return layers.groups(network.jacobian.layers(network.one), samples, rows, 8)


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
    parts = groups(network, 9, count)
    found = layered_kernel(network, parts, range(9), rows.jacobian.kept, count)
    torch.testing.assert_close(found + head, flat @ flat.T, rtol=1e-9, atol=1e-9)
    beside = layered_kernel(network, parts, range(9), rows.jacobian.kept, count, joining=2)
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
    monkeypatch.setattr(collect, "_OVERHEAD", float("inf"))
    begun, add = [0], layers._add_group_

    def cut(*arguments):
        begun[0] += 1
        if begun[0] == 4:
            raise KeyboardInterrupt
        add(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(layers, "_add_group_", cut)
        with pytest.raises(KeyboardInterrupt):
            fastntk.prepare(model, case.data(), moved(model), checkpoint=tmp_path / "partial", **given)
    network = Linearised(PerSampleJacobian(model, snapshot(tuned(model))), case.data(), CrossEntropy())
    count = len(groups(network, 14, 2))
    done = []
    monkeypatch.setattr(layers, "_add_group_", lambda *arguments: done.append(1) or add(*arguments))
    memory = fastntk.prepare(model, case.data(), moved(model), checkpoint=tmp_path / "partial", **given)
    assert len(done) == count - 3
    assert not (tmp_path / "partial").exists()
    whole = fastntk.prepare(model, case.data(), moved(model), **given)
    close(memory.forget([3]).parameters, whole.forget([3]).parameters)


def test_the_model_s_own_parameters_do_not_matter_once_it_is_prepared():
    case = ALL[0]
    model = case.model()
    memory = fastntk.prepare(model, case.data(), moved(model), form="layerwise", ridge=0.5, loss=CrossEntropy())
    expected = memory.preview([1, 5]).parameters
    model.load_state_dict(memory.forget([3]).parameters, strict=False)
    memory.remember([3])
    close(memory.preview([1, 5]).parameters, expected, 1e-6)


def test_who_joins_has_no_rows_of_everything_formed(monkeypatch):
    case = ALL[0]
    model = case.model()
    memory = fastntk.prepare(model, case.data(), moved(model), form="layerwise", ridge=0.5, loss=CrossEntropy())
    expected = memory.preview([1]).parameters
    memory.forget([3])
    monkeypatch.setattr(State, "rows", lambda *asked: pytest.fail("they were formed"))
    memory.remember([3])
    close(memory.preview([1]).parameters, expected, 1e-6)


def test_partial_sums_over_other_groups_are_not_taken(tmp_path, monkeypatch):
    case = ALL[0]
    model, given = case.model(), {"form": "layerwise", "ridge": 0.5, "loss": CrossEntropy()}
    monkeypatch.setattr(collect, "_OVERHEAD", float("inf"))
    write = collect.Checkpoint.write

    def cut(self, sums, shards):
        write(self, sums, shards)
        if len(shards) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(collect.Checkpoint, "write", cut)
        with pytest.raises(KeyboardInterrupt):
            fastntk.prepare(model, case.data(), moved(model), checkpoint=tmp_path / "partial", **given)
    monkeypatch.setattr(layers, "HELD", 3000)
    memory = fastntk.prepare(model, case.data(), moved(model), checkpoint=tmp_path / "partial", **given)
    whole = fastntk.prepare(model, case.data(), moved(model), **given)
    close(memory.forget([3]).parameters, whole.forget([3]).parameters)


def test_in_bfloat16_it_is_near_what_it_is_in_full():
    case = ALL[1]
    model = case.model().float()
    data = TensorDataset(*(each.float() if each.is_floating_point() else each for each in case.data().tensors))
    given = {"form": "layerwise", "ridge": 0.5, "loss": CrossEntropy()}
    answers = [
        fastntk.prepare(model, data, moved(model), precision=precision, **given).forget([3]).parameters
        for precision in ("full", "bf16")
    ]
    change = [torch.cat([(a[n] - p).flatten() for n, p in tuned(model).items()]) for a in answers]
    assert float((change[1] - change[0]).norm()) < 0.2 * float(change[0].norm())
