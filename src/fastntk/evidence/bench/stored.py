"""Fits and answers kept on disk, so that an interrupted benchmark goes on where it was."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastntk.common.files import read_tensors, write_tensors
from fastntk.common.formats import Document, Format, unchanged
from fastntk.evidence.methods import Method, Problem, Unlearned
from fastntk.evidence.methods.problem import measured
from fastntk.evidence.methods.retrain import retrained
from fastntk.tuning.fitting import Fit, fit
from fastntk.tuning.parameters import snapshot, tuned
from fastntk.tuning.recipe import Recipe

FORMAT = Format("stored fit", (unchanged,))
"""Of the files."""


@dataclass(frozen=True)
class StoredAnswer:
    """A method whose answer is taken from ``path`` if it was stored there under the same ``key``."""

    method: Method
    path: Path
    key: str

    def __call__(self, problem: Problem) -> Unlearned:
        """The stored answer, or the method's, which is then stored."""
        if kept := _kept(self.path, self.key, problem.device):
            tensors, record = kept
            return Unlearned(tensors, **{key: record[key] for key in ("note", "seconds", "bytes")})
        done = measured(self.method, problem)
        known = {"key": self.key, "seconds": done.seconds, "note": done.note, "bytes": done.bytes}
        write_tensors(self.path, done.parameters, FORMAT.stamped(known))
        return done


def fitted(model: nn.Module, train: Dataset, recipe: Recipe, path: Path, key: str) -> Fit:
    """Fit ``model``, or put the fit stored at ``path`` under the same ``key`` into it."""
    if kept := _kept(path, key, next(model.parameters()).device):
        tensors, record = kept
        initial = snapshot(tuned(model))
        model.eval().load_state_dict(tensors, strict=False)
        count = len(train)  # type: ignore[arg-type]
        return Fit(initial, [], recipe, record["seconds"], shrinkage=recipe.shrinkage(count))
    done = fit(model, train, recipe)
    write_tensors(path, tuned(model), FORMAT.stamped({"key": key, "seconds": done.seconds}))
    return done


@dataclass
class StoredRetraining:
    """Training as ``fit`` did, for an audit; what each seed arrives at is kept in ``folder``. ``seconds`` add up what
    all took when they were made."""

    model: nn.Module
    fit: Fit
    folder: Path
    key: str
    seconds: float = 0.0

    def __call__(self, data: Dataset, seed: int) -> dict[str, Tensor]:
        """The tuned parameters after it."""
        path = self.folder / f"audit-{seed}.safetensors"
        if kept := _kept(path, self.key, next(self.model.parameters()).device):
            parameters, seconds = kept[0], kept[1]["seconds"]
        else:
            recipe = replace(self.fit.recipe, seed=self.fit.recipe.seed + seed)
            parameters, seconds = retrained(self.model, self.fit.initial, data, recipe)
            write_tensors(path, parameters, FORMAT.stamped({"key": self.key, "seconds": seconds}))
        self.seconds += seconds
        return parameters


def _kept(path: Path, key: str, device: torch.device) -> tuple[dict[str, Tensor], Document] | None:
    """What was stored at ``path`` under ``key``: tensors, on ``device``, and record; None if nothing was."""
    if not path.exists():
        return None
    tensors, record = read_tensors(path)
    if record.get("key") != key:
        return None
    return {name: tensor.to(device) for name, tensor in tensors.items()}, FORMAT.read(record, path)
