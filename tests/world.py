"""What bad and odd inputs are tried in: files, runs, a memory, and every way in."""

import copy
import re
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import runs
import torch
import yaml
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

import fastntk
from fastntk.evidence.bench.config import read_config
from fastntk.inputs.images import Images
from fastntk.inputs.libraries import datasets
from fastntk.inputs.sources import load_data

PIXELS = np.random.default_rng(0).integers(0, 255, (20, 8, 8, 3), dtype=np.uint8)
X, Y = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2
A, PAIRS, RAW = X[0], [(each, i % 2) for i, each in enumerate(X)], fastntk.Preprocessing(8, (0.0,) * 3, (1.0,) * 3)
STATE = nn.ModuleDict({"0": nn.Conv2d(3, 4, 3), "1": nn.BatchNorm2d(4), "5": nn.Linear(4, 2)}).state_dict()
OWN = """from __future__ import annotations
import dataclasses; from torch import nn; from fastntk import Preprocessing
h, p = (0.5,) * 3, Preprocessing(8, (0.5,) * 3, (0.5,) * 3)
def net(n): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, n))
"""


def put(path, content):
    """A link, bytes, what is made by calling something with the path, or a checkpoint."""
    if isinstance(content, Path):
        path.symlink_to(content)
    elif isinstance(content, bytes | str):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    else:
        (content if callable(content) else partial(torch.save, content))(path)
    return path


@dataclass(frozen=True)
class World:
    """``here`` are run, which was prepared, after, which has forgotten 3 and 5, [red], whose names rich would take for
    markup, a memory, and what they were made of; ``new`` is a folder of each test's own."""

    here: Path
    new: Path
    memory: fastntk.Memory

    def command(self, line, value):
        """``@`` begins a path: of here, of new, or of copy, a copy of run, of which a pair changes a file."""
        if "@copy" in line:
            shutil.copytree(self.here / "run", self.new / "copy")
        if isinstance(value, tuple):
            put(self.new / "copy" / value[0], value[1])
        words = line.split() + ([value] if isinstance(value, str) else [])
        roots = {"@new": self.new, "@cop": self.new}
        done = runs.fastntk(*(w if w[:1] != "@" else roots.get(w[:4], self.here) / w[1:] for w in words))
        if not done.returncode:
            return done.stdout
        assert (done.returncode, done.stdout) == (2, "")
        assert len(re.findall("^error: |^╭─ Error", done.stderr, re.MULTILINE)) == 1, done.stderr
        raise fastntk.InputError(" ".join(done.stderr.replace("│", " ").split()))

    def do(self, function):
        return function(self)

    def fit(self, changes):
        changes = changes if isinstance(changes, dict) else {"train": changes}
        given = {"model": copy.deepcopy(self.memory.model), "train": PAIRS, "epochs": 1, "batch_size": 4, **changes}
        return len(fastntk.fit(**given).losses)

    def item(self, value):
        return self.fit([*PAIRS[:7], value, *PAIRS[8:]])

    def prepare(self, changes):
        given = {"model": self.memory.model, "train": PAIRS, "initial": self.memory.state.initial, **changes}
        return fastntk.prepare(**given).ids[0]

    def ids(self, value):
        data = TensorDataset(X, Y)
        data.ids = value
        return self.prepare({"train": data})

    def forget(self, value):
        return self.memory.preview(value).certificate.samples

    def image(self, given):
        """A name, and what is there before another image of its class: how many are found, and the first pixel."""
        for each in ("a", "b"):
            (self.new / "data" / each).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(self.new / "data" / each / "z.png")
        put(self.new / "data" / "a" / given[0], given[1])
        data = load_data(str(self.new / "data"), RAW)
        return len(data), [round(float(each), 1) for each in data[0][0][:, 0, 0]]

    def npz(self, content):
        """Bytes, or arrays beside those of four images."""
        if isinstance(content, dict):
            arrays = {"x": PIXELS[:4], "y": [0, 1, 0, 1], **content}
            content = partial(np.savez, **{name: array for name, array in arrays.items() if array is not None})
        return self.read(put(self.new / "d.npz", content), "ids" if "ids" in str(content) else None)

    def read(self, path, column):
        """Labels, as a run finds them again, and ids."""
        data = load_data(str(path), RAW, id_column=column)
        again = data.under(data.classes)
        return [again[i][1] for i in range(len(again))], list(again.ids)

    def stored(self, given):
        """Three rows of a Hugging Face dataset, but for columns or files that are given."""
        library, path = datasets(), self.new / "d"
        row = {"bytes": put(self.new / "a.png", Image.new("RGB", (8, 8)).save).read_bytes(), "path": None}
        kinds = {"image": library.Image(decode="raw" not in given), "label": library.ClassLabel(names=["a", "b"])}
        rows = {"image": [row] * 3, "label": [0, 1, 0], "ids": ["u", "v", "w"]}
        rows |= {name: [row if each is ... else each for each in given[name]] for name in rows if name in given}
        whole = library.Dataset.from_dict(rows, library.Features({**kinds, "ids": library.Value("string")}))
        whole.save_to_disk(str(path))
        for name in given.keys() - {"raw", "column", *rows}:
            put(path / name, given[name])
        return self.read(path, given.get("column", "ids"))

    def weights(self, content):
        """Whether a model has them."""
        own, path = f"{self.here}/own.py:small", put(self.new / "w.pt", content)
        return torch.equal(fastntk.load_model(own, 2, weights=path)[0][0].weight, STATE["0.weight"])

    def own(self, body):
        """A user's own file, by its path from where one is; what ends no line is returned by its function."""
        put(self.new / "beside.py", OWN)
        put(self.new / "mine.py", OWN + (body if body.endswith("\n") else f"def f(n): return {body}\n"))
        model, preprocessing = fastntk.load_model("../mine.py:f", 3)
        return model(Images(PIXELS[:1, :, 1:], [0], ["a"], preprocessing)[0][0][None]).shape[1]

    def grid(self, given):
        """A configuration of bench: a text, or entries in place of others."""
        whole = {"recipe": {}, "per_class": [6], "data": {"d": {"source": "d.npz"}}, "requests": ["class"]}
        whole |= {"models": {"m": {"model": "resnet18", "select": ["bn"]}}, "methods": {"a": {"method": "FastNTK"}}}
        content = yaml.safe_dump({**whole, **given}) if isinstance(given, dict) else given
        return len(read_config(put(self.new / "c.yaml", content)).methods)

    def listed(self):
        """What must stay as it is, and when it was written."""
        paths = [each for folder in (self.here, self.new / "new") for each in folder.rglob("*") if each.name != "lock"]
        return {each: each.is_dir() or (each.lstat().st_mtime_ns, each.lstat().st_size) for each in paths}
