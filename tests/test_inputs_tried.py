"""Bad and odd inputs, by kind, to every command and through Python, each with what it gets.

That is a refusal, in one message that names cause or remedy, after which nothing on the disk has changed; or the right
result. A row of ``TRIED`` has how something is given (a command line that a value ends, or a method of ``World`` after
a dot), the values that are given so, and the pattern of the refusal, a compiled one of what is said, or the result.
"""

import argparse
import copy
import os
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import test_cli
import torch
from PIL import Image, PngImagePlugin
from runs import NETWORK
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from world import PAIRS, PIXELS, STATE, A, World, X, Y, put

import fastntk

NAN, DIGITS, LONG, BASE = float("nan"), "9" * 5000, "a" * 300, "memory/base-1.safetensors"
ODD = re.compile("(?s)( at 0x|tensor\\().*")  # in the names of tests, which are the same in every process
says, TEXT, cut = re.compile, PngImagePlugin.PngInfo(), partial(os.truncate, length=9)
TEXT.add_text("a", " " * 2**21, zip=True)
BIG, NOTHING = np.uint64([0, 0, 0, 2**63]), {"image": [], "label": [], "ids": []}
FIT = "fit @new --epochs 1 --model @own.py:small --data @data.npz"
RED = "fit @[red] --epochs 1 --model @[bold].py:small --data @[data]"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    here = tmp_path_factory.mktemp("here")
    np.savez(here / "data.npz", x_train=PIXELS, y_train=np.arange(20) % 2, x_test=PIXELS[:4], y_test=[0, 1, 0, 1])
    for name in ("[b]", "[i]"):
        (here / "[data]" / name).mkdir(parents=True)
        put(here / "[data]" / name / "[u]1.png", Image.fromarray(PIXELS[0]).save)
    put(here / "[bold].py", NETWORK)
    model, _ = fastntk.load_model(f"{put(here / 'own.py', NETWORK)}:small", 2)
    fastntk.tune(model, "bn", "head")
    data = TensorDataset(X, Y)
    initial = fastntk.fit(model, data, epochs=2, batch_size=4, learning_rate=1e-2).initial
    fastntk.prepare(model, data, initial).save(here / "memory")
    world = World(here, here, fastntk.prepare(model, data, initial))
    for line in (FIT.replace("@new", "@run --batch-size 4"), "prepare @run", RED, "prepare @[red]"):
        world.command(line, None)
    shutil.copytree(here / "run", here / "after")
    world.command("forget @after --ids", "3,5")
    return world


TRIED = {
"numbers": [
    (FIT, ["--epochs=0", "--batch-size=-3", "--learning-rate=0", "--learning-rate=nan", "--learning-rate=1e400",
     "--weight-decay=-1", f"--batch-size={10**19}", "--learning-rate=1e30"], "at least 1, learning_rate positive"),
    (FIT, ["--epochs=nan", "--epochs=1e99", "--seed=-1", f"--seed={2**63}", "--image-size=0"], "Invalid value for '--"),
    (f"{FIT} --augment flip", [f"--seed={2**63 - 1}"], "seed"),
    (FIT, ["--label-smoothing=1", "--label-smoothing=nan", "--image-size=1"], "at least 0 and below 1|another size"),
    (f"{FIT} --select", ["prompt:0", "last:99", f"last:{DIGITS}"], "plain vision|many blocks|whole numbers"),
    ("prepare @run --ridge", ["0", "-1", "nan", "inf", "1e999", "x", "", "1e-300"], "ridge must be .*number"),
    ("prepare @run --classes", ["1", "-2", "99", "nan", "", DIGITS], "must be 'auto', 'all' or from 2 to 2"),
    ("prepare @run", ["--workers=-1", "--workers=x", "--seed=-1", "--class-probes=x"], "Invalid value for '--"),
    ("audit @run --fraction", ["0", "1", "nan", "inf", "1e-9", "0.99"], "must be between 0 and 1|larger|every sample"),
    ("tunables torchvision/resnet18 --classes", ["1", "-3", "9" * 14], "classes"),
    ("tunables torchvision/vit_b_32 --image-size", ["33"], "takes images of 33 x 33")],
"names": [
    ("", ["", "nothing", "Fit", "--nothing"], "No such command|No such option"),
    (f"{FIT} --device", ["", "cuda:99", "tpu", "meta"], "is not there .* Use 'cpu'"),
    (f"{FIT} --select", ["", " ", "nothing", "ln", "(["], "is empty. Leave it out|It offers: bn|neither a name nor"),
    (FIT, ["--loss=x", "--loss=", "--optimizer=Adam", "--augment=x", "--mixup=1"], "one of squared|adamw|flip|be off"),
    (FIT, ["--id-column=none", "--id-column=y", "--id-column=x"], "no array 'none_train'|Choose a column|one entry"),
    (f"{FIT} --model", ["resnet999", "", "timm/no", "a/b", "no.py", "no.py:f"], "(no|a) model|unknown library|no file"),
    (f"{FIT} --data-root @. --data", ["nowhere", "CIFAR10", "FakeData", "mnist"], "neither a|cannot open"),
    (FIT, ["--data=", "--validation=", "--fitted=", "--head-start=x"], "--(data|validation|fitted)"),
    (f"{FIT} --fitted w.pt --weights w.pt", ["--head-start="], "--head-start.*is empty"),
    ("prepare @run", ["--form=x", "--form=", "--sums=float16", "--precision="], "form must be|float32|one of full"),
    ("audit @copy", ["--class-name=9", "--test=no", "--test="], "The classes are: 0, 1|neither a folder|--test"),
    ("models --json", ["zzzz"], says(r'"models": \[\]')),
    ("demo --out @new", ["--device=tpu", "--seed=x"], "Use 'cpu'|Invalid value for '--seed'")],
"files": [
    *((each, ["@no", "@data.npz", "", LONG], "no run. M|too long|is empty") for each in ("refresh", "export", "purge")),
    ("ledger", ["@no", "@data.npz", "", LONG], "there is no ledger|too long|is empty"),
    ("prepare", ["@data.npz", "", "@absent"], "cannot be written|holds no run. Make one|is empty"),
    ("fit --model @own.py:small --data @data.npz", ["@data.npz", LONG, "@after"], "Choose another|answered requests"),
    ("fit --model @own.py:small --data @none.npz", ["@new/run"], "there is no file"),
    (f"{FIT} --data", ["@run", "@own.py", "@no.npz", LONG], "class folders|neither a folder|no file|too long"),
    (f"{FIT} --weights", ["x", "@run", "", "@data.npz", LONG], "no weights f|be read as|too long|is empty"),
    ("forget @run --ids-file", ["none", "@run", "", LONG], "cannot be read as text"),
    ("forget @copy --ids 1 --certificate", ["@new/deep/in/c.json"], says("not in the folder any more|purged")),
    ("forget @run --ids 1 --certificate", ["@run", "", "@data.npz/c.json", "/dev/null"], "Name a file|cannot be w"),
    ("export @run --out", ["@run", "@x.txt", "/proc/x.pt", "@own.py/x.pt"], "must end|is a folder|cannot be written"),
    ("bench", ["@run", "none.yaml", "@data.npz", LONG, "--summary=none"], "cannot be read as YAML|no results in none"),
    ("verify @copy", [("run.json", cut), ("run.json", "[]"), ("run.json", "[" * 99999)], "JSON"),
    ("plan @copy", [("run.json", '{"format": 9}'), ("run.json", os.unlink)], "which knows formats|holds no run"),
    ("export @copy", [("memory", shutil.rmtree), ("initial.safetensors", cut)], "Prepare one first|is damaged"),
    ("audit @copy", [(BASE, os.unlink), (BASE, cut), ("memory/ledger.sqlite", cut)], "Restore it from|is damaged"),
    (FIT.replace("@new", "@copy"), [("memory/ledger.sqlite", os.unlink)], "without the ledger")],
"ids": [
    ("forget @run --ids", ["", ",", "99", "x", "3.5", "²", "1;2", "1-3", DIGITS], "no sample|not in the mem"),
    ("forget @run --ids", ["01", "1,٢"], "not in the memory"),
    ("forget @run --ids", ["0,0", "1,1", ",".join(map(str, range(20)))], "stands twice|would forget every sample"),
    ("forget @run --dry-run --ids", [" 1 , 2 ", "1,,2,", "1 2", "\n1\n2\n"], says("forget: 2 samples")),
    ("remember @after --ids", ["1", "99", "3,3"], "in the memory already|has no sample|stands twice"),
    ("evaluate @after --ids", ["1", "99", ""], "is (in the memory|not in the data): only what was|names no"),
    (".forget", ["17", 5, None, b"12", torch.tensor(1)], r"ids must be a list, not .* Put it into one"),
    (".forget", [[1.5], [None], [[1]], np.array([1.0]), [True], np.arange(12) > 8], "a whole number or text"),
    (".forget", [["1"], [1, 1], range(12)], "is not in the memory|stands twice|forget every sample"),
    (".forget", [[np.int64(3)], [torch.tensor(3)], torch.tensor([3]), {3}, iter([3])], 1),
    (".ids", [["a"] * 12, [1, 2], [0.5] * 12, "abcdefghijkl"], "stands twice|has 2 ids for|an id is|must be a list"),
    (".ids", [np.arange(5, 17), torch.arange(5, 17), [5, "5", *range(6, 16)]], 5)],
"images": [
    (".image", [("a.ppm", b"P6\n99999 99999\n255\n"), ("a.png", b""), ("a.png", "text"),
     ("a.png", partial(Image.new("L", (8, 8)).save, pnginfo=TEXT))], "does not decode as an image .*Replace or remove"),
    (".image", [("a.png", os.mkfifo), ("a.png", Path("no")), ("a.tif", Image.new("F", (8, 8)).save)], "no file|8 or"),
    (".image", [("a.png", Image.fromarray(np.full((8, 8), 0x8040, np.uint16)).save),
     ("a.pgm", b"P5\n8 8\n65535\n" + b"\x80\x40" * 64)], (3, [0.5] * 3)),
    (".image", [("a.png", Image.new("P", (1, 9), "red").save), ("a.PNG", Image.new("RGBA", (9, 1), "red").save),
     ("a.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save)], (3, [1.0, 0.0, 0.0])),
    (".image", [("a.png", os.mkdir), ("a.txt", b""), ("loop", Path("."))], (2, [0.0] * 3))],
"data sets": [
    (".npz", [{"x": PIXELS / 255}, {"x": PIXELS.transpose(0, 3, 1, 2)}, {"x": PIXELS[:4, :0]}], "must be uint8"),
    (".npz", [{"y": [0, 1]}, {"y": [0.0] * 4}, {"y": [*"abab"]}, {"y": None}], "one integer label|no array 'y'"),
    (".npz", [{"y": [0, -1, 0, 1]}, {"classes": ["a"]}], "is outside the"),
    (".npz", [{"y": BIG}, {"classes": ["a", "a"]}, {"classes": "ab"}, {"classes": [["a"], ["b"]]}], "class"),
    (".npz", [{"ids": [1]}, {"ids": [1] * 4}, {"ids": 3}, {"ids": PIXELS[:4, 0, 0]}], " ids? "),
    (".npz", [{"ids": [*"abcd"]}, {"ids": [b"a", b"b", b"c", b"d"]}], ([0, 1, 0, 1], [*"abcd"])),
    (".npz", [b"", "text", {"x": np.array([None])}, lambda path: np.save(path.open("wb"), Y)], "an .npz"),
    (".stored", [{"image": [..., None, ...]}, {"image": [{"bytes": b"", "path": "no"}] * 3}], "row . of .* not decode"),
    (".stored", [{"label": [0, None, 1]}, {"label": [0, -1, 1]}], "row 1 of .* has no label. Rem|-1 is outside"),
    (".stored", [{"ids": [*"uuv"]}, {"ids": ["u", None, "v"]}, {"column": "image"}], "than once|an id"),
    (".stored", [{"dataset_info.json": "{"}, {"state.json": "{}"}, NOTHING], "Hugging|no rows"),
    (".stored", [{"raw": True}], ([0, 1, 0], ["u", "v", "w"]))],
"items": [
    (".item", [None, {"image": A, "label": 1}, (A,), (A, 1, 2), "ab", A], "must be an image and a label, not a"),
    (".item", [(A.byte(), 1), (None, 1), (A[:1], 1), (A * NAN, 1)], "a tensor of floats|different shapes|NaN or inf"),
    (".item", [(A, each) for each in ("cat", None, 1.0, {}, 2**70)], "label must be a whole number .* Have the data"),
    (".item", [(A, -1), (A, 2), (A, torch.tensor([1])), (A, torch.eye(2)[0])], "outside the model's|give one kind"),
    (".item", [[A, 1], (A.numpy(), np.uint8(1)), (A, torch.tensor(1)), (A, True), (A.double(), 1)], 1),
    (".fit", [TensorDataset(X.half(), Y), TensorDataset(X.double(), Y)], 1),
    (".fit", [[], DataLoader(PAIRS), "data.npz", TensorDataset(X), {"validation": []}], "sample|map-style|and a label"),
    (".fit", [TensorDataset(each, Y) for each in (X[:, :1], X[..., :2, :2])], "cannot take"),
    (".fit", [TensorDataset(X, X[:, 0, 0, :2] * NAN), TensorDataset(X, X[:, 0, 0])], "2 shares a sample"),
    (".fit", [{"validation": [(A, 7)]}], "outside the model's classes")],
"weights": [
    (".weights", [STATE, {f"module.{k}": v for k, v in STATE.items()}, {"state_dict": STATE, "epoch": 3}], True),
    (".weights", [{"model": STATE, "args": argparse.Namespace()}, 3, {}, {"a": STATE}, {**STATE, 3: A}], "Save model"),
    (".weights", [b"PK\x03\x04", b"", Path("/proc/self/mem"), "junk", "hello"], "be read as weights"),
    (".weights", [os.mkfifo, os.mkdir, Path("no"), {"0.weight": A},
     {k: v * NAN for k, v in STATE.items()}], "no weights file|do not fit the model|NaN|finite")],
"own models": [
    (".own", ["def f(:\n", "import nowhere\n", "def f(n):\n    return net(n).nope\n"], r"mine.py.* line"),
    (".own", ["net(n)", "None", "(p, net(n))", "(net(n), p, 3)", "f = 3\n"], "return a module and its|no function"),
    (".own", ["(net(n + 1), p)",
     "(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LSTM(3, n)), p)",
     "(nn.Sequential(nn.Flatten(), nn.LazyLinear(n)), p)"], "return logits|Lazy"),
    (".own", [f"(net(n), Preprocessing(8, h, {each}))" for each in ("(0.5, 0, 0.5)", "(0.5, 0.5)")], "std"),
    (".own", ["(net(n), p)", "from beside import net, p\ndef f(n): return net(n), p\n",
     "@dataclasses.dataclass\nclass C:\n    width: int = 4\ndef f(n): return net(n), p\n"], 3)],
"configurations": [
    (".grid", ["a: [", "!!python/object:os.system {}", b"\xff", "[" * 9999, ""], "as YAML|must be a table"),
    (".grid", [{"requests": ["x"]}, {"requests": [3]}, {"losses": ["x"]}, {"losses": [["x"]]}], "'class' or|one of"),
    (".grid", [{"seeds": ["x"]}, {"per_class": [-1]}, {"test_per_class": "x"}, {"recipe": {"epochs": 1.5}},
     {"recipe": {"learning_rate": "1e-3"}}, {"models": {"m": {"model": "x", "select": "all"}}},
     {"models": {"m": {"model": "x", "select": [3]}}}], "seeds|per_class|epochs|learning_rate|select"),
    (".grid", [{"methods": {"a": {"method": "FineTune", "epochs": each}}} for each in ("x", -1)], "epochs")],
"markup": [
    ("tunables", ["[red]", "[/b]"], r"model '\[red\]'|unknown library '\['"),
    ("verify", ["[red]", "@[/b]"], r"\[(red|/b)\] holds no run. Make one: fastntk fit"),
    ("forget @[red]", ["--class-name=[x]", "--ids=[/b]"], r"The classes are: \[b\], \[i\]|id '\[/b\]' is not in the"),
    (RED.replace("@[red]", "@new/[i]"), ["--json", "--epochs=2"], says(r'("run": |prepare )\S+/\[i\]'))],
"python": [
    (".fit", [{"epochs": 0}, {"epochs": 1.5}, {"seed": 2**70}, {"loss": "squared"}], "epochs|seed|loss"),
    (".prepare", [{"initial": {}}, {"ridge": 0}, {"form": "x"}, {"shrinkage": 2}, {"train": []}], "differ|must|no tr"),
    (".prepare", [{"loss": nn.CrossEntropyLoss()}, {"seed": 2**70}, {"batch_size": 1.5}], "loss|seed|batch_size must"),
    (".prepare", [{"initial": fastntk.Recipe()}, {"ridge": "1"}, {"ridge": True}], "tensors by name|the ridge must"),
    (".prepare", [{"ridge": np.float32(1)}, {"checkpoint": "partial"}, {"shrinkage": np.float32(1)}], 0),
    (".do", [lambda w: fastntk.prepare(w.memory.model, PAIRS, w.memory.state.initial, ridge=np.float32(1)
                                       ).save(w.new / "m")], None),
    (".do", [lambda w: fastntk.CrossEntropy(weights=torch.ones(2)).weights,
     lambda w: fastntk.CrossEntropy(weights=np.ones(2, dtype=np.float32)).weights], (1.0, 1.0)),
    (".do", [lambda w: w.memory.purge(), lambda w: w.memory.save(w.here), lambda w: fastntk.finished(w.memory, gain=0),
     lambda w: fastntk.audit(w.memory, lambda *_: {})], "Save it first|Choose a folder|gain must be|what retraining"),
    (".do", [lambda w, odd=odd: fastntk.audit(w.memory, lambda *_: odd) for odd in (
        None, nn.Identity(), 3, {"a": "b"})], "what retraining returns must be tensors by name"),
    (".do", [lambda w, odd=odd: fastntk.audit(w.memory, lambda *_: {k: odd(v) for k, v in w.memory.parameters.items()})
             for odd in (lambda v: v * NAN, lambda v: v[:0])], "what retraining returns has (NaN|shape)"),
    (".prepare", [{"train": DataLoader(PAIRS)}, {"train": iter(())}, {"train": None}], "must be a map-style dataset"),
    (".do", [lambda w: fastntk.SquaredLoss(NAN), lambda w: fastntk.left_out_gain(w.memory, [(A, 9)]),
     lambda w: fastntk.add_lora(w.memory.model, 2, "([")], "scale|outside the model's classes|regular expression"),
    (".do", [lambda w: fastntk.CrossEntropy(weights="ab"), lambda w: fastntk.SquaredLoss("x"),
     lambda w: fastntk.plan(w.memory.model, PAIRS, epochs=0)], "must be numbers|at least 1"),
    (".do", [lambda w: fastntk.tune(copy.deepcopy(w.memory.model).half(), "all")], "dtype torch.float16"),
    (".do", [lambda w: fastntk.plan(w.memory.model, []), lambda w: fastntk.audit(w.memory, "recipe"),
     lambda w: fastntk.audit(w.memory, fastntk.Recipe(), held_out=[(A, 9)])], "no training|a fastntk.Recipe|outside"),
    (".do", [lambda w: fastntk.load(w.here / "memory", w.memory.model, TensorDataset(X + 1, Y)),
     lambda w: fastntk.load(w.here / "memory", fastntk.load_model(f"{w.here}/own.py:small", 3)[0], PAIRS),
     lambda w: fastntk.load(w.here / "no", w.memory.model, PAIRS)], "another|there is no memory")],
}  # fmt: skip


def cases():
    for kind, (how, values, expected) in ((kind, row) for kind, rows in TRIED.items() for row in rows):
        for each in values:
            yield pytest.param(how, each, expected, id=f"{kind}, {how}, {ODD.sub('', str(each))[:40]!r}")


@pytest.mark.parametrize(("how", "value", "expected"), list(cases()))
def test_what_is_tried(how, value, expected, made, tmp_path, monkeypatch):
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path / "new")
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for a user
    world = replace(made, new=tmp_path)
    tried = partial(getattr(world, how[1:]) if how[:1] == "." else partial(world.command, how), value)
    before = world.listed()
    if isinstance(expected, str):
        with pytest.raises(fastntk.InputError, match=f"(?s){expected}"):
            tried()
        assert world.listed() == before
    else:
        assert expected.search(tried()) if isinstance(expected, re.Pattern) else tried() == expected


def test_every_command_and_every_kind_is_tried():
    counts = {kind: sum(len(values) for _, values, _ in rows) for kind, rows in TRIED.items()}
    assert sum(counts.values()) >= 170, counts
    commands = {how.partition(" ")[0] for rows in TRIED.values() for how, _, _ in rows if how[:1] != "."}
    assert commands >= {*test_cli.COMMANDS, "purge"}
