"""A file of requests: what becomes of each, what is written, and a batch that goes on."""

import json
import shutil

import numpy as np
import pytest
from test_cli import data, refuse, run, succeed  # noqa: F401

import fastntk
from fastntk.cli.batch import ANSWERED, GONE, UNKNOWN, Asked, read_requests
from fastntk.memory.memory import Memory

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


def test_a_batch(run, data, asked, tmp_path, monkeypatch):  # noqa: F811
    folder = shutil.copytree(run, tmp_path / "run")
    given = ("forget", folder, "--requests", asked, "--out", tmp_path / "out", "--owners", tmp_path / "owners.csv")
    before = Memory.forget

    def killed(self, ids, **more):
        if 4 in ids:
            raise KeyboardInterrupt
        return before(self, ids, **more)

    monkeypatch.setattr(Memory, "forget", killed)
    from fastntk.cli import batch
    from fastntk.cli.asked import owners
    from fastntk.cli.run import Run

    opened = Run(folder)
    whose = lambda images: owners(opened.settings(), None, images, str(tmp_path / "owners.csv"))  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        batch.answer_all(opened, read_requests(asked), tmp_path / "out", whose)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["r1.json"]

    summary = json.loads(succeed(*given, "--json"))
    became = {row["request"]: (row["became"], row["samples"]) for row in summary["requests"]}
    assert became == {
        "r1": (ANSWERED, 2),
        "r2": (ANSWERED, 2),
        "r3": (UNKNOWN, 0),
        "r/4": (GONE, 0),
        "r5": (UNKNOWN, 0),
    }
    assert summary["purged"]
    assert summary["samples_left"] == len(np.load(data)["y_train"]) - 4
    entries = json.loads(succeed("ledger", folder, "--json"))["requests"]
    assert [each["state"] for each in entries] == ["purged", "purged"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "r1.json",
        "r2.json",
        "summary.html",
        "summary.json",
    ]
    certificate = json.loads((tmp_path / "out" / "r1.json").read_text())["certificate"]
    twin = shutil.copytree(run, tmp_path / "twin")
    assert certificate["after"] == json.loads(succeed("forget", twin, "--ids", "0,1", "--json"))["after"]
    assert certificate["salt"]
    page = (tmp_path / "out" / "summary.html").read_text()
    assert "2026-11-21" in page
    assert "no audit" in page
    for path in [*(tmp_path / "out").iterdir(), *folder.rglob("*")]:
        assert path.is_dir() or not {b"Zuleika", b"Nobody"} & {
            w for w in (b"Zuleika", b"Nobody") if w in path.read_bytes()
        }
    again = succeed(*given)
    assert "Purged." in again
    assert len(json.loads(succeed("ledger", folder, "--json"))["requests"]) == 2
    refuse("--out.*go together", *given[:4])
    refuse("--requests answers.*--full", *given, "--full")
    refuse("--requests answers.*--dry-run", *given, "--dry-run")


def test_requests_as_a_table_and_as_lines_of_json(asked, tmp_path):
    rows = [
        {"request": "r1", "owner": "Zuleika", "date": "2026-11-20"},
        {"request": "r2", "ids": [4, 5, 77], "date": "2026-11-21"},
    ]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    first, second, *_ = read_requests(asked)
    assert read_requests(tmp_path / "asked.jsonl") == [first, Asked("r2", "", "4,5,77", "2026-11-21")]
    assert second.ids == "4, 5 77"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("request,owner,ids\nr1,,\n", "request 1: needs a name, and either an owner or ids"),
        ("request,owner,ids\nr1,a,3\n", "request 1: needs a name, and either"),
        ("request,owner\nr1,a\nr1,b\n", "request 2: another one is called 'r1' too"),
        ("request,owner\nr/1,a\nr_1,b\n", "request 2: another one is called 'r_1' too, or nearly so"),
        ("request,who\nr1,a\n", "there is no column 'who'; its columns are request, owner, ids, date"),
        ("request,owner\n", "has no request in it"),
        ('{"request": "r1", "ids": [3]}\n{nothing\n', "request 2 is no JSON"),
        ('{"request": "r1", "ids": [3]}\n[1]\n', "request 2: must be an object"),
    ],
)
def test_a_file_that_is_none_is_refused(text, message, tmp_path):
    (tmp_path / "asked").write_text(text)
    with pytest.raises(fastntk.InputError, match=message):
        read_requests(tmp_path / "asked")
