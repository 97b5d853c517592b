"""A file of requests: what becomes of each, what is written, and a batch that goes on."""

import json
import shutil
from hashlib import sha256

import numpy as np
import pytest
from runs import refuse, succeed

import fastntk
from fastntk.cli import batch
from fastntk.cli.asked import owned
from fastntk.cli.batch import ANSWERED, GONE, REFUSED, UNKNOWN, Asked, read_requests
from fastntk.cli.run import Run
from fastntk.common import files
from fastntk.inputs.owners import owners_of
from fastntk.memory.memory import Memory
from fastntk.memory.request import hashed

TABLE = """request,owner,ids,date
r1,Zuleika,,2026-11-20
r2,,"4, 5 77",2026-11-21
r3,Nobody,,
r/4,,0 1,2026-11-23
r5,,99,
"""


@pytest.fixture
def asked(tmp_path):
    """A file of requests, and whose the images are."""
    (tmp_path / "asked.csv").write_text(TABLE)
    (tmp_path / "owners.csv").write_text("id,owner\n0,Zuleika\n1,Zuleika\n9,Bob\n")
    return tmp_path / "asked.csv"


def test_a_batch(fitted, colours, asked, tmp_path, monkeypatch):
    """Killed before the second answer, and after it before its certificate; then gone on with."""
    folder, out = shutil.copytree(fitted, tmp_path / "run"), tmp_path / "out"
    people = str(tmp_path / "owners.csv")
    given = ("forget", folder, "--requests", asked, "--out", out, "--owners", people)
    opened, before = Run(folder), Memory.forget

    def killed(after):
        def forget(self, ids, **more):
            answer = before(self, ids, **more) if after or 4 not in ids else None
            if 4 in ids:
                raise KeyboardInterrupt
            return answer

        monkeypatch.setattr(Memory, "forget", forget)
        with pytest.raises(KeyboardInterrupt):
            batch.answer_all(
                opened, read_requests(asked), out, lambda images, absent: owners_of(people, "", images, absent)
            )

    killed(after=False)
    assert len(opened.memory()[0].requests()) == 1
    killed(after=True)
    assert len(opened.memory()[0].requests()) == 2
    monkeypatch.undo()

    summary = json.loads(succeed(*given, "--json"))
    became = {
        row["request"]: (row["became"], *(row[name] for name in ("samples", "gone", "unknown")))
        for row in summary["requests"]
    }
    assert became == {
        "r1": (ANSWERED, 2, 0, 0),
        "r2": (ANSWERED, 2, 0, 1),
        "r3": (UNKNOWN, 0, 0, 0),
        "r/4": (GONE, 0, 2, 0),
        "r5": (UNKNOWN, 0, 0, 1),
    }
    assert summary["purged"]
    assert summary["samples_left"] == len(np.load(colours)["y_train"]) - 4
    assert summary["unowned"] == len(np.load(colours)["y_train"]) - 5, "0, 1 and 9 have owners; 4 and 5 had gone"
    entries = json.loads(succeed("ledger", folder, "--json"))["requests"]
    assert [each["state"] for each in entries] == ["purged", "purged"]
    assert sorted(path.name for path in (out / "certificates").iterdir()) == ["r1.json", "r2.json"]
    first, second = (json.loads((out / "certificates" / f"r{k}.json").read_text())["certificate"] for k in (1, 2))
    twin = shutil.copytree(fitted, tmp_path / "twin")
    assert first["after"] == json.loads(succeed("forget", twin, "--ids", "0,1", "--json"))["after"]
    assert first["salt"]
    for name, ids in (("r1", ["0", "1"]), ("r2", ["4", "5"])):
        filed = json.loads((out / "certificates" / f"{name}.json").read_text())
        assert filed["hashes"] == hashed(ids, filed["salt"]), "who has the file can check an id"
    assert second["hashes"] == entries[1]["certificate"]["hashes"], "from the ledger, which has no salt"
    shown = (out / "summary.html").read_text()
    assert "2026-11-21" in shown
    assert "no audit" in shown
    assert "nobody was known to be the owner" in shown
    row = repr(("r1", "Zuleika", "", "2026-11-20", False))
    unsalted = sha256(row.encode()).hexdigest().encode()
    for path in [*out.rglob("*"), *folder.rglob("*")]:
        assert path.is_dir() or not any(name in path.read_bytes() for name in (b"Zuleika", b"Nobody", unsalted))
    assert "Purged." in succeed(*given)
    succeed("remember", folder, "--ids", "0,4")
    again = {row["request"]: row.get("back") for row in json.loads(succeed(*given, "--json"))["requests"]}
    assert (again["r1"], again["r2"]) == (None, 1), "of the first request an identical one has forgotten it again"
    assert len(json.loads(succeed("ledger", folder, "--json"))["requests"]) == 4, "r/4 took what had come back"
    asked.write_text("request,owner,ids,date\nr1,,7,2026-12-20\n")
    refuse("not of the request 'r1' as it stands", *given)
    refuse("--out.*go together", *given[:4])
    refuse("--requests answers.*--full", *given, "--full")
    refuse("--requests answers.*--dry-run", *given, "--dry-run")


def test_a_request_that_is_refused_does_not_keep_the_others(fitted, colours, tmp_path):
    folder, count = shutil.copytree(fitted, tmp_path / "run"), len(np.load(colours)["y_train"])
    rows = [
        {"request": "everyone", "ids": list(range(count))},
        {"request": "summary", "ids": [3, 3, "3"]},
        {"request": "x" * 300, "ids": [4]},
    ]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    refuse("some requests were refused", "forget", folder, "--requests", tmp_path / "asked.jsonl", "--out", out)
    summary = json.loads((out / "summary.json").read_text())
    assert [row["became"] for row in summary["requests"]] == [REFUSED, ANSWERED, ANSWERED]
    assert [row["samples"] for row in summary["requests"]] == [count, 1, 1]
    assert summary["purged"]


def test_what_another_command_answered_meanwhile_is_not_taken_for_a_request(fitted, tmp_path, monkeypatch):
    """Killed after it said what it would do; then somebody else's request gets the number that it had in mind."""
    folder, out = shutil.copytree(fitted, tmp_path / "run"), tmp_path / "out"
    (tmp_path / "asked.csv").write_text("request,ids\nr1,4 5\n")

    def killed(self, ids, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(Memory, "forget", killed)
    with pytest.raises(KeyboardInterrupt):
        batch.answer_all(Run(folder), read_requests(tmp_path / "asked.csv"), out, lambda images, absent: {})
    monkeypatch.undo()
    succeed("forget", folder, "--ids", "7,8")
    [row] = json.loads(succeed("forget", folder, "--requests", tmp_path / "asked.csv", "--out", out, "--json"))[
        "requests"
    ]
    assert (row["became"], row["samples"], row["number"]) == (ANSWERED, 2, 2)
    assert not {4, 5} & set(Run(folder).memory()[0].ids)
    (tmp_path / "asked.csv").write_text('request,ids\nr1,4 5\nr2,",,"\n')
    rows = json.loads(succeed("forget", folder, "--requests", tmp_path / "asked.csv", "--out", out, "--json"))[
        "requests"
    ]
    assert [each["became"] for each in rows] == [ANSWERED, UNKNOWN]


def test_requests_as_a_table_and_as_lines_of_json(asked, tmp_path):
    rows = [
        {"request": "r1", "owner": "Zuleika", "date": "2026-11-20"},
        {"request": "r2", "ids": [4, 5, 77], "date": "2026-11-21"},
    ]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    first, second, *_ = read_requests(asked)
    assert read_requests(tmp_path / "asked.jsonl") == [first, Asked("r2", "", "4\n5\n77", "2026-11-21", lines=True)]
    assert second.ids == "4, 5 77"
    (tmp_path / "lines.csv").write_text('request,ids\nr1,"4\n5"\n')
    assert read_requests(tmp_path / "lines.csv")[0].ids == "4\n5"
    (tmp_path / "commas.jsonl").write_text(
        '{"request": "r1", "ids": ["a,b.jpg", "z.jpg"]}\n{"request": "r2", "ids": 0}'
    )
    commas, zero = read_requests(tmp_path / "commas.jsonl")
    assert (commas.ids, commas.lines, zero.ids) == ("a,b.jpg\nz.jpg", True, "0")


def test_a_file_in_another_encoding_is_refused(tmp_path):
    text = "request,owner\nr1,Zoë\n"
    for row in ("r1,Zoë,", "Zoë,r1,", "r1,a,5. März"):
        (tmp_path / "asked").write_text(f"request,owner,date\n{row}\n", encoding="latin-1")
        with pytest.raises(fastntk.InputError, match="request 1: not all of it is text in UTF-8"):
            read_requests(tmp_path / "asked")
    (tmp_path / "asked").write_text(text, encoding="utf-16")
    with pytest.raises(fastntk.InputError, match="no text in UTF-8"):
        read_requests(tmp_path / "asked")
    (tmp_path / "asked").write_text(text, encoding="utf-8-sig")
    assert read_requests(tmp_path / "asked")[0].owner == "Zoë"


def test_lines_of_nothing_are_left_out(tmp_path):
    (tmp_path / "asked").write_text("\n\nrequest,owner,ids,date\nr1,a,,\n,,,\n\nr2,,3,\n")
    assert [each.request for each in read_requests(tmp_path / "asked")] == ["r1", "r2"]


def test_two_do_not_answer_into_one_folder(fitted, colours, asked, tmp_path, monkeypatch):
    folder, out = shutil.copytree(fitted, tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(files, "_WAIT", 0.01)
    given = "forget", folder, "--requests", asked, "--out", out, "--owners", tmp_path / "owners.csv"
    with files.lock_of(out):
        refuse("out is in use by another process", *given)
    assert not list((out / "certificates").iterdir())
    assert not Run(folder).memory()[0].requests()


def test_an_owner_is_known_in_either_form_of_unicode():
    assert owned({1: "Zoe\u0308", 2: "Zoë", 3: "Zoe"}, "Zoë") == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("request,owner,ids\nr1,,\n", "request 1: needs a name, and either an owner or ids"),
        ("request,owner,ids\nr1,a,3\n", "request 1: needs a name, and either"),
        ("request,owner\nr1,a\nr1,b\n", "request 2: another one is called 'r1' too"),
        ("request,owner\nr1,a,b,c\n", "more entries than there are columns"),
        ("request,who\nr1,a\n", "there is no column 'who'; its columns are request, owner, ids, date"),
        ("request,owner\n", "has no request in it"),
        ('{"request": "r1", "ids": [3]}\n{nothing\n', "request 2 is no JSON"),
        ('{"request": "r1", "ids": [3]}\n[1]\n', "request 2: must be an object"),
        ('{"request": "r1", "ids": [3, "a\\nb"]}', "request 1: an id has a line break"),
    ],
)
def test_a_file_that_is_none_is_refused(text, message, tmp_path):
    (tmp_path / "asked").write_text(text)
    with pytest.raises(fastntk.InputError, match=message):
        read_requests(tmp_path / "asked")
