"""Rows on disk: the convex form's answers where its kernel does not fit, and nothing of a sample that has left."""

from dataclasses import replace

import pytest
import torch
from cases import CASES
from memories import close, moved

import fastntk
from fastntk.common import files
from fastntk.common.files import file_digest, read_tensors
from fastntk.jacobians import rows as rows_module
from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.per_sample import PerSampleJacobian
from fastntk.solve import collect, convex, on_disk, reading
from fastntk.solve.forms import FORMS
from fastntk.solve.solution import Task
from fastntk.tuning.losses import CrossEntropy, SquaredLoss
from fastntk.tuning.parameters import snapshot, tuned

LOSSES = [CrossEntropy(), CrossEntropy(smoothing=0.1, weights=(1.0, 2.0, 0.5)), SquaredLoss()]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Several parts, a sample that is not everyone, and solves to the end."""
    for module in (rows_module, collect):
        monkeypatch.setattr(module, "PART", 4)
    monkeypatch.setattr(on_disk, "SAMPLED", 12)
    monkeypatch.setattr(reading, "TOLERANCE", 1e-11)
    monkeypatch.setattr(convex.Convex, "tolerance", 1e-11)


def same(left, right, tolerance=1e-8):
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def task(loss, keep, count, name="bn+head", ridge=0.3):
    case = CASES[name]
    model = case.model()
    network = Linearised(PerSampleJacobian(model, snapshot(tuned(model))), case.data(14), loss)
    u = 0.3 * torch.randn(network.layout.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Task(replace(network, keep=keep), count, u, ridge)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("keep", [2, 3])
def test_it_answers_as_the_convex_form(loss, keep):
    given = task(loss, keep, 12)
    left, right = (FORMS[name].prepare(given).solution for name in ("convex", "convex-disk"))
    same(left.step, right.step)
    rows = given.network.rows([12, 13])
    for positions, sign in (([2, 7, 8], -1), ([12, 13], 1), ([0, 12], -1)):
        asked, joining = torch.tensor(positions), rows if sign > 0 else None
        updates = [each.update(given.network, asked, sign, joining) for each in (left, right)]
        same(updates[0].change, updates[1].change)
        assert right.inexactness(updates[1]) <= right.limit
        left, right = (each.apply(update) for each, update in zip((left, right), updates, strict=True))
        assert left.over.tolist() == right.over.tolist()
    nobody, u = torch.tensor([], dtype=torch.long), 0 * given.displacement
    same(left.resolve(given.network, nobody, u, 0.9), right.resolve(given.network, nobody, u, 0.9))


def test_whoever_preconditions_may_leave_altogether():
    given = task(LOSSES[0], 3, 14)
    left, right = (FORMS[name].prepare(given).solution for name in ("convex", "convex-disk"))
    gone = right.sample.positions
    assert len(gone) == 6
    right = right.apply(right.update(given.network, gone, -1))
    same(left.apply(left.update(given.network, gone, -1)).step, right.step)
    assert not right.sample.kernel.any()
    assert not right.rows.jacobian.rest[gone].any()


def test_the_ridge_of_the_sample_is_a_multiple_of_the_mean_diagonal_of_all():
    given = task(LOSSES[0], 3, 14, ridge=None)
    found = FORMS["convex-disk"].prepare(given).calibration
    dense = given.network.rows(range(14)).jacobian.dense()
    assert found.ridge == pytest.approx(found.factor * float(dense.square().sum()) / 28)


def test_everyone_as_the_sample_has_the_convex_forms_ridge(monkeypatch):
    monkeypatch.setattr(on_disk, "SAMPLED", 28)
    given = task(LOSSES[0], 3, 14, ridge=None)
    found, expected = (FORMS[name].prepare(given).calibration for name in ("convex-disk", "convex"))
    assert found.ridge == pytest.approx(expected.ridge)


def test_rows_of_float32_are_rounded_to_bfloat16_and_little_else(monkeypatch):
    monkeypatch.setattr(reading, "TOLERANCE", 1e-5)
    case = CASES["bn+head"]
    model = case.model().float()
    data = torch.utils.data.TensorDataset(case.data(14).tensors[0].float(), case.data(14).tensors[1])
    network = Linearised(PerSampleJacobian(model, snapshot(tuned(model))), data, LOSSES[0], keep=3)
    u = 0.3 * torch.randn(network.layout.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left, right = (FORMS[name].prepare(Task(network, 14, u, 0.3)).solution for name in ("convex", "convex-disk"))
    assert right.rows.jacobian.rest.dtype == torch.bfloat16
    exact = left.rows.jacobian.rest
    assert float((right.rows.jacobian.rest.float() - exact).norm() / exact.norm()) < 2**-8
    gone = torch.tensor([1, 5])
    changes = [each.update(network, gone, -1).change for each in (left, right)]
    assert 0 < float((changes[0] - changes[1]).norm() / changes[0].norm()) < 0.02


def test_a_folder_keeps_the_rows_where_they_are_and_a_purge_leaves_nothing_of_the_forgotten(tmp_path):
    case = CASES["bn+head"]
    model, data = case.model(), case.data(14)
    given = {"ridge": 0.5, "form": "convex-disk", "loss": LOSSES[0]}
    memory = fastntk.prepare(model, data, moved(model), checkpoint=tmp_path / "partial", **given)
    assert not (tmp_path / "partial").exists()
    memory.save(tmp_path / "m")
    again = fastntk.load(tmp_path / "m", model, data)
    before = file_digest(tmp_path / "m" / "base-1.safetensors")
    close(memory.preview([3, 9]).parameters, again.preview([3, 9]).parameters)
    again.forget([3, 9])
    again.remember([3])
    assert file_digest(tmp_path / "m" / "base-1.safetensors") == before
    again.purge()
    tensors = read_tensors(tmp_path / "m" / "base-2.safetensors")[0]
    for name in ("rest", "features", "residual", "z", "targets", "total", "mean"):
        assert not tensors[f"solution.rows.{name}"][9].any()
        assert tensors[f"solution.rows.{name}"][14].any()
    opened = fastntk.load(tmp_path / "m", model, data)
    assert opened.form == "convex-disk"
    close(opened.forget([0]).parameters, fastntk.prepare(model, data, moved(model), **given).forget([9, 0]).parameters)


def test_a_full_disk_is_said_before_anything_is_written(monkeypatch):
    def full(handle, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "posix_fallocate", full, raising=False)
    with pytest.raises(fastntk.InputError, match=r"no room for .* GB of rows \(No space.*TMPDIR"):
        FORMS["convex-disk"].prepare(task(LOSSES[0], 3, 12))


def test_a_small_request_is_as_exact_as_a_large_one(monkeypatch):
    monkeypatch.setattr(reading, "TOLERANCE", 1.0)
    given = task(LOSSES[0], 3, 14)
    solution = FORMS["convex"].prepare(given).solution
    rows, u = given.network.rows(range(14)), given.displacement
    present = torch.arange(14) != 4
    objective = reading.Objective((rows,), LOSSES[0], u, 0.3, present, torch.float64)
    sample = reading.Sample(torch.tensor([0]), solution.optimum.kernel[:2, :2])
    start = objective.at(solution.step)
    place = reading.minimise(objective, solution.step, sample)
    assert place.inexactness <= reading.SHARE * start.inexactness
    expected = solution.update(given.network, torch.tensor([4]), -1).change
    assert float((place.d - solution.step - expected).norm() / expected.norm()) < 0.05
