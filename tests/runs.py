"""Runs to test with, of a user's own small network and of a named one, and the command line in this process."""

import contextlib
import io
import re
import subprocess

import numpy as np
import pytest
from PIL import Image

from fastntk.cli.main import main
from fastntk.cli.run import Run
from fastntk.cli.settings import Given
from fastntk.jacobians.numerics import Numerics
from fastntk.tuning.recipe import Recipe

MODEL = ["--model", "mobilenetv3_small_050", "--image-size", "32"]
RATE = ["--learning-rate", 0.01]
NETWORK = """
from torch import nn
from fastntk import Preprocessing

def small(classes):
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4, classes)), Preprocessing(8, (0.5,) * 3, (0.5,) * 3)
"""
RECIPE = Recipe(epochs=2, batch_size=4, learning_rate=1e-2)


def fastntk(*arguments):
    """The command in this process: exit status, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
            status = 0
        except SystemExit as exit_:
            status = exit_.code or 0
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def succeed(*arguments):
    done = fastntk(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refuse(message, *arguments):
    done = fastntk(*arguments)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert re.search(message, done.stderr.replace("\n", " ")), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Three classes that colour tells apart."""
    path = tmp_path_factory.mktemp("data") / "colours.npz"
    generator = np.random.default_rng(0)
    y = np.arange(36) % 3
    x = generator.integers(0, 60, (36, 32, 32, 3), dtype=np.uint8)
    x[np.arange(36), :, :, y] += 150
    np.savez(path, x_train=x[:30], y_train=y[:30], x_test=x[30:], y_test=y[30:], classes=["red", "green", "blue"])
    return path


@pytest.fixture(scope="module")
def fitted(colours, tmp_path_factory):
    """The folder of a run that was fitted and prepared to them."""
    folder = tmp_path_factory.mktemp("runs") / "colours"
    text = succeed("fit", folder, *MODEL, "--data", colours, "--epochs", 4, "--batch-size", 4, *RATE)
    assert "Next: fastntk prepare" in text
    assert "Next: fastntk forget" in succeed("prepare", folder)
    return folder


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What runs are made of."""
    place = tmp_path_factory.mktemp("given")
    (place / "own.py").write_text(NETWORK)
    x = np.random.default_rng(0).integers(0, 255, (20, 8, 8, 3), dtype=np.uint8)
    np.savez(place / "data.npz", x_train=x, y_train=np.arange(20) % 2, x_test=x[:4], y_test=np.arange(4) % 2)
    return Given(f"{place}/own.py:small", f"{place}/data.npz", None, ("bn", "head"), None)


def prepared(run, form="auto"):
    return run.prepare("auto", form, "auto", 0, Numerics())


@pytest.fixture
def run(given, tmp_path):
    """One that was fitted and prepared, anew for each test."""
    made = Run(tmp_path / "run")
    made.fit(given, RECIPE)
    prepared(made)
    return made


def photos(folder, *names, count=3, first=0):
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(first, first + count):
            Image.fromarray(np.full((9, 9, 3), i, dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder
