"""Versions of what is on disk: older ones are upgraded, others refused by name, and nothing missing is a KeyError."""

import copy
import json
import shutil
import sqlite3
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from cases import CASES
from memories import close, moved, prepared

import fastntk
from fastntk.cli.run import Run
from fastntk.common.files import digest, file_digest, read_tensors, write_json, write_tensors
from fastntk.common.formats import Document, Format, unchanged
from fastntk.evidence.bench import results
from fastntk.evidence.bench.results import Results
from fastntk.memory.disk.packing import pack

FORMS, CONVEX = ["primal", "dual", "matrix-free"], ["convex", "convex-disk", "layerwise"]
OLD = Path(__file__).parent / "folders"
"""Memories that versions of before wrote: the case "bn+head", ridge 0.5, audited, 3 and 8 forgotten and purged, then 8
remembered and 1 forgotten."""


@dataclass
class Holder:
    document: dict


def resealed(folder):
    """The ledger names the files as they are now."""
    with sqlite3.connect(folder / "ledger.sqlite") as database:
        for (name,) in database.execute("SELECT name FROM files").fetchall():
            database.execute("UPDATE files SET sha256 = ? WHERE name = ?", (file_digest(folder / name), name))
    database.close()
    write_json(folder / "ledger.sqlite.sha256", {"sha256": file_digest(folder / "ledger.sqlite")})


def rewritten(folder, change):
    """A base whose record was changed, in place of the one there."""
    [path] = folder.glob("base-*.safetensors")
    tensors, record = read_tensors(path)
    change(tensors, record)
    write_tensors(path, tensors, record)
    resealed(folder)


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_of_before_formats_is_opened_and_goes_on(form, tmp_path):
    folder = shutil.copytree(OLD / f"0-{form}", tmp_path / "m")
    case = CASES["bn+head"]
    model = case.model()
    memory = fastntk.load(folder, model, case.data())
    same = fastntk.prepare(model, case.data(), moved(model), form=form, ridge=0.5, loss=fastntk.SquaredLoss())
    same.forget([3, 8])
    same.remember([8])
    same.forget([1])
    close(memory.parameters, same.parameters, 1e-9 if form != "matrix-free" else 1e-5)
    assert (memory.form, memory.ridge, memory.audit.samples) == (form, 0.5, 3)
    assert sorted(memory.ids) == [i for i in range(14) if i not in (1, 3)]
    assert memory.state.solution.over.tolist() == memory.state.positions.tolist()
    assert [each.kind for each in memory.requests()] == ["audit", "forget", "remember", "forget"]
    assert "inexactness" in memory.requests()[1].certificate
    assert fastntk.copies(memory, [5]) is None, "nobody kept that then"
    answer = memory.forget([5])
    assert answer.certificate.copies is None
    memory.purge()
    again = fastntk.load(folder, model, case.data())
    close(again.parameters, answer.parameters, 0)
    [path] = folder.glob("base-*")
    assert read_tensors(path, names=[])[1]["format"] == 6
    fastntk.refresh(memory)
    assert fastntk.copies(memory, [7]) == []


@pytest.mark.parametrize(
    ("form", "loss"),
    [(form, fastntk.SquaredLoss()) for form in FORMS] + [(form, fastntk.CrossEntropy()) for form in CONVEX],
)
def test_whatever_is_missing_is_an_input_error_that_names_it(form, loss, tmp_path):
    memory = prepared(form=form, ridge="auto", loss=loss)
    tensors, record = pack(memory.state)
    memory.save(tmp_path / "whole")
    places = [(0, name) for name in tensors if name != "head_shortfall"] + [(1, name) for name in record]
    places += [(1, f"numerics.{name}") for name in record["numerics"]]
    for number, (place, name) in enumerate(places):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(number))

        def without(*parts, place=place, name=name):
            *path, key = name.split(".") if place else [name]
            inside = parts[place]
            for step in path:
                inside = inside[step]
            del inside[key]

        rewritten(folder, without)
        with pytest.raises(fastntk.InputError, match=f"{name.rpartition('.')[2] if place else ''}.*is missing in it"):
            fastntk.load(folder, memory.model, memory.state.members.source)
        shutil.rmtree(folder)


def test_a_format_of_the_future_is_refused_and_its_writer_named(tmp_path):
    memory = prepared()
    memory.save(tmp_path / "m")
    rewritten(tmp_path / "m", lambda _, record: record.update(format=9, fastntk="7.5.0"))
    message = r"base-1.*format 9, written by fastntk 7\.5\.0.*knows formats 0 to 6.*Install"
    with pytest.raises(fastntk.InputError, match=message):
        fastntk.load(tmp_path / "m", memory.model, memory.state.members.source)
    prepared().save(tmp_path / "l")
    with sqlite3.connect(tmp_path / "l" / "ledger.sqlite") as database:
        database.execute("UPDATE about SET format = 4, fastntk = '2.0.0'")
    resealed(tmp_path / "l")
    with pytest.raises(fastntk.InputError, match=r"ledger\.sqlite.*format 4, written by fastntk 2\.0\.0"):
        fastntk.load(tmp_path / "l", memory.model, memory.state.members.source)


def test_a_ledgers_entry_of_the_future_is_refused(tmp_path):
    memory = prepared()
    memory.save(tmp_path / "m")
    memory.forget([3])
    with sqlite3.connect(tmp_path / "m" / "ledger.sqlite") as database:
        [(text,)] = database.execute("SELECT certificate FROM requests").fetchall()
        entry = json.dumps({**json.loads(text), "format": 5})
        database.execute("UPDATE requests SET certificate = ?", (entry,))
    resealed(tmp_path / "m")
    with pytest.raises(fastntk.InputError, match="ledger's entry, format 5"):
        memory.requests()


def test_run_json_of_every_version(tmp_path):
    given = {
        "model": "resnet18", "data": "d.npz", "root": None, "classes": ["a"], "select": ["bn"], "size": 32,
        "recipe": {"epochs": 1, "loss": {"name": "cross-entropy"}}, "id_column": None, "files": {},
    }  # fmt: skip
    path = tmp_path / "run.json"
    write_json(path, given)
    assert Run(tmp_path).settings().model == "resnet18"
    assert Run(tmp_path).settings().recipe["loss"]["smoothing"] == 0
    for key in given:
        write_json(path, {name: value for name, value in given.items() if name != key})
        with pytest.raises(fastntk.InputError, match=f"'{key}' is missing in it"):
            Run(tmp_path).settings()
    write_json(path, {**given, "format": 9, "fastntk": "9.9"})
    with pytest.raises(fastntk.InputError, match=r"run, format 9, written by fastntk 9\.9"):
        Run(tmp_path).settings()


def test_results_of_every_version(tmp_path):
    path = tmp_path / "results.sqlite"
    with sqlite3.connect(path) as database:
        for table in results._TABLES:
            database.execute(table)
        database.execute("INSERT INTO about VALUES (:format, :fastntk)", results.FORMAT.stamped({}))
    before = digest({"file": torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)})
    assert Results(path).cells() == []
    assert digest({"file": torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)}) == before
    with sqlite3.connect(path) as database:
        database.execute("UPDATE about SET format = 3, fastntk = '3.1'")
    with pytest.raises(fastntk.InputError, match=r"results, format 3, written by fastntk 3\.1"):
        Results(path)
    with sqlite3.connect(path) as database:
        database.execute("DROP TABLE about")
    with pytest.raises(fastntk.InputError, match=r"of an older fastntk, before 0\.1\.0\. Run the grid anew"):
        Results(path)


def test_upgrades_follow_each_other():
    kind = Format("thing", (lambda d: {**d, "b": d["a"]}, lambda d: {**d, "c": d["b"] + 1}, unchanged))
    assert kind.read({"a": 1}, Path("x")) == {"a": 1, "b": 1, "c": 2}
    assert kind.read({"format": 1, "b": 4}, Path("x")) == {"b": 4, "c": 5}
    assert kind.read(kind.stamped({"c": 0}), Path("x")) == {"c": 0}
    for damaged in ({"format": "new"}, {"format": -1}, {"format": 0}):
        with pytest.raises(fastntk.InputError, match="thing"):
            kind.read(damaged, Path("x"))


def test_a_document_names_what_is_missing_at_any_depth():
    document = Document({"a": {"b": [{"c": 1}]}}, "the file")
    assert document["a"]["b"][0]["c"] == 1
    assert copy.deepcopy(document) == asdict(Holder(document))["document"] == document
    for ask in (lambda: document["x"], lambda: document["a"]["x"], lambda: document["a"]["b"][0]["x"]):
        with pytest.raises(fastntk.InputError, match="the file: 'x' is missing"):
            ask()
