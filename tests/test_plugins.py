"""What other packages add: found where one is installed, gone where it is removed, and named where it is bad."""

import csv
import json
import subprocess
import sys
import sysconfig
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import nn

import fastntk
from fastntk.common import plugins
from fastntk.common.plugins import Registry
from fastntk.evidence.measures import MEASURES, Subject
from fastntk.jacobians.rules import calls
from fastntk.jacobians.rules.calls import PerSample
from fastntk.tuning.losses import LOSSES, loss_from, loss_numbers, loss_of

PLUGIN = Path(__file__).parent.parent / "examples" / "plugin"
MODEL = ["--model", "mobilenetv3_small_050", "--image-size", "32"]


SEVERAL = """
import contextlib, io, json, sys
from fastntk.cli.main import main

def done(words):
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as exit_:
            status = exit_.code or 0
    return status, out.getvalue(), " ".join(err.getvalue().split())

print(json.dumps([done(words) for words in json.load(sys.stdin)]))
"""


class Environment:
    """A fresh one, which sees the packages of this one."""

    def __init__(self, here):
        self.here, self.python = here, here / "env" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", here / "env"], check=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        around = here / "env" / "lib" / version / "site-packages" / "around.pth"
        around.write_text(f"{sysconfig.get_paths()['purelib']}\n{Path(fastntk.__file__).parent.parent}\n")

    def install(self, package):
        """A copy of it, which a build may write to."""
        (self.here / "source").mkdir()
        for name in ("pyproject.toml", "fastntk_plugin.py"):
            (self.here / "source" / name).write_bytes((package / name).read_bytes())
        self.pip("install", "--no-deps", "--no-build-isolation", "--no-index", self.here / "source")

    def pip(self, *words):
        subprocess.run([self.python, "-m", "pip", "--quiet", *words], check=True)

    def commands(self, *several):
        """Commands of fastntk, one after another in one process: exit status, standard output, standard error."""
        given = json.dumps([[str(word) for word in words] for words in several])
        process = subprocess.run(
            [self.python, "-c", SEVERAL], cwd=self.here, input=given, capture_output=True, text=True, check=True
        )
        return json.loads(process.stdout)


def pictures(here):
    """A table of twenty images in two classes, the last four of the split test."""
    colours = np.random.default_rng(0).integers(0, 255, (20, 16, 16, 3), dtype=np.uint8)
    rows = []
    for number, pixels in enumerate(colours):
        Image.fromarray(pixels).save(here / f"{number}.png")
        rows.append((f"{number}.png", "ab"[number % 2], "test" if number > 15 else "train"))
    with (here / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])


def test_from_installing_to_removing(tmp_path):
    environment, package = Environment(tmp_path), "fastntk-plugin-example 0.1"
    environment.install(PLUGIN)
    pictures(tmp_path)
    document = {
        "data": {"own": {"source": "table:labels.csv"}},
        "models": {"small": {"model": MODEL[1], "image_size": 32, "select": ["first", "head"]}},
        "methods": {"fast_ntk": {"method": "FastNTK"}, "shrink": {"method": "Shrink", "share": 0.25}},
        "requests": ["class"],
        "losses": ["sigmoid"],
        "per_class": [6],
        "test_per_class": 2,
        "retrained": 2,
        "recipe": {"epochs": 1, "batch_size": 2},
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(document))
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({**document, "losses": ["squared"]}))
    chosen = ["--select", "first:2", "--select", "head", "--loss", "sigmoid", "--epochs", 1]
    *done, refused = environment.commands(
        ["plugins", "--json"],
        ["tunables", MODEL[1]],
        ["fit", "run", *MODEL, "--data", "table:labels.csv", *chosen],
        ["prepare", "run"],
        ["forget", "run", "--ids", "3.png", "--json"],
        ["verify", "run", "--full"],
        ["bench", "grid.yaml", "--out", "results", "--json"],
        ["fit", "new", *MODEL, "--data", "tables:labels.csv"],
    )
    assert [status for status, *_ in done] == [0] * len(done), done
    (_, kinds, _), (_, offered, _), *_, (_, forgot, _), _, (_, bench, _) = done
    assert json.loads(kinds) == {
        "selectors": {"first": package},
        "methods": {"Shrink": package},
        "metrics": {"sure_of_forgotten": package},
        "losses": {"sigmoid": package},
        "data": {"table": package},
        "rules": {"rms_norm": package},
    }
    assert f"(of {package})" in " ".join(offered.replace("│", " ").split())
    assert json.loads(forgot)["unit"] == "probabilities"
    assert {row["method"] for row in json.loads(bench)["rows"]} >= {"fast_ntk", "shrink"}
    assert refused[0] == 2
    assert f"NAME:... with one of table (of {package})" in refused[2]
    environment.pip("uninstall", "--yes", "fastntk-plugin-example")
    (_, kinds, _), (_, offered, _), run, bench = environment.commands(
        ["plugins", "--json"], ["tunables", MODEL[1], "--json"], ["verify", "run"], ["bench", "other.yaml"]
    )
    assert not any(json.loads(kinds).values())
    assert "first" not in json.loads(offered)["parameters"]
    assert (run[0], bench[0]) == (2, 2)
    assert "selector 'first:2' matches no parameter of this model. It offers: bn" in run[2]
    assert "There are BadTeacher" in bench[2]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(PLUGIN)
    return pytest.importorskip("fastntk_plugin")


def test_the_example_s_loss_is_what_it_says_of_itself(example, monkeypatch):
    loss, generator = example.Sigmoid(), torch.Generator().manual_seed(0)
    z, labels = torch.randn(5, 4, dtype=torch.float64, generator=generator), torch.tensor([0, 3, 1, 1, 2])
    z.requires_grad_()
    [slope] = torch.autograd.grad(len(z) * loss(z, labels), z)
    torch.testing.assert_close(loss.residual(z, labels), -slope)
    for i in range(len(z)):
        hessian = torch.autograd.functional.hessian(lambda f, i=i: loss(f[None], labels[i : i + 1]), z[i].detach())
        root = loss.root(z[i : i + 1])[0]
        torch.testing.assert_close((root @ root.T).detach(), hessian)
        torch.testing.assert_close(loss.curve(torch.eye(4, dtype=z.dtype), z[i].expand(4, 4), labels), hessian)
    monkeypatch.setitem(LOSSES.own, "sigmoid", example.Sigmoid)
    assert loss_of(loss_numbers(loss)) == loss
    assert loss_from({"name": "sigmoid"}) == loss


def test_the_example_s_loss_is_answered_as_retrained(example, monkeypatch):
    """A linear model: the answer is what the same convex problem gives on what stays."""
    monkeypatch.setitem(LOSSES.own, "sigmoid", example.Sigmoid)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 5, 1, 1, dtype=torch.float64, generator=generator), torch.arange(20) % 3
    model, loss, ridge = nn.Sequential(nn.Flatten(), nn.Linear(5, 3)).double().eval(), example.Sigmoid(), 0.7
    start = {name: each.detach().clone() for name, each in model.named_parameters()}

    def fitted(keep):
        values = [each.clone().requires_grad_() for each in start.values()]
        solver = torch.optim.LBFGS(
            values, max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
        )

        def closure():
            solver.zero_grad()
            total = len(keep) * loss(x[keep].flatten(1) @ values[0].T + values[1], y[keep])
            pulls = [(now - before).square().sum() for now, before in zip(values, start.values(), strict=True)]
            total = total + ridge / 2 * sum(pulls)
            total.backward()
            return total

        solver.step(closure)
        return {name: each.detach() for name, each in zip(start, values, strict=True)}

    model.load_state_dict(fitted(list(range(20))))
    memory = fastntk.prepare(
        model, torch.utils.data.TensorDataset(x, y), start, loss=loss, ridge=ridge, form="convex", classes="all"
    )
    answer = memory.forget([4, 7])
    expected = fitted([i for i in range(20) if i not in (4, 7)])
    for name, each in expected.items():
        torch.testing.assert_close(answer.parameters[name], each, rtol=1e-6, atol=1e-6)


def test_the_example_s_rule_and_metric(example, monkeypatch):
    monkeypatch.setattr(calls, "_plugged", lambda: {example.RMS_NORM.function: example.RMS_NORM.does})
    x, weight = torch.randn(3, 4, 5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    with PerSample({"w": weight}, 3) as copies:
        out = F.rms_norm(x, [5], weight)
    torch.testing.assert_close(out, F.rms_norm(x, [5], weight))
    [slopes] = torch.autograd.grad(out.square().sum(), [copies.copies["w"]])
    torch.testing.assert_close(slopes, (2 * F.rms_norm(x, [5], weight) * F.rms_norm(x, [5])).sum(1))
    logits = {part: torch.zeros(2, 4) for part in ("retain", "forget", "test")}
    assert example.SURE_OF_FORGOTTEN(Subject(logits, dict.fromkeys(logits, torch.tensor([0, 1])))) == 25
    assert "accuracy" not in MEASURES.others


@pytest.mark.parametrize(
    ("value", "name", "message"),
    [
        ("no_such_module:it", "new", "'new' among things cannot be loaded.*Repair or uninstall"),
        ("math:pi", "new", "'new' among things must be a text, not 3.14"),
        ("string:digits", "old", "'old' among things is taken by fastntk. Rename it"),
    ],
)
def test_what_cannot_be_used_is_named(value, name, message, monkeypatch):
    monkeypatch.setattr(plugins, "entry_points", lambda group: [EntryPoint(name, value, group)])
    registry = Registry("things", {"old": "mine"}, lambda made: isinstance(made, str), "a text")
    assert registry["old"] == "mine", "others' are not looked at"
    with pytest.raises(fastntk.InputError, match=message):
        list(registry)
