"""A run's folder: several files replaced in one step, whoever is cut off; what does not belong together is named."""

import contextlib
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from faults import Killed, failing
from runs import NETWORK, RECIPE, photos, prepared, refuse, succeed

import fastntk
from fastntk.cli import preparing
from fastntk.cli.asked import forgotten
from fastntk.cli.run import Run
from fastntk.cli.settings import Settings
from fastntk.common import files
from fastntk.common.files import file_digest, read_tensors, switching, write_json
from fastntk.jacobians.numerics import Numerics
from fastntk.memory.certificate import HEAD_NEEDED, Certificate


def state(folder):
    """What a run is, by what is in its files; None for what is not there."""
    names = ("run.json", "initial.safetensors", "model.safetensors")
    return {name: file_digest(folder / name) if (folder / name).exists() else None for name in names}


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("call", range(1, 12))
def test_several_files_are_replaced_in_one_step(call, tmp_path, monkeypatch):
    """Killed at every sync and every change of a name: all of the old, or all of the new."""
    for name in ("one", "two", "three"):
        (tmp_path / name).write_text("old")

    def replaced():
        with switching(tmp_path, gone=("three",)) as staged:
            for name in ("one", "two"):
                files.write(staged / name, lambda path: path.write_text("new"))

    child = os.fork()
    if not child:
        counted = [0]

        def dying(real):
            def called(*arguments, **options):
                counted[0] += 1
                if counted[0] == call:
                    os._exit(9)
                return real(*arguments, **options)

            return called

        for name in ("fsync", "rename", "replace", "unlink", "mkdir"):
            setattr(os, name, dying(getattr(os, name)))
        replaced()
        os._exit(0)
    os.waitpid(child, 0)
    files.complete(tmp_path)
    found = [(tmp_path / name).read_text() for name in ("one", "two")]
    assert found == (["old"] * 2 if (tmp_path / "three").exists() else ["new"] * 2)
    replaced()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize("call", range(1, 14, 2))
def test_a_fit_that_is_cut_off_is_the_old_one_or_the_new_one(run, given, call, tmp_path, monkeypatch):
    before = state(run.folder)
    shutil.copytree(run.folder, tmp_path / "other")
    Run(tmp_path / "other").fit(given, replace(RECIPE, seed=5))
    after = state(tmp_path / "other")
    failing(monkeypatch, files.os, "fsync", call, Killed())
    with contextlib.suppress(Killed):
        run.fit(given, replace(RECIPE, seed=5))
    monkeypatch.undo()
    run.settings()  # which goes on with what was decided
    assert state(run.folder) in (before, after)
    assert (run.folder / "memory").exists() == (state(run.folder) == before)
    prepared(run)
    assert not leftovers(run.folder)


def test_a_memory_that_answers_while_its_run_is_fitted_anew_stays(run, given, monkeypatch):
    real = preparing.fit

    def answering(*arguments, **options):
        Run(run.folder).memory()[0].forget([3])
        return real(*arguments, **options)

    before = state(run.folder)
    monkeypatch.setattr(preparing, "fit", answering)
    with pytest.raises(fastntk.InputError, match="has answered requests"):
        run.fit(given, replace(RECIPE, seed=5))
    assert state(run.folder) == before
    assert 3 not in run.memory()[0].ids


def test_a_run_that_is_fitted_anew_while_it_is_prepared_is_not_given_that_memory(run, given, monkeypatch):
    real = preparing.prepare

    def fitting(*arguments, **options):
        Run(run.folder).fit(given, replace(RECIPE, seed=5))
        return real(*arguments, **options)

    monkeypatch.setattr(preparing, "prepare", fitting)
    with pytest.raises(fastntk.InputError, match="was fitted anew meanwhile"):
        prepared(run)
    assert not (run.folder / "memory").exists()


@pytest.mark.parametrize("call", range(1, 26, 3))
def test_a_refresh_that_is_cut_off_is_completed(run, call, monkeypatch):
    """The memory's anchor and the run's model are the same at the latest when the run is next opened."""
    memory, _ = run.memory()
    memory.forget([3, 4])
    memory.purge()
    failing(monkeypatch, files.os, "fsync", call, Killed())
    with contextlib.suppress(Killed):
        run.refresh()
    monkeypatch.undo()
    again, _ = run.memory()
    model = read_tensors(run.folder / "model.safetensors")[0]
    assert all((model[name] == tensor).all() for name, tensor in again.anchor.items())
    run.memory()
    run.refresh()
    assert not leftovers(run.folder)


def test_another_fit_s_memory_is_refused(run, given, tmp_path):
    Run(tmp_path / "other").fit(given, replace(RECIPE, epochs=3))
    shutil.copytree(run.folder / "memory", tmp_path / "other" / "memory")
    with pytest.raises(fastntk.InputError, match="prepared for another fit"):
        Run(tmp_path / "other").memory()


def test_every_flipped_bit_of_run_json_is_noticed(run):
    path = run.folder / "run.json"
    whole = path.read_bytes()
    settings = Settings.read(path)
    generator = np.random.default_rng(0)
    for place in generator.integers(0, len(whole), 300):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        try:
            same = Settings.read(path)
        except fastntk.InputError:
            continue
        assert same == settings, bytes(damaged[place - 9 : place + 9])  # white space


@pytest.mark.parametrize("name", ["initial.safetensors", "model.safetensors"])
def test_what_is_damaged_is_named_by_every_command(run, name):
    path = run.folder / name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    calls = (run.memory, run.refresh, lambda: prepared(run), lambda: run.plan("auto", "auto", Numerics()))
    for call in (*calls, lambda: run.export(run.folder / "out.safetensors"), lambda: run.evaluate(None, False)):
        with pytest.raises(fastntk.InputError, match=f"{name} is damaged"):
            call()


def test_run_json_of_an_older_fastntk_has_no_sum(run):
    path = run.folder / "run.json"
    document = json.loads(path.read_text())
    del document["sha256"]
    write_json(path, {**document, "format": 3})
    assert run.memory()[0].ids
    write_json(path, document)
    with pytest.raises(fastntk.InputError, match="its sum is missing"):
        run.memory()


def test_a_model_and_data_that_have_moved(given, tmp_path):
    """They are read where they are said to lie; another model under the name is refused; nothing is written of it."""
    place = shutil.copytree(os.path.dirname(given.data), tmp_path / "given")
    moved = tmp_path / "moved"
    run = Run(tmp_path / "run")
    run.fit(replace(given, model=f"{place}/own.py:small", data=f"{place}/data.npz"), RECIPE)
    prepared(run)
    place.rename(moved)
    before = state(run.folder)
    with pytest.raises(fastntk.InputError, match="there is no file .*own.py"):
        Run(run.folder).memory()
    with pytest.raises(fastntk.InputError, match="there is no file .*data.npz"):
        Run(run.folder, model=f"{moved}/own.py:small").memory()
    there = Run(run.folder, "cpu", f"{moved}/data.npz", f"{moved}/own.py:small")
    there.memory()[0].forget([3])
    assert there.evaluate(None, 1).to_dict()
    assert state(run.folder) == before
    (moved / "own.py").write_text(NETWORK.replace("nn.ReLU()", "nn.Tanh()"))
    with pytest.raises(fastntk.InputError, match="or the model is another"):
        Run(run.folder, "cpu", f"{moved}/data.npz", f"{moved}/own.py:small").memory()


def test_of_a_torchvision_dataset_the_folder_moves(run):
    settings = replace(run.settings(), data="CIFAR10", root="before")
    assert settings.moved("now", None) == replace(settings, root="now")
    assert settings.moved(None, "a.py:f") == replace(settings, model="a.py:f")
    assert run.settings().moved("now", None) == replace(run.settings(), data="now")


def test_an_export_without_the_head_that_a_verdict_asked_for_says_so(run, monkeypatch, caplog, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(Certificate, "verdict", property(lambda _: HEAD_NEEDED))
        run.memory()[0].forget([3])
    run.export(tmp_path / "step.safetensors")
    assert "'exact head needed': without it" in caplog.text
    caplog.clear()
    run.export(tmp_path / "head.safetensors", exact_head=True)
    run.refresh()
    run.export(tmp_path / "refreshed.safetensors")
    assert "exact head needed" not in caplog.text


def test_purging_and_refreshing_name_what_was_written_before(run, caplog):
    run.memory()[0].forget([3])
    run.export(run.folder / "unlearned.safetensors")
    run.purge(run.memory()[0])
    assert "have left since" not in caplog.text, "it is of after the request"
    os.utime(run.folder / "unlearned.safetensors", (0, 0))
    (run.folder / "unlearned-gone.safetensors").symlink_to("nowhere")
    run.memory()[0].forget([5])
    run.purge(run.memory()[0])
    assert re.search(r"holds what tells of samples that have left since: .*unlearned.safetensors. Delete", caplog.text)
    caplog.clear()
    run.refresh()
    assert "unlearned.safetensors" in caplog.text


@pytest.fixture
def more(given, tmp_path):
    """Files of new images, which are all alike."""
    with np.load(given.data) as arrays:
        images, labels = 255 - arrays["x_test"], arrays["y_test"]
    for name in ("new", "newer"):
        np.savez(tmp_path / f"{name}.npz", x=images, y=labels)
    return str(tmp_path / "new.npz"), str(tmp_path / "newer.npz")


def test_learning_that_was_interrupted_goes_on(run, more, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fastntk.Memory, "remember", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.learn(more[0])
    assert len(run.memory()[0].ids) == 20
    assert len(run.learn(more[0], full=True)[0].ids) == 24
    assert run.memory()[0].requests()[-1].certificate["error"] is not None
    with pytest.raises(fastntk.InputError, match="learned already"):
        run.learn(more[0])


def test_what_an_interrupted_learning_named_is_not_prepared_for(run, more):
    run._change(lambda settings: settings.joined(more[0]))
    assert len(prepared(run).ids) == 20
    assert run.settings().added == []


def test_two_processes_learn_and_one_had_refreshed(run, more, monkeypatch):
    """Each changes what it changes of the run's settings, and takes the rest as the others left it."""
    run.memory()[0].forget([3])
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_change", lambda *_: None)
        run.refresh()  # and is cut off before the run's model is the anchor
    _between(monkeypatch, lambda: Run(run.folder).learn(more[1]))
    run.learn(more[0])
    assert sorted(run.settings().added) == sorted(more)
    assert len(run.memory()[0].ids) == 27
    run.refresh()


def test_what_two_processes_learn_at_once_stays_in_the_data(run, more, monkeypatch):
    """The slower one is refused, and takes nothing away."""
    _between(monkeypatch, lambda: Run(run.folder).learn(more[0]))
    with pytest.raises(fastntk.InputError, match="in the memory already"):
        run.learn(more[0])
    assert run.settings().added == [more[0]]
    run.memory()[0].forget([f"new.npz/{place}" for place in range(4)])


def _between(monkeypatch, other):
    """The next time that a run has loaded its memory, somebody else does something first."""
    load = Run._loaded

    def slowly(run, *arguments):
        monkeypatch.setattr(Run, "_loaded", load)
        memory = load(run, *arguments)
        other()
        return memory

    monkeypatch.setattr(Run, "_loaded", slowly)


def test_learned_images_that_were_forgotten_may_be_deleted(run, more):
    memory = run.learn(more[0])[0]
    memory.forget([f"new.npz/{place}" for place in range(4)])
    os.remove(more[0])
    assert len(run.memory()[0].forget([5]).parameters) > 0
    run.refresh()


def test_learned_images_that_are_gone_can_be_forgotten_where_their_rows_are_held(given, run, more, tmp_path, caplog):
    other = Run(tmp_path / "other")
    other.fit(given, RECIPE)
    prepared(other, "matrix-free")
    for each in (run, other):
        each.learn(more[0])
    os.remove(more[0])
    with pytest.raises(fastntk.InputError, match="learned from .*new.npz are in the memory: put them back there"):
        other.memory()
    memory = run.memory()[0]
    assert "put them back there, or nothing can be measured on them" in caplog.text
    assert memory.forget(["new.npz/0", 3]).certificate.lost == 1


def test_learned_images_are_found_from_wherever_a_command_runs(run, more, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    memory = run.learn("new.npz")[0]
    monkeypatch.chdir("/")
    assert run.settings().added == [more[0]]
    assert memory.forget(["new.npz/0"]).certificate.lost == 0
    assert run.memory()[0].forget(["new.npz/1"]).certificate.lost == 0


def test_a_runs_own_data_are_not_learned(run, given, tmp_path, monkeypatch):
    """Who was forgotten would be in the memory again, under other names."""
    run.memory()[0].forget([3])
    monkeypatch.chdir(Path(given.data).parent)
    for spelled in (given.data, "data.npz", "./data.npz"):
        with pytest.raises(fastntk.InputError, match="are the run's own data.*fastntk remember"):
            run.learn(spelled)
    assert run.settings().added == []


def test_a_run_does_not_take_the_place_of_a_memory(run, given, tmp_path):
    memory, folder = run.memory()[0], tmp_path / "alone"
    memory.save(folder)
    memory.forget([3])
    with pytest.raises(fastntk.InputError, match="holds no run, but ledger.sqlite"):
        Run(folder).fit(given, RECIPE)


def test_no_file_takes_the_place_of_one_of_the_runs_own(run, tmp_path):
    run.memory()[0].forget([3])
    for name in ("model.safetensors", "initial.safetensors", "memory/base-1.safetensors"):
        with pytest.raises(fastntk.InputError, match="is the run's own. Name another file"):
            run.export(run.folder / name)
    for name, why in (("memory/new.json", "is the run's own. Name another file"), ("run.json", "is there already")):
        refuse(why, "forget", run.folder, "--ids", 5, "--certificate", run.folder / name)
    assert len(run.memory()[0].requests()) == 1


def test_a_certificate_is_not_replaced_and_what_was_cut_off_is_named(run, given, tmp_path):
    kept = tmp_path / "first.json"
    succeed("forget", run.folder, "--ids", 5, "--certificate", kept, "--defer-purge")
    first = kept.read_text()
    again = "forget", run.folder, "--ids", 6, "--certificate", kept
    refuse("first.json is there already.*a certificate is not replaced", *again)
    assert kept.read_text() == first
    refuse("not in the memory.*answered, and its trace not purged yet: fastntk purge", "forget", run.folder, "--ids", 5)
    os.rename(given.data, tmp_path / "gone.npz")
    succeed("purge", run.folder)  # for which no image is needed
    os.rename(tmp_path / "gone.npz", given.data)
    succeed("verify", run.folder)
    assert "not purged" not in refuse("not in the memory", "forget", run.folder, "--ids", 5)


def test_training_images_are_not_held_out_after_more_were_learned(given, more, tmp_path):
    with np.load(given.data) as arrays:
        np.savez(tmp_path / "whole.npz", x=arrays["x_train"], y=arrays["y_train"])
    made = Run(tmp_path / "run")
    made.fit(replace(given, data=str(tmp_path / "whole.npz")), RECIPE)
    prepared(made)
    made.learn(more[0])[0].forget([3])
    for test in (None, str(tmp_path / "whole.npz")):
        with pytest.raises(fastntk.InputError, match="has no test split"):
            made.evaluate(test, 1)


def test_held_out_data_need_no_ids(given, tmp_path):
    """Whatever names the samples of the run's own."""
    with np.load(given.data) as arrays:
        names = [f"n{place}" for place in range(20)]
        np.savez(tmp_path / "named.npz", **arrays, name_train=names)
    made = Run(tmp_path / "run")
    made.fit(replace(given, data=str(tmp_path / "named.npz"), id_column="name"), RECIPE)
    prepared(made)
    made.memory()[0].forget(["n3"])
    for test in (None, given.data):
        assert made.evaluate(test, 0).rows["original"]["test_accuracy"] is not None


def test_who_was_never_in_the_memory_is_not_shown_as_forgotten(given, tmp_path):
    """Forgotten ones were remembered, and as many images came to the data since: nobody can tell which is which."""
    with np.load(given.data) as arrays:
        images, labels = arrays["x_train"], arrays["y_train"]
    np.savez(tmp_path / "data.npz", x=images, y=labels)
    made = Run(tmp_path / "run")
    made.fit(replace(given, data=str(tmp_path / "data.npz")), RECIPE)
    prepared(made)
    np.savez(tmp_path / "data.npz", x=np.concatenate([images, 255 - images[:3]]), y=[*labels, *labels[:3]])
    made.memory()[0].forget([3, 4, 5])
    assert forgotten(made.memory()[1], made.memory()[0]) == [3, 4, 5]
    made.memory()[0].remember([3, 4, 5])
    with pytest.raises(fastntk.InputError, match="may never have been in it"):
        forgotten(made.memory()[1], made.memory()[0])


def test_learning_where_data_have_moved_and_owners_are_gone(given, more, tmp_path, caplog):
    """Owners are read where the data are now; where they cannot be, that is said, and the images are learned."""
    with np.load(given.data) as arrays:
        np.savez(tmp_path / "then.npz", x=arrays["x_train"], y=arrays["y_train"], who=["a", "b"] * 10)
    made = Run(tmp_path / "run")
    made.fit(replace(given, data=str(tmp_path / "then.npz"), owners="who"), RECIPE)
    prepared(made)
    os.rename(tmp_path / "then.npz", now := tmp_path / "now.npz")
    Run(made.folder, data=str(now)).learn(more[0])
    assert "4 of 4 images learned" in caplog.text
    assert "is not known" not in caplog.text
    made._change(lambda settings: replace(settings, owners=str(tmp_path / "nowhere.csv")))
    assert len(Run(made.folder, data=str(now)).learn(more[1])[0].ids) == 28
    assert "whose they are is not known" in caplog.text


def test_data_that_have_changed_since_the_fit_are_refused(given, tmp_path):
    """Who is gone from them would stay in the model, and no request could name it."""
    with np.load(given.data) as arrays:
        rows = dict(arrays)
    place, made = tmp_path / "data.npz", Run(tmp_path / "run")
    np.savez(place, **rows)
    made.fit(replace(given, data=str(place)), RECIPE)
    fewer = {name: each[:-1] if "train" in name else each for name, each in rows.items()}
    relabelled = {**rows, "y_train": np.roll(rows["y_train"], 1)}
    for others in (fewer, relabelled):
        np.savez(place, **others)
        with pytest.raises(fastntk.InputError, match="other samples or labels than those that the model was fitted to"):
            prepared(made)
    np.savez(place, **rows)
    for _ in range(2):
        prepared(made)
        np.savez(place, **fewer)
        with pytest.raises(fastntk.InputError, match="other samples or labels"):
            prepared(made)
        np.savez(place, **rows)
    memory, _ = made.memory()
    memory.forget([3])
    made.purge(memory)
    assert made.settings().samples is None, "of a request nothing is to be known by it"


def test_a_run_that_may_only_be_read_is_read(run, monkeypatch):
    """Whatever is under way in it."""
    monkeypatch.setattr(files.os, "access", lambda *_: False)
    monkeypatch.setattr(files, "discard", lambda path: pytest.fail("it removes a file"))
    (run.folder / "underway").touch()
    assert run.memory()[0].ids
    monkeypatch.undo()
    assert run.memory()[0].ids
    assert not (run.folder / "underway").exists()


def test_learned_images_are_told_from_others_of_a_like_name(given, tmp_path):
    """A run with a folder of the same name as what was learned."""
    data = photos(tmp_path / "photos", "anna", "bert", count=8)
    new = photos(tmp_path / "new" / "anna", "anna", "bert", count=2, first=20)
    made = Run(tmp_path / "run")
    made.fit(replace(given, data=str(data)), RECIPE)
    prepared(made)
    memory, _ = made.learn(str(new))
    memory.forget([each for each in memory.ids if str(each).startswith("anna/anna/") or "anna/bert/" in str(each)])
    made.purge(memory)
    shutil.rmtree(new)
    assert len(made.memory()[0].ids) == 16


def test_partial_sums_are_gone_before_the_ledger_says_purged(run, monkeypatch):
    (run.folder / "partial").mkdir()
    (run.folder / "partial" / "sums-0.safetensors").write_bytes(b"of everybody")
    memory, _ = run.memory()
    memory.forget([3])

    def killed(memory):
        raise Killed

    monkeypatch.setattr(fastntk.Memory, "purge", killed)
    with pytest.raises(Killed):
        run.purge(memory)
    assert not (run.folder / "partial").exists()
