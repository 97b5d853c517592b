"""What a memory's folder does to what it did not write, and what a failure or a kill leaves of it."""

import contextlib
import errno
import os
from pathlib import Path

import pytest
from faults import Killed, failing
from memories import close, prepared, reopened, saved

import fastntk
from fastntk.common import files
from fastntk.memory.disk import ledger


def test_what_it_did_not_write_stays(tmp_path):
    memory, folder = saved(tmp_path / "m"), tmp_path / "m"
    others = {"notes.txt", ".env", "my-weights.safetensors", "base-of-all.safetensors", ".git"}
    for name in others - {".git"}:
        (folder / name).write_text("precious")
    (folder / ".git").mkdir()
    memory.forget([3])
    memory.purge()
    reopened(memory, folder)
    assert others <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", [".env", "model.safetensors", ".git/"])
def test_a_folder_of_other_things_is_refused(name, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / name).mkdir() if name.endswith("/") else (tmp_path / "m" / name).write_text("precious")
    with pytest.raises(fastntk.InputError, match="holds other files"):
        prepared().save(tmp_path / "m")
    assert [path.name for path in (tmp_path / "m").iterdir() if path.name != "lock"] == [name.strip("/")]


def test_a_lost_ledger_is_no_leave_to_start_anew(tmp_path):
    memory = saved(tmp_path / "m")
    memory.forget([3])
    for path in (tmp_path / "m").glob("ledger*"):
        path.unlink()
    with pytest.raises(fastntk.InputError, match="make samples members again"):
        prepared().save(tmp_path / "m")
    with pytest.raises(fastntk.InputError, match="no ledger"):
        reopened(memory, tmp_path / "m")


def test_a_link_is_not_taken_for_a_file(tmp_path):
    memory = saved(tmp_path / "m")
    [base] = (tmp_path / "m").glob("base-*")
    base.rename(tmp_path / "elsewhere")
    base.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(fastntk.InputError, match="is a link: a purge would leave"):
        reopened(memory, tmp_path / "m")


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_worked_out(tmp_path, monkeypatch):
    memory, computed = saved(tmp_path / "m"), []

    def refused(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refused)
    monkeypatch.setattr(fastntk.memory.memory, "draft", lambda *_: computed.append("request"))
    monkeypatch.setattr(fastntk.memory.memory, "refreshed", lambda *_: computed.append("refresh"))
    for change in (
        lambda: memory.forget([3]),
        lambda: memory.remember([3]),
        lambda: fastntk.refresh(memory),
        lambda: fastntk.audit(memory, lambda *_: computed.append("retraining")),
    ):
        with pytest.raises(fastntk.InputError, match="cannot be written .*make it writable"):
            change()
    assert not computed


def test_a_relative_folder_stays_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    memory = saved(Path("m"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    memory.forget([3])
    assert not list((tmp_path / "elsewhere").iterdir())
    assert 3 not in reopened(memory, tmp_path / "m").ids


def test_a_seal_that_cannot_be_written_is_made_up_for(tmp_path, monkeypatch, caplog):
    memory = saved(tmp_path / "m")
    failing(monkeypatch, ledger, "write_json", 2, fastntk.InputError("the disk is full."))
    answer = memory.forget([3])
    assert "made up for" in caplog.text
    monkeypatch.undo()
    again = reopened(memory, tmp_path / "m")
    close(again.parameters, answer.parameters, 0)
    assert [each.state for each in again.requests()] == ["answered"]


def test_a_journal_that_the_ledger_names_is_never_removed(tmp_path, monkeypatch):
    """The commit is durable and says that it failed."""
    memory = saved(tmp_path / "m")
    answered = ledger.Ledger.answer

    def torn(self, *arguments):
        answered(self, *arguments)
        raise fastntk.InputError("no answer from the disk.")

    monkeypatch.setattr(ledger.Ledger, "answer", torn)
    answer = memory.forget([3])
    monkeypatch.undo()
    close(reopened(memory, tmp_path / "m").parameters, answer.parameters, 0)


@pytest.mark.parametrize("call", range(1, 9))
@pytest.mark.parametrize("again", [False, True], ids=["new", "in place of an unused one"])
def test_making_a_memory_can_be_cut_off_anywhere(again, call, tmp_path, monkeypatch):
    memory, folder = prepared(), tmp_path / "m"
    if again:
        memory.save(folder)
    failing(monkeypatch, files.os, "fsync", call, Killed())
    with contextlib.suppress(Killed):
        prepared().save(folder)
    monkeypatch.undo()
    if again or (folder / "ledger.sqlite").exists():
        close(reopened(memory, folder).parameters, memory.parameters, 0)
    else:
        with pytest.raises(fastntk.InputError, match="Prepare one first"):
            reopened(memory, folder)
    memory = prepared()
    memory.save(folder)
    answer = memory.forget([3])
    close(reopened(memory, folder).parameters, answer.parameters, 0)
    [base] = folder.glob("base-*")
    left = {base.name, "journal-1.safetensors", "ledger.sqlite", "ledger.sqlite.sha256", "lock"}
    assert {path.name for path in folder.iterdir()} == left


@pytest.mark.parametrize("call", range(1, 12))
def test_a_write_that_fails_leaves_before_or_after_and_can_be_repeated(call, tmp_path, monkeypatch):
    memory, folder = saved(tmp_path / "m"), tmp_path / "m"
    before, after = memory.parameters, memory.preview([3]).parameters
    calls = failing(monkeypatch, os, "fsync", call, OSError(errno.EIO, "the disk does not answer"))
    errors = []
    for step in (lambda: memory.forget([3]), memory.purge):
        try:
            step()
        except fastntk.InputError as error:
            errors.append(error)
    monkeypatch.undo()
    assert errors or calls[0] < call or (folder / "ledger.sqlite.sha256").exists()
    again = reopened(memory, folder)
    done = bool(again.requests())
    close(again.parameters, after if done else before, 0)
    if not done:
        again.forget([3])
    again.purge()
    assert [each.state for each in again.requests()] == ["purged"]
    assert not list(folder.glob("journal*"))
    assert not list(folder.glob(".*"))
