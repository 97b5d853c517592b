"""A memory's folder: durable, all or nothing, and without a trace of who has left."""

import copy
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from cases import CASES
from memories import close, moved, prepared, reopened, saved
from torch.utils.data import Subset, TensorDataset

import fastntk
from fastntk.common import files
from fastntk.common.files import read_tensors
from fastntk.memory.members import Members
from fastntk.memory.request import hashed
from fastntk.solve.forms import FORMS

HERE = Path(__file__).parent


class Named(TensorDataset):
    """Samples with names."""

    ids: ClassVar[list[str]] = [f"people/anna-{place}.png" for place in range(14)]


def contents(folder):
    """All bytes in a folder."""
    return b"".join(path.read_bytes() for path in sorted(folder.iterdir()))


def base(folder):
    [path] = folder.glob("base-*.safetensors")
    return read_tensors(path)


@pytest.mark.parametrize("form", FORMS)
def test_a_request_is_durable_when_it_is_answered(form, tmp_path):
    memory = saved(tmp_path / "m", form)
    for kind, ids in (("forget", [3, 8]), ("remember", [8]), ("forget", [])):
        answer = getattr(memory, kind)(ids)
        again = reopened(memory, tmp_path / "m")
        close(again.parameters, answer.parameters, 0)
        assert again.ids == memory.ids
    assert [each.state for each in memory.requests()] == ["answered"] * 3
    assert memory.purge() > 0
    assert [each.state for each in memory.requests()] == ["purged"] * 3
    again = reopened(memory, tmp_path / "m")
    close(again.parameters, answer.parameters, 0)
    close(again.preview([1]).parameters, memory.forget([1]).parameters, 1e-10)


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_a_purged_sample_leaves_no_trace(form, tmp_path):
    case, folder = CASES["bn+head"], tmp_path / "m"
    model, images = case.model(), case.data().tensors
    data, initial = Named(*images), moved(case.model())
    memory = fastntk.prepare(model, data, initial, ridge=0.5, form=form, loss=fastntk.SquaredLoss())
    memory.save(folder)
    rows, before = memory.state.rows(torch.tensor([4])), base(folder)[0]
    trace = [rows.jacobian.rest[0, 0].numpy().tobytes()[:64], rows.residual[0].numpy().tobytes()]
    memory.forget(["people/anna-4.png"])
    assert trace[0] in contents(folder)
    memory.purge()
    found = contents(folder)
    assert b"anna-4" not in found
    assert b"anna-5" in found
    assert not any(part in found for part in trace)
    for name in ("fingerprints", "pixels"):
        assert before[name][4].any()
        assert not base(folder)[0][name][4].any()
    never = fastntk.prepare(
        model, Subset(data, [i for i in range(14) if i != 4]), initial, ridge=0.5, form=form, loss=fastntk.SquaredLoss()
    )
    kept = torch.tensor([i for i in range(14) if i != 4])
    places = (kept[:, None] * 3 + torch.arange(3)).flatten()
    for name, expected in never.state.solution.ready().tensors().items():
        if name in ("over", "factor"):
            continue
        left = base(folder)[0][f"solution.{name}"]
        if form == "dual" and name in ("kernel", "coefficients"):
            left = left[places]
            left = left[:, places] if left.ndim == 2 else left
        elif form == "dual" and name.startswith("rows."):
            left = left[kept]
        torch.testing.assert_close(left, expected, rtol=1e-9, atol=1e-9)
    for again in (memory, reopened(memory, folder)):
        with pytest.raises(fastntk.InputError, match=r"id 'people/anna-4.png' is not in the memory"):
            again.forget(["people/anna-4.png"])


def test_the_ledger_holds_hashes_whose_salt_only_the_caller_has(tmp_path):
    memory = saved(tmp_path / "m")
    certificate = memory.forget([3, 12]).certificate
    assert certificate.hashes == hashed([3, 12], certificate.salt)
    [request] = memory.requests()
    assert request.certificate["hashes"] == certificate.hashes
    assert request.certificate["request"] == certificate.request
    memory.purge()
    assert certificate.salt.encode() not in contents(tmp_path / "m")


def test_a_sample_that_is_not_in_the_sums_cannot_be_taken_out_of_them(tmp_path):
    """Past the ids: what would be removed twice is noticed by the arithmetic, or by the sample's own residual."""
    memory = saved(tmp_path / "m")
    memory.forget([4])
    memory.state = memory.state.with_members(Members(memory.state.members.source, range(14)))
    with pytest.raises(fastntk.InputError, match="another image or label under id 4"):
        memory.forget([4])


def test_two_processes_take_turns(tmp_path):
    saved(tmp_path / "m")
    code = (
        "import sys, fastntk; from cases import CASES; case = CASES['bn+head']\n"
        "memory = fastntk.load(sys.argv[1], case.model(), case.data())\n"
        "for i in map(int, sys.argv[2:]): memory.forget([i]); memory.purge()\n"
    )
    jobs = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path / "m", *ids], cwd=HERE, stderr=subprocess.PIPE)
        for ids in (("1", "3", "5"), ("2", "4", "6"))
    ]
    for job in jobs:
        _, errors = job.communicate(timeout=120)
        assert job.returncode == 0, errors.decode()
    memory = prepared(form="primal")
    again = reopened(memory, tmp_path / "m")
    assert len(again.requests()) == 6
    close(again.parameters, memory.forget([1, 2, 3, 4, 5, 6]).parameters)


def test_an_open_memory_sees_what_another_process_did(tmp_path):
    memory = saved(tmp_path / "m")
    other = reopened(memory, tmp_path / "m")
    other.forget([1])
    other.purge()
    with pytest.raises(fastntk.InputError, match="id 1 is not in the memory"):
        memory.forget([1])
    close(memory.forget([2]).parameters, prepared(form="primal").forget([1, 2]).parameters)


def test_a_locked_memory_fails_clearly(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_WAIT", 0.1)
    memory = saved(tmp_path / "m")
    other = reopened(memory, tmp_path / "m")
    with memory._folder.locked(), pytest.raises(fastntk.InputError, match="in use by another process"):
        other.forget([1])
    other.forget([1])


@contextmanager
def full_disk(size):
    """No file of this process can grow beyond ``size`` bytes."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 100, 1000, 4096, 12288, 20000])
def test_a_full_disk_leaves_the_old_state(size, tmp_path):
    memory, folder = saved(tmp_path / "m"), tmp_path / "m"
    before = memory.parameters
    errors = []
    with full_disk(size):
        for step in (lambda: memory.forget([1, 2, 3]), memory.purge):
            try:
                step()
            except fastntk.InputError as error:
                errors.append(str(error))
    assert errors
    assert all(re.search("cannot be (written|used)|in use", error) for error in errors), errors
    assert size > 20000 or not memory.requests() or memory.requests()[0].state == "answered"
    if not reopened(memory, folder).requests():
        close(memory.parameters, before, 0)
        close(reopened(memory, folder).parameters, before, 0)
        memory.forget([1, 2, 3])
    close(reopened(memory, folder).parameters, memory.parameters, 0)
    memory.purge()
    close(reopened(memory, folder).parameters, memory.parameters, 0)


def test_a_flipped_byte_is_detected_and_named(tmp_path):
    memory, folder = saved(tmp_path / "m"), tmp_path / "m"
    memory.forget([1])
    names = [path.name for path in folder.iterdir() if path.stat().st_size]
    assert {Path(name).suffix for name in names} == {".safetensors", ".sqlite", ".sha256"}
    generator = torch.Generator().manual_seed(0)
    for name in names:
        whole = (folder / name).read_bytes()
        for place in torch.randint(len(whole), (12,), generator=generator).tolist():
            damaged = bytearray(whole)
            damaged[place] ^= 1 << (place % 8)
            (folder / name).write_bytes(damaged)
            with pytest.raises(fastntk.InputError, match=re.escape(name)):
                reopened(memory, folder)
        (folder / name).write_bytes(whole)
    reopened(memory, folder)
    for name in names:
        shutil.copytree(folder, tmp_path / "other")
        (tmp_path / "other" / name).unlink()
        with pytest.raises(fastntk.InputError, match=re.escape(name.removesuffix(".sha256"))):
            reopened(memory, tmp_path / "other")
        shutil.rmtree(tmp_path / "other")


def test_killed_at_any_point_it_is_as_before_or_after(tmp_path):
    done = subprocess.run(
        [sys.executable, HERE / "killing.py", tmp_path, "200"], cwd=HERE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    states = json.loads(done.stdout.splitlines()[-1].replace("'", '"'))
    assert min(states.values()) >= 10, states


def test_a_model_in_training_mode_opens_its_memory_and_stays_as_it_is(tmp_path):
    memory = saved(tmp_path)
    expected, model = memory.preview([3]).parameters, copy.deepcopy(memory.model).train()
    before = copy.deepcopy(model.state_dict())
    answer = fastntk.load(tmp_path, model, memory.state.members.source).forget([3])
    torch.testing.assert_close(answer.parameters, expected)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_folder_that_was_moved_opens(tmp_path):
    memory = saved(tmp_path / "m")
    memory.forget([1])
    shutil.move(tmp_path / "m", tmp_path / "elsewhere")
    close(reopened(memory, tmp_path / "elsewhere").parameters, memory.parameters, 0)


def test_what_does_not_belong_is_refused(tmp_path):
    case, folder = CASES["bn+head"], tmp_path / "m"
    memory = saved(folder)
    with pytest.raises(fastntk.InputError, match="another model"):
        fastntk.load(folder, case.model(seed=9), memory.state.members.source)
    with pytest.raises(fastntk.InputError, match="another image or label under id 0"):
        fastntk.load(folder, memory.model, case.data(seed=2))
    images, labels = memory.state.members.source.tensors
    changed = images.clone()
    changed[11] = changed[12]
    again = fastntk.load(folder, memory.model, TensorDataset(changed, labels))
    with pytest.raises(fastntk.InputError, match="another image or label under id 11"):
        again.forget([11])
    with pytest.raises(fastntk.InputError, match="no memory in"):
        fastntk.load(tmp_path / "none", memory.model, memory.state.members.source)
    memory.forget([1])
    with pytest.raises(fastntk.InputError, match="has answered requests"):
        prepared().save(folder)
    with pytest.raises(fastntk.InputError, match="kept in no folder"):
        prepared().purge()


def test_the_data_may_shrink_to_the_samples_of_the_request(tmp_path):
    case, folder = CASES["bn+head"], tmp_path / "m"
    model, (images, labels) = case.model(), case.data().tensors
    memory = fastntk.prepare(model, Named(images, labels), moved(model), ridge=0.5)
    memory.save(folder)
    expected = memory.preview([Named.ids[9], Named.ids[2]]).parameters
    few = Named(images[[9, 2]], labels[[9, 2]])
    few.ids = [Named.ids[9], Named.ids[2]]
    answer = fastntk.load(folder, model, few).forget([Named.ids[9]])
    assert answer.certificate.departure_retained is not None
    one = Named(images[[2]], labels[[2]])
    one.ids = [Named.ids[2]]
    unprobed = fastntk.load(folder, model, one).forget([Named.ids[2]])
    assert unprobed.certificate.departure_retained is None
    assert "an unmeasured part" in unprobed.certificate.explanation
    close(unprobed.parameters, expected)


def test_stale_files_are_removed_and_secure_deletion_is_on(tmp_path):
    memory, folder = saved(tmp_path / "m"), tmp_path / "m"
    for name in ("base-9.safetensors", "journal-7.safetensors", ".base-3.safetensors.new"):
        (folder / name).write_bytes(b"left over")
    reopened(memory, folder)
    assert b"left over" not in contents(folder)
    with memory._folder.ledger._open() as database:
        assert database.execute("PRAGMA secure_delete").fetchone()[0] == 1


@pytest.mark.parametrize("form", FORMS)
def test_refresh_is_preparing_without_the_forgotten_at_the_current_weights(form, tmp_path):
    memory, folder = saved(tmp_path / "m", form), tmp_path / "m"
    now = memory.forget([3, 5]).parameters
    fastntk.refresh(memory, exact_head=False)
    close(memory.anchor, now, 0)
    model = CASES["bn+head"].model()
    model.load_state_dict(now, strict=False)
    keep = [i for i in range(14) if i not in (3, 5)]
    others, initial = Subset(memory.state.members.source, keep), moved(CASES["bn+head"].model())
    fresh = fastntk.prepare(model, others, initial, ridge=0.5, form=form, loss=fastntk.SquaredLoss())
    torch.testing.assert_close(memory.state.solution.step, fresh.state.solution.step, rtol=1e-8, atol=1e-9)
    assert [(each.kind, each.state) for each in memory.requests()] == [("forget", "re-anchored"), ("refresh", "purged")]
    expected = fresh.forget([keep.index(7)]).parameters
    close(reopened(memory, folder).forget([7]).parameters, expected, 1e-8)


def test_in_float32_too_a_joined_memory_is_as_exact_as_it_says(tmp_path):
    case = CASES["bn+head"]
    model, data = case.model().float(), case.data(40)
    data = TensorDataset(data.tensors[0].float(), data.tensors[1])
    memory = fastntk.prepare(model, data, moved(model), form="dual", ridge=0.5, loss=fastntk.SquaredLoss())
    for kind, ids in (("forget", [3, 8, 21]), ("remember", [8, 3])):
        stated = getattr(memory, kind)(ids).certificate.inexactness
        assert max(stated, memory.state.solution.inexactness()) < 1e-10


@pytest.mark.parametrize("audited", [False, True])
def test_after_others_have_joined_who_was_there_before_leaves_as_well(audited, tmp_path):
    """In the primal form, whose factor is of the set before: with few rows more would be taken away than is there."""
    case = CASES["all of attention"]
    model, data = case.model(), case.data(17)
    memory = fastntk.prepare(model, data, moved(model), form="primal", ridge=0.1, loss=fastntk.SquaredLoss())
    memory.forget([15, 16])
    memory.save(tmp_path / "m")
    memory.remember([15, 16])
    if audited:
        memory.state = replace(memory.state, solution=memory.state.solution.ready())
    for gone in range(15):
        assert memory.preview([gone]).certificate.inexactness < 1e-9
    memory.forget([0, 16])
    again = fastntk.load(tmp_path / "m", model, data)
    close(again.parameters, memory.parameters, 1e-9)
    assert again.state.error() < 1e-8
