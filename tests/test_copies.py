"""Samples that show the same image as one that leaves: found, named, and taken if asked for."""

import json
import shutil

import numpy as np
import pytest
import torch
from cases import CASES
from memories import moved
from runs import MODEL, RATE, refuse, succeed
from torch.utils.data import TensorDataset

import fastntk
from fastntk.memory.copies import _distances
from fastntk.solve.forms import FORMS


def doubled():
    """The case's images, of which 3 and 11 (with another label) are as 0 is, and 5 but for one bit of a pixel."""
    images, labels = (tensor.clone() for tensor in CASES["bn+head"].data().tensors)
    images[[3, 5, 11]] = images[0].clone()
    images[5, 0, 2, 1] = torch.nextafter(images[5, 0, 2, 1], torch.tensor(9.0, dtype=images.dtype))
    labels[11] = (labels[0] + 1) % 3
    return TensorDataset(images, labels)


def prepared(form="primal"):
    model = CASES["bn+head"].model()
    return fastntk.prepare(model, doubled(), moved(model), ridge=0.5, form=form, loss=fastntk.SquaredLoss())


@pytest.mark.parametrize("form", FORMS)
def test_the_very_same_pixels_whatever_the_label(form, tmp_path, caplog):
    memory = prepared(form)
    memory.save(tmp_path / "m")
    images = memory.state.members.source.tensors[0]
    for asked in ([0], [3, 7], [5], [0, 3, 11]):
        same = [i for i in range(14) if i not in asked and any(torch.equal(images[i], images[j]) for j in asked)]
        assert fastntk.copies(memory, asked) == same
    assert memory.forget([3]).certificate.copies == 2
    memory.purge()
    memory = fastntk.load(tmp_path / "m", memory.model, doubled())
    assert fastntk.copies(memory, [11]) == [0]
    memory.forget([7])
    memory.remember([7])
    assert "show the same" not in caplog.text
    assert memory.remember([3]).certificate.copies is None
    assert "1 of the samples show the same, pixel by pixel, as others in the memory" in caplog.text
    memory = fastntk.load(tmp_path / "m", memory.model, doubled())
    assert fastntk.copies(memory, [11]) == [0, 3]
    assert "copies" not in memory.requests()[-1].certificate


def test_near_ones_by_what_the_head_is_given():
    memory = prepared()
    state = memory.state
    features = torch.cat([state.network.jacobian.features(x[None])[0] for x, _ in doubled()]).double()
    spread = torch.cdist(features, features).square().mean().sqrt()
    near = fastntk.near_copies(memory, [0, 7], 10.0)
    by_hand = (torch.cdist(features, features[[0, 7]]).amin(1) / spread).tolist()
    assert near == pytest.approx({i: far for i, far in enumerate(by_hand) if i not in (0, 7)}, abs=1e-7)
    assert list(near.values()) == sorted(near.values())
    assert set(fastntk.near_copies(memory, [0], 1e-3)) == {3, 5, 11}
    with pytest.raises(fastntk.InputError, match="above 0"):
        fastntk.near_copies(memory, [0], float("nan"))
    narrow = state.network.narrowed(list(state.network.layout.fast))
    with pytest.raises(fastntk.InputError, match="tuned linear head"):
        _distances(narrow, torch.tensor([0]), torch.tensor([1]))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run over images of which some are twice: 2 is 0 again, 7 is 3 again with another label."""
    here = tmp_path_factory.mktemp("copies")
    x = np.random.default_rng(0).integers(0, 255, (20, 32, 32, 3), dtype=np.uint8)
    x[2], x[7] = x[0], x[3]
    np.savez(here / "d.npz", x=x, y=np.arange(20) % 2)
    succeed("fit", here / "run", *MODEL, *RATE, "--data", here / "d.npz", "--epochs", 1)
    succeed("prepare", here / "run")
    return here / "run"


def test_the_command_line_counts_names_and_takes_them(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    said = succeed("forget", folder, "--ids", "0,3", "--dry-run", "--near", "0.05")
    assert "Pixel by pixel the same, and staying (--with-copies takes them): 2, 7." in said
    assert "Near, and staying (distance; two at random are 1 apart): 2 (0.00), 7 (0.00)." in said
    told = json.loads(succeed("forget", folder, "--ids", "0", "--json"))
    assert (told["samples"], told["copies"], told["copies_taken"], told["copies_left"]) == (1, 1, 0, [2])
    told = json.loads(succeed("forget", folder, "--ids", "3", "--with-copies", "--json"))
    assert (told["samples"], told["copies"], told["copies_taken"], told["copies_left"]) == (2, 0, 1, [])
    refuse("id 7 is not in the memory", "forget", folder, "--ids", "7")
    refuse("--near does not go with it", "forget", folder, "--requests", "f", "--out", "o", "--near", "0.1")
    refuse("above 0", "forget", folder, "--ids", "4", "--near", "0")


@pytest.mark.parametrize("taken", [False, True])
def test_a_batch_counts_and_takes_them(taken, run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    (tmp_path / "asked.csv").write_text("request,ids\nr1,0\nr2,2\n")
    given = ("forget", folder, "--requests", tmp_path / "asked.csv", "--out", tmp_path / "out", "--json")
    for _ in range(2):  # the second time from what is written
        rows = json.loads(succeed(*given, *(["--with-copies"] if taken else [])))["requests"]
        found = [[row.get(name) for name in ("samples", "gone", "copies_taken", "copies_left")] for row in rows]
        assert found == ([[1, 0, 1, 0], [0, 1, None, None]] if taken else [[1, 0, 0, 1], [1, 0, 0, 0]])
