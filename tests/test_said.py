"""What was done is what the command line says, whatever fails."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import RECIPE, photos, prepared, refuse, succeed

import fastntk
from fastntk.cli.commands import requests as commands
from fastntk.cli.printing import forgetting
from fastntk.cli.run import Run
from fastntk.common.errors import reason
from fastntk.memory.disk.ledger import Ledger
from fastntk.memory.memory import Memory


def states(folder):
    return [each["state"] for each in json.loads(succeed("ledger", folder, "--json"))["requests"]]


def test_a_purge_that_fails_is_no_failed_request(run, monkeypatch):
    def failing(self):
        raise fastntk.InputError("the disk is full.")

    monkeypatch.setattr(Memory, "purge", failing)
    refuse(r"the disk is full. The request is answered, and not purged: fastntk purge .*run", "forget", run.folder,
           "--ids", "3")  # fmt: skip
    monkeypatch.undo()
    assert states(run.folder) == ["answered"]
    assert "Purged 1 requests" in succeed("purge", run.folder)
    assert states(run.folder) == ["purged"]
    assert "nothing to purge" in succeed("purge", run.folder)


def test_an_answer_is_shown_when_its_purge_is_interrupted(run, monkeypatch, capsys):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Memory, "purge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        commands.forget(run.folder, ids="3")
    out = capsys.readouterr().out
    assert "forget: 1 samples" in out
    assert "answered, not purged" in out


@pytest.mark.parametrize("where", ["", "file/certificate.json"])
def test_a_certificate_that_cannot_be_written_is_refused_before_the_request(where, run, tmp_path):
    (tmp_path / "file").write_text("")
    refuse("is a folder|cannot be written", "forget", run.folder, "--ids", "3", "--certificate", tmp_path / where)
    assert states(run.folder) == []


def test_partial_sums_go_with_a_purge(run):
    (run.folder / "partial").mkdir()
    (run.folder / "partial" / "sums-0.safetensors").write_bytes(b"of everybody")
    succeed("forget", run.folder, "--ids", "3")
    assert not (run.folder / "partial").exists()


def test_brackets_are_brackets(run, tmp_path):
    for name in ("[red]", "[/]", "[bold", ":smile:"):
        refuse(re.escape(f"id {name!r} is not in the memory"), "forget", run.folder, "--ids", name)
        place = run.folder.rename(run.folder.with_name(name.replace("/", "|")))
        assert str(place.name) in succeed("forget", place, "--ids", "3", "--dry-run") + succeed("export", place)
        place.rename(run.folder)


def test_a_class_that_was_forgotten_may_be_deleted_from_the_disk(given, tmp_path):
    data = photos(tmp_path / "photos", "anna", "bert", "carl", count=8)
    run = Run(tmp_path / "run")
    run.fit(replace(given, data=str(data)), RECIPE)
    prepared(run)
    succeed("forget", run.folder, "--class-name", "bert")
    for emptied in (True, False):
        shutil.rmtree(data / "bert")
        if emptied:
            (data / "bert").mkdir()
        for command in (["export"], ["forget", "--ids", "anna/0.png", "--dry-run"], ["verify"], ["refresh"]):
            succeed(command[0], run.folder, *command[1:])
    photos(data, "dora")
    refuse("does not know: dora", "export", run.folder)


def test_forgetting_with_a_refresh_re_anchors(run):
    assert json.loads(succeed("forget", run.folder, "--ids", "3", "--refresh", "--json"))["samples"] == 1
    assert states(run.folder) == ["re-anchored", "purged"]
    refuse("leave out --defer-purge", "forget", run.folder, "--ids", "4", "--refresh", "--defer-purge")
    refuse("go with --refresh", "forget", run.folder, "--ids", "4", "--step-alone")


def test_what_cannot_be_re_anchored_as_asked_is_refused_before_anything_is_forgotten(run):
    refuse("a gain comes from an audit", "forget", run.folder, "--ids", "3", "--refresh", "--gain")
    assert states(run.folder) == []
    succeed("audit", run.folder)
    succeed("forget", run.folder, "--ids", "3", "--refresh", "--gain", "--exact-head")
    entry = run.memory()[0].requests()[-1].certificate
    assert entry["gain"] > 0
    assert entry["exact_head"] is True


def test_a_refresh_that_fails_leaves_the_answer_and_says_so(run, monkeypatch):
    def failing(*_arguments):
        raise fastntk.InputError("the disk is full.")

    monkeypatch.setattr(Run, "refresh", failing)
    said = "the disk is full. The request is answered and purged, the refresh not at its end: fastntk refresh .*run"
    refuse(said, "forget", run.folder, "--ids", "3", "--refresh")
    assert states(run.folder) == ["purged"]
    monkeypatch.undo()
    succeed("refresh", run.folder)


def test_what_cannot_be_re_anchored_for_want_of_an_image_is_refused_before(given, tmp_path):
    data = photos(tmp_path / "photos", "anna", "bert", count=8)
    run = Run(tmp_path / "run")
    run.fit(replace(given, data=str(data)), RECIPE)
    prepared(run)
    everyone = ",".join(map(str, run.memory()[0].ids[1:]))
    refuse("needs at least 2 samples", "forget", run.folder, "--ids", everyone, "--refresh")
    (data / "bert" / "7.png").unlink()
    refuse("lacks 1 of the memory's 15 samples", "forget", run.folder, "--ids", "anna/0.png", "--refresh")
    assert states(run.folder) == []


def test_a_refresh_that_is_cut_off_is_said(run, monkeypatch):
    """The ledger may say "re-anchored" before the run's model is replaced."""
    run.memory()[0].forget([3])

    def killed(*_arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_change", killed)
        with pytest.raises(KeyboardInterrupt):
            run.refresh()
    assert "A refresh has begun and has not come to its end" in succeed("ledger", run.folder)
    assert json.loads(succeed("ledger", run.folder, "--json"))["refreshing"]
    succeed("verify", run.folder)
    assert not json.loads(succeed("ledger", run.folder, "--json"))["refreshing"]


def test_an_answer_whose_comparison_fails_is_an_answer(run, tmp_path, monkeypatch, caplog):
    """--full compares when the answer is durable already."""

    def failing(self, certificate):
        raise fastntk.InputError("the disk is full.")

    monkeypatch.setattr(Ledger, "amend", failing)
    with caplog.at_level("WARNING"):
        succeed("forget", run.folder, "--ids", "3", "--full", "--certificate", tmp_path / "c.json")
    assert "the request is answered; what was to follow failed: the disk is full." in caplog.text
    assert json.loads((tmp_path / "c.json").read_text())["salt"]
    assert states(run.folder) == ["purged"]


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("finite", ["--learning-rate", "inf"]),
        ("finite", ["--learning-rate", "nan"]),
        ("finite", ["--weight-decay", "nan"]),
        ("Input should be", ["--seed", "-1"]),
        ("Input should be", ["--seed", "99999999999999999999999"]),
        ("Input should be", ["--image-size", "0"]),
        (r"cannot take images of shape \[3, 1, 1\].*another size", ["--image-size", "1"]),
        (r"memory does not suffice.* \[3, 9000000, 9000000\]", ["--image-size", "9000000"]),
        ("is not there", ["--device", "meta"]),
        ("selector is empty", ["--select", ""]),
    ],
)
def test_numbers_out_of_range(message, arguments, given, tmp_path):
    start = ["--model", given.model, "--data", given.data, "--epochs", 1]
    refuse(message, "fit", tmp_path / "new", *start, *arguments)
    assert not (tmp_path / "new" / "run.json").exists()


def test_a_fit_writes_over_nobody_s_files(given, tmp_path):
    (tmp_path / "model.safetensors").write_text("precious")
    refuse("holds no run, but model.safetensors", "fit", tmp_path, "--model", given.model, "--data", given.data)
    assert (tmp_path / "model.safetensors").read_text() == "precious"


@pytest.mark.parametrize("fraction", ["0", "1", "-0.1", "nan", "inf"])
def test_a_fraction_is_between_0_and_1(fraction, run):
    refuse("must be between 0 and 1", "audit", run.folder, "--fraction", fraction)


def test_a_device_that_is_none_is_refused_by_the_demo_too(tmp_path):
    refuse("is not there", "demo", "--device", "tpu", "--out", tmp_path / "d")


@pytest.mark.parametrize(
    ("ids", "command"),
    [
        ([0, 1, 2], "forget 'a run' --ids 0,1"),
        (["red/1.png", "it's.png"], "forget 'a run' --ids 'red/1.png,it'\"'\"'s.png'"),
        (["a, b", "c"], "forget 'a run' --ids c"),
        (["a b", "a\tc"], "forget 'a run' --ids-file ids.txt"),
        ([3], "forget 'a run' --ids 3"),
    ],
)
def test_the_command_that_is_said_can_be_typed(ids, command, monkeypatch):
    monkeypatch.setattr("fastntk.memory.exact.forgettable", lambda _: ids)
    assert forgetting(Path("a run"), SimpleNamespace(state=None)) == f"fastntk {command}"


def test_what_a_library_says_at_length_is_cut():
    assert reason(ValueError("no.\nmore")) == "no"
    assert reason(KeyError()) == "KeyError"
    assert len(reason(ValueError("a" * 10_000))) < 310
