"""A privacy officer's day, as the documentation has it: in a fresh environment, on a folder of people's photographs."""

import csv
import hashlib
import hmac
import json

import numpy as np
import pytest
from alone import alone
from PIL import Image
from test_plugins import Environment

WITHOUT = """
from safetensors.torch import load_file
model = timm.create_model('mobilenetv3_small_050', num_classes=2).eval()
model.load_state_dict(load_file(sys.argv[1]), strict=True)
print(tuple(model(torch.zeros(1, 3, 32, 32)).shape))
"""
MODEL = ["--model", "mobilenetv3_small_050", "--image-size", 32]
PEOPLE = {"alice": 3, "bob": 3, "carol": 14}


def photographs(place):
    """Of three people, in two classes; one of alice's is in carol's album too."""
    generator, owners = np.random.default_rng(0), []
    shared = generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)
    for person, count in PEOPLE.items():
        for number in range(count):
            pixels = generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)
            if number == 0 and person in ("alice", "carol"):
                pixels = shared
            path = f"{'in' if number % 2 else 'out'}/{person}-{number}.png"
            (place / "photos" / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / "photos" / path)
            owners.append((path, person))
    with (place / "owners.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "owner"), *owners])


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    place = tmp_path_factory.mktemp("day")
    photographs(place)
    (place / "november.csv").write_text("request,owner,date\nr1,alice,2026-11-20\nr2,nobody,2026-11-21\nr3,alice,\n")
    (place / "december.csv").write_text("request,owner,date\nr4,bob,2026-12-01\n")
    environment = Environment(place)
    commands = [
        ["fit", "run", *MODEL, "--data", "photos", "--owners", "owners.csv", "--epochs", 1],
        ["prepare", "run"],
        ["owners", "run", "--json"],
        ["forget", "run", "--requests", "november.csv", "--out", "november", "--with-copies", "--json"],
        ["forget", "run", "--requests", "december.csv", "--out", "december", "--json"],
        ["export", "run"],
        ["verify", "run", "--json"],
        ["ledger", "run", "--json"],
        ["owners", "run", "--json"],
    ]
    done = environment.commands(*commands)
    assert [status for status, *_ in done] == [0] * len(done), done
    return place, [out for _, out, _ in done]


def test_who_has_how_many(day):
    owners = json.loads(day[1][2])["owners"]
    assert owners == {person: {"samples": count, "members": count} for person, count in PEOPLE.items()}
    left = json.loads(day[1][-1])["owners"]
    assert {person: each["members"] for person, each in left.items()} == {"alice": 0, "bob": 0, "carol": 13}


def test_three_requests_and_a_summary(day):
    place, out = day
    rows = {row["request"]: row for row in json.loads(out[3])["requests"]}
    assert [rows["r1"][name] for name in ("became", "samples", "copies_taken", "copies_left")] == ["answered", 3, 1, 0]
    assert rows["r2"]["became"] == "it names nothing in the data"
    assert (rows["r3"]["gone"], rows["r3"]["samples"]) == (3, 0)
    for name in ("november", "december"):
        text = (place / name / "summary.html").read_text()
        for part in ("What is exact", "What was measured", "What is left, and where", "Copies"):
            assert part in text
        assert not any(word in text for word in (*PEOPLE, ".png", "<img"))
    assert json.loads((place / "november" / "summary.json").read_text())["purged"]


def test_old_answers_can_still_be_verified(day):
    """Who has a certificate and a name can show that it was forgotten; the folder has neither salt nor name."""
    place, out = day
    certificate = json.loads((place / "november" / "certificates" / "r1.json").read_text())["certificate"]
    names = ["out/alice-0.png", "in/alice-1.png", "out/alice-2.png", "out/carol-0.png"]
    salt = bytes.fromhex(certificate["salt"])
    assert sorted(certificate["hashes"]) == sorted(
        hmac.new(salt, name.encode(), hashlib.sha256).hexdigest() for name in names
    )
    entries = [each for each in json.loads(out[7])["requests"] if each["kind"] == "forget"]
    assert [each["state"] for each in entries] == ["purged", "purged"]
    assert entries[0]["certificate"]["hashes"] == certificate["hashes"]
    assert entries[1]["certificate"]["before"] == certificate["after"]
    assert json.loads(out[6])["inexactness"] < 1e-6
    held = b"".join(path.read_bytes() for path in (place / "run").rglob("*") if path.is_file())
    assert certificate["salt"].encode() not in held
    assert not any(name.encode() in held for name in names)


def test_the_weights_load_without_fastntk(day):
    file = day[0] / "run" / "unlearned.safetensors"
    assert alone(WITHOUT, file) == "(1, 2)\n"
