"""Whose the samples are: from a file, a column and a pattern, and requests that name people."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from runs import MODEL, RECIPE, photos, prepared, refuse, succeed

import fastntk
from fastntk.cli.batch import ANSWERED, REFUSED
from fastntk.cli.run import Run
from fastntk.inputs.images import Images, Preprocessing
from fastntk.inputs.owners import owners_of

IDS = ["alice/1.png", "alice/2.png", "bob/1.png", "3", "é/1.png"]


def images(*ids):
    ids = ids or IDS
    pixels = np.zeros((len(ids), 4, 4, 3), dtype=np.uint8)
    return Images(pixels, [0] * len(ids), ["one"], Preprocessing(4, (0.5,) * 3, (0.5,) * 3), ids=ids)


def written(tmp_path, text):
    path = tmp_path / "owners.csv"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_owners_from_a_file(tmp_path):
    text = '\ufeffimage,who\nalice/1.png, Alice \n"bob/1.png","Bob, Jr."\n\n3,Alice\nlong/gone.png,Carol\né/1.png,\n'
    found = owners_of(written(tmp_path, text), "anywhere", images())
    assert found == {"alice/1.png": "Alice", "bob/1.png": "Bob, Jr.", "3": "Alice"}


def test_owners_from_a_pattern():
    assert owners_of("^([^/]+)/", "anywhere", images()) == {
        "alice/1.png": "alice",
        "alice/2.png": "alice",
        "bob/1.png": "bob",
        "é/1.png": "é",
    }


def test_owners_of_members_whose_images_are_gone():
    """By what their ids are in their own source, wherever they were learned from."""
    whole = images("cat/bob/1.png")
    for learned in ("/d/january", "/d/december"):
        whole = whole.joined_by(images("cat/carl/1.png"), learned)
    absent = ["january/cat/alice/1.png", "december/cat/alice/2.png", "cat/alice/3.png"]
    found = owners_of("^[^/]+/([^/]+)/", "anywhere", whole, absent)
    assert [found[each] for each in absent] == ["alice"] * 3
    assert found["cat/bob/1.png"] == "bob"


def test_owners_from_a_column(tmp_path):
    who = np.array(["alice", "", "bob", "bob", "alice"])
    arrays = {"x": np.zeros((5, 4, 4, 3), dtype=np.uint8), "y": np.zeros(5, dtype=int), "who": who, "short": who[:2]}
    np.savez(tmp_path / "d.npz", **arrays)
    found = owners_of("who", str(tmp_path / "d.npz"), images())
    assert found == {"alice/1.png": "alice", "bob/1.png": "bob", "3": "bob", "é/1.png": "alice"}
    with pytest.raises(fastntk.InputError, match="no array 'whom'"):
        owners_of("whom", str(tmp_path / "d.npz"), images())
    with pytest.raises(fastntk.InputError, match="one entry an image"):
        owners_of("short", str(tmp_path / "d.npz"), images())
    with pytest.raises(fastntk.InputError, match="has no columns"):
        owners_of("who", str(tmp_path), images())


def test_owners_from_a_column_of_a_hugging_face_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    stored = datasets.Dataset.from_dict({"who": ["a", None, "b", "b", "a"]})
    stored.save_to_disk(str(tmp_path / "d"))
    assert list(owners_of("who", str(tmp_path / "d"), images()).values()) == ["a", "b", "b", "a"]
    with pytest.raises(fastntk.InputError, match="no column 'whom'; it holds who"):
        owners_of("whom", str(tmp_path / "d"), images())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.csv", "nowhere.csv cannot be read as a table"),
        ("([", "is no regular expression"),
        ("(a)(b)", "must have one group, which is the owner, not 2"),
        ("(nobody)", "gives none of the 5 images an owner"),
    ],
)
def test_what_names_no_owners_is_refused(spec, message):
    with pytest.raises(fastntk.InputError, match=message):
        owners_of(spec, "anywhere", images())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,owner\n3\n", "row 2: needs an id and an owner"),
        ("id,owner\n3,a\n3,b\n", "row 3: '3' has an owner already"),
        ("", "gives none of the 5 images an owner"),
    ],
)
def test_a_file_that_is_no_table_of_owners_is_refused(text, message, tmp_path):
    with pytest.raises(fastntk.InputError, match=message):
        owners_of(written(tmp_path, text), "anywhere", images())


def test_requests_that_name_people(fitted, colours, tmp_path):
    """Counts, requests, who owns nothing any more, and data that have moved meanwhile; names stay out of the folder."""
    folder = shutil.copytree(fitted, tmp_path / "run")
    count = len(np.load(colours)["y_train"])
    people = written(
        tmp_path, "id,owner\n" + "".join(f"{i},{'Zuleika' if i < 3 else 'Bob'}\n" for i in range(count - 1))
    )
    refuse("nobody said whose", "owners", folder)
    listed = json.loads(succeed("owners", folder, "--owners", people, "--json"))
    assert listed["owners"]["Zuleika"] == {"samples": 3, "members": 3}
    assert listed["owners"]["Bob"] == {"samples": count - 4, "members": count - 4}
    assert listed["without"] == 1
    refuse("goes with --owner", "forget", folder, "--ids", "1", "--owners", people)
    refuse("owned by 'Carol'", "forget", folder, "--owner", "Carol", "--owners", people)
    twin = shutil.copytree(folder, tmp_path / "twin")
    by_name = json.loads(succeed("forget", folder, "--owner", "Zuleika", "--owners", people, "--json"))
    by_ids = json.loads(succeed("forget", twin, "--ids", "0,1,2", "--json"))
    assert (by_name["samples"], by_name["after"]) == (3, by_ids["after"])
    listed = succeed("owners", folder, "--owners", people)
    assert "Zuleika" in listed
    refuse("no sample owned by 'Zuleika' is in the memory", "forget", folder, "--owner", "Zuleika", "--owners", people)
    for path in folder.rglob("*"):
        assert path.is_dir() or b"Zuleika" not in path.read_bytes()
    moved = tmp_path / "elsewhere.npz"
    moved.write_bytes(colours.read_bytes())
    document = json.loads((folder / "run.json").read_text())
    assert "forget: 1 samples" in succeed("forget", folder, "--match", "1[0]", "--data", moved)
    refuse("no sample's id matches", "forget", folder, "--match", "x*", "--data", moved)
    succeed("refresh", folder, "--data", moved)
    assert json.loads((folder / "run.json").read_text())["data"] == document["data"], "where they were fitted from"
    other = dict(np.load(colours))
    other["x_train"] = 255 - other["x_train"]
    np.savez(tmp_path / "other.npz", **other)
    refuse("has another image or label under id", "forget", folder, "--ids", "20", "--data", tmp_path / "other.npz")


def test_a_fit_remembers_where_owners_are_named_and_not_who_they_are(colours, tmp_path):
    people = written(tmp_path, "id,owner\n0,Zuleika\n1,Bob\n")
    given = ("fit", tmp_path / "run", *MODEL, "--data", colours, "--epochs", 1)
    refuse("cannot be read as a table", *given, "--owners", tmp_path / "nowhere.csv")
    assert not (tmp_path / "run").exists()
    succeed(*given, "--owners", people)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["owners"] == people
    succeed("prepare", tmp_path / "run")
    assert set(json.loads(succeed("owners", tmp_path / "run", "--json"))["owners"]) == {"Zuleika", "Bob"}
    assert "forget: 1 samples" in succeed("forget", tmp_path / "run", "--owner", "Bob", "--dry-run")
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or b"Zuleika" not in path.read_bytes()


def test_owners_of_images_that_were_learned_are_read_where_those_come_from(tmp_path, caplog):
    """A pattern is of what an id is in its own source; a source without the column gives its images no owner."""
    for name, people in (("d", ["a", "b", "b", "a", "e"]), ("december", ["c", "a", "", "a", "e"])):
        np.savez(tmp_path / f"{name}.npz", x=np.zeros((5, 2, 2), np.uint8), y=[0] * 5, who=people)
    np.savez(tmp_path / "january.npz", x=np.zeros((5, 2, 2), np.uint8), y=[0] * 5)
    whole = images()
    for name in ("december", "january"):
        whole = whole.joined_by(images(), str(tmp_path / f"{name}.npz"))
    found = owners_of("who", str(tmp_path / "d.npz"), whole)
    assert [found.get(each) for each in whole.ids] == ["a", "b", "b", "a", "e", "c", "a", None, "a", "e", *[None] * 5]
    for said in (
        "no column|holds no|has no",
        "1 of 5 images learned from .*december",
        "5 of 5 images learned .*january",
    ):
        assert re.search(said, caplog.text), caplog.text
    found = owners_of("^([^/]+)/", "anywhere", whole)
    alone = owners_of("^([^/]+)/", "anywhere", images())
    for prefix in ("december.npz/", "january.npz/"):
        assert {each: found.get(f"{prefix}{each}") for each in images().ids} == {i: alone.get(i) for i in images().ids}


@pytest.fixture
def of_people(given, tmp_path):
    """A run over photos of people, one of whose images is gone from the disk."""
    data = photos(tmp_path / "photos", "cat", "dog", count=0)
    for place, name in enumerate(("alice", "bob", "carl")):
        for kind in ("cat", "dog"):
            photos(data / kind, name, count=4, first=4 * place)
    (tmp_path / "owners.csv").write_text("id,owner\ncat/alice/0.png,Alice\ncat/alice/1.png,Alice\n")
    made = Run(tmp_path / "run")
    made.fit(replace(given, data=str(data)), RECIPE)
    prepared(made)
    (data / "cat" / "alice" / "1.png").unlink()
    return made, tmp_path


def test_who_is_asked_for_leaves_though_an_image_is_gone(of_people):
    """By owner, in the form that holds all rows; nothing is measured on that image, which is said."""
    made, place = of_people
    told = json.loads(succeed("forget", made.folder, "--owner", "Alice", "--owners", place / "owners.csv", "--json"))
    assert (told["samples"], told["lost"], told["copies"]) == (2, 1, 2), "the dogs are of the same pixels"
    assert told["purge_seconds"] is not None
    assert "cat/alice/1.png" not in made.memory()[0].ids


def test_nobody_is_passed_over_whose_image_is_gone(of_people, caplog):
    """A request that names a member by owner, pattern or id is refused if the member's image must be read."""
    made, place = of_people
    photos(place / "photos" / "cat", "alice", count=2)
    prepared(made, "primal")
    (place / "photos" / "cat" / "alice" / "1.png").unlink()
    count = len(made.memory()[0].ids)
    lacks = "the data source has no sample 'cat/alice/1.png'"
    for how in (
        ("--owner", "Alice", "--owners", place / "owners.csv"),
        ("--owner", "alice", "--owners", "^[^/]+/([^/]+)/"),
        ("--match", "*/alice/*"),
        ("--ids", "cat/bob/4.png,cat/alice/1.png"),
    ):
        refuse(lacks, "forget", made.folder, *how)
    (place / "asked.csv").write_text(
        'request,owner,ids\nr1,Alice,\nr2,,"cat/bob/4.png,cat/alice/1.png"\nr3,,cat/alice/1.png\nr4,,cat/bob/5.png\n'
    )
    asked = ("--requests", place / "asked.csv", "--out", place / "out", "--owners", place / "owners.csv")
    refuse("some requests were refused", "forget", made.folder, *asked)
    became = [row["became"] for row in json.loads((place / "out" / "summary.json").read_text())["requests"]]
    assert became == [REFUSED] * 3 + [ANSWERED]
    listed = json.loads(succeed("owners", made.folder, "--owners", place / "owners.csv", "--json"))["owners"]
    assert listed == {"Alice": {"samples": 2, "members": 2}}
    assert len(made.memory()[0].ids) == count - 1
    with caplog.at_level("WARNING"):
        succeed("forget", made.folder, "--class-name", "dog")
    assert "the images of 1 members are not in the data: whether they are of class 'dog' is not known" in caplog.text
