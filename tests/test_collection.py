"""Partial sums: what goes on from them, and what must not stay."""

from dataclasses import replace

import pytest
import torch
from cases import CASES
from memories import close, moved
from torch.utils.data import TensorDataset

import fastntk
from fastntk.jacobians.numerics import Numerics
from fastntk.memory.prepare import linearised
from fastntk.solve import collect as collection


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A preparation in shards of 4 samples that is cut off after its second one."""
    monkeypatch.setattr(collection, "SHARD", 4)
    write = collection.Checkpoint.write

    def cut(self, sums, shards):
        write(self, sums, shards)
        if len(shards) == 2:
            raise KeyboardInterrupt

    case = CASES["bn+head"]
    model = case.model()
    with monkeypatch.context() as patch:
        patch.setattr(collection, "_OVERHEAD", float("inf"))
        patch.setattr(collection.Checkpoint, "write", cut)
        with pytest.raises(KeyboardInterrupt):
            fastntk.prepare(
                model,
                case.data(),
                moved(model),
                ridge=0.5,
                form="primal",
                checkpoint=tmp_path / "partial",
                loss=fastntk.SquaredLoss(),
            )
    assert {path.name for path in (tmp_path / "partial").iterdir()} == {"lock", "sums-0.safetensors"}
    return model, case.data(), tmp_path / "partial"


def test_it_goes_on_from_the_last_shard(interrupted, monkeypatch):
    model, data, partial = interrupted
    (partial / ".sums-8.safetensors.new").write_bytes(b"half")
    seen = []
    stream = collection.Linearised.stream
    monkeypatch.setattr(collection.Linearised, "stream", lambda self, ids, *rest: seen.extend(ids) or stream(self, ids))
    memory = fastntk.prepare(
        model, data, moved(model), ridge=0.5, form="primal", checkpoint=partial, loss=fastntk.SquaredLoss()
    )
    assert seen == [0, *range(8, 14)]  # sample 0 is asked for its sizes
    assert not partial.exists()
    whole = fastntk.prepare(model, data, moved(model), ridge=0.5, form="primal", loss=fastntk.SquaredLoss())
    torch.testing.assert_close(
        memory.state.solution.sums.gram(), whole.state.solution.sums.gram(), rtol=1e-12, atol=1e-12
    )
    close({"": memory.state.fingerprints}, {"": whole.state.fingerprints}, 0)
    close(memory.forget([3]).parameters, whole.forget([3]).parameters)


def test_partial_sums_of_another_preparation_are_not_taken(interrupted):
    model, data, partial = interrupted
    data.tensors[0][0] += 1
    memory = fastntk.prepare(
        model, data, moved(model), ridge=0.5, form="primal", checkpoint=partial, loss=fastntk.SquaredLoss()
    )
    whole = fastntk.prepare(model, data, moved(model), ridge=0.5, form="primal", loss=fastntk.SquaredLoss())
    torch.testing.assert_close(
        memory.state.solution.sums.gram(), whole.state.solution.sums.gram(), rtol=1e-12, atol=1e-12
    )
    assert not partial.exists()


def test_partial_sums_over_another_image_or_label_are_not_taken(interrupted):
    """Whichever it is, of a shard that is done or of one that is not."""
    model, data, _ = interrupted
    network = linearised(model, data, fastntk.SquaredLoss(), Numerics())
    before = collection.key(network, 14)
    assert collection.key(network, 14) == before
    for place in (1, 5, 13):
        images, labels = (tensor.clone() for tensor in data.tensors)
        images[place, 0, 0, 0] += 1e-3
        assert collection.key(replace(network, train=TensorDataset(images, data.tensors[1])), 14) != before
        labels[place] = (labels[place] + 1) % 3
        assert collection.key(replace(network, train=TensorDataset(data.tensors[0], labels)), 14) != before


def test_nothing_stays_after_clearing(interrupted):
    partial = interrupted[2]
    (partial / ".sums-8.safetensors.new").write_bytes(b"half")
    collection.clear(partial)
    assert not partial.exists()


def test_two_jobs_never_share_partial_sums(interrupted):
    model, data, partial = interrupted
    other = collection.Checkpoint(partial, "another")
    other.open()
    with pytest.raises(fastntk.InputError, match="another process is preparing"):
        fastntk.prepare(model, data, moved(model), form="primal", checkpoint=partial, loss=fastntk.SquaredLoss())
    collection.clear(partial)
    assert partial.exists()
    other.close()
    fastntk.prepare(model, data, moved(model), form="primal", checkpoint=partial, loss=fastntk.SquaredLoss())
    assert not partial.exists()


def test_damaged_partial_sums_are_made_again(interrupted):
    model, data, partial = interrupted
    [path] = partial.glob("sums-*")
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 1
    path.write_bytes(whole)
    given = {"form": "primal", "ridge": 0.5, "loss": fastntk.SquaredLoss()}
    memory = fastntk.prepare(model, data, moved(model), checkpoint=partial, **given)
    close(memory.forget([3]).parameters, fastntk.prepare(model, data, moved(model), **given).forget([3]).parameters)


def test_sums_over_other_samples_are_refused(interrupted, monkeypatch):
    model, data, partial = interrupted
    earlier = collection.Checkpoint.add_earlier_

    def twice(self, sums):
        earlier(self, sums)
        earlier(self, sums)

    monkeypatch.setattr(collection.Checkpoint, "add_earlier_", twice)
    with pytest.raises(fastntk.InputError, match="over 22 samples, and there are 14"):
        fastntk.prepare(model, data, moved(model), form="primal", checkpoint=partial, loss=fastntk.SquaredLoss())
