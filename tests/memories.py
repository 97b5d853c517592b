"""Memories to test with, of the problems in ``cases``, and whether parameters are the same."""

import torch
from cases import CASES, Case, LinearInTuned

import fastntk
from fastntk.memory.memory import Memory
from fastntk.tuning.parameters import snapshot, tuned

LINEAR = Case(LinearInTuned, ("head",))


def moved(model, seed=5, size=0.05):
    """Parameters some way off the model's, as if before fitting."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + size * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        for name, tensor in snapshot(tuned(model)).items()
    }


def prepared(name="bn+head", form="auto", ridge=0.5, loss=fastntk.SquaredLoss(), **options) -> Memory:
    case = CASES[name]
    model = case.model()
    return fastntk.prepare(model, case.data(), moved(model), ridge=ridge, form=form, loss=loss, **options)


def close(left, right, tolerance=1e-9):
    assert list(left) == list(right)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=tolerance, atol=tolerance)


def saved(folder, form="primal", name="bn+head", **options):
    memory = prepared(name, form, **options)
    memory.save(folder)
    return memory


def reopened(memory, folder):
    return fastntk.load(folder, memory.model, memory.state.members.source)
