"""The formats of a memory's folder, and how documents of older ones become documents of today's."""

from dataclasses import fields
from typing import Any

import torch

from fastntk.common.errors import InputError
from fastntk.common.formats import Format, unchanged
from fastntk.solve.linalg import lower_of
from fastntk.solve.schur import complement, factored
from fastntk.solve.sums import Sums
from fastntk.tuning.losses import CrossEntropy, SquaredLoss, loss_numbers

_SOLVED = ("kernel", "inverse", "targets", "coefficients", "base")
_GONE = {"primal": ("inverse",), "dual": _SOLVED, "convex": _SOLVED}
"""What a form does not keep any more."""


def _state_0(document: dict[str, Any]) -> dict[str, Any]:
    """Names of their own for what was called residuals, probe and short of head; how to compute in one place; the
    solution says over which positions it is."""
    tensors, options, probes = document["tensors"], document["options"], document["class_probes"] or {}
    names = {
        "residuals": "fingerprints",
        "short_of_head": "head_shortfall",
        "solution.sums.count": "solution.sums.samples",
    }
    renamed = {names.get(name, name): tensor for name, tensor in tensors.items()}
    present = [position for position, each in enumerate(document["ids"]) if each is not None]
    numerics = {
        "batch_size": document["batch_size"],
        "precision": document["precision"],
        "dtype": options["dtype"],
        "workers": 0,
        "class_probes": probes.get("count"),
        "probe_seed": probes.get("seed", 0),
    }
    kept = {key: document[key] for key in ("form", "ridge", "loss", "calibration", "layout", "names", "model", "ids")}
    return {
        **kept,
        "tensors": {**renamed, "solution.over": torch.tensor(present, dtype=torch.long)},
        "numerics": numerics,
        "made": {
            "versions": document["versions"],
            "options": {
                "ridge": options["ridge"],
                "form": options["form"],
                "witnesses": options["probe"],
                "seed": options["seed"],
            },
        },
    }


def _entry_0(document: dict[str, Any]) -> dict[str, Any]:
    """A certificate's residual is its inexactness."""
    return {"inexactness" if key == "residual" else key: value for key, value in document.items()}


def _entry_1(document: dict[str, Any]) -> dict[str, Any]:
    """All classes were kept, distances were of logits, and nobody asked whether a class was still there."""
    if "floor" in document:  # an audit
        return {"unit": "logits", **document}
    audit = document.get("audit")
    document = {**document, "audit": {"unit": "logits", **audit} if audit else audit}
    return {"unit": "logits", "tail": 0.0, "has_head": False, **document} if "limit" in document else document


def _entry_2(document: dict[str, Any]) -> dict[str, Any]:
    """Audits did not keep how margins differ, so there is no doubt of what they saw."""
    none = {"errors": None, "errors_with_gain": None}
    if "floor" in document:  # an audit
        return {**none, **document}
    return {**document, "audit": {**none, **document["audit"]}} if document.get("audit") else document


def _state_1(document: dict[str, Any]) -> dict[str, Any]:
    """Rows of all classes; cross-entropy without label smoothing."""
    made = document["made"]
    made = {**made, "options": {**made["options"], "classes": "all"}}
    loss = {"smoothing": 0.0, **document["loss"]} if document["loss"]["name"] == "cross-entropy" else document["loss"]
    return {**document, "keep": None, "made": made, "loss": loss}


def _state_2(document: dict[str, Any]) -> dict[str, Any]:
    """The pull was toward the start, and classes weighed the same."""
    made, loss, tensors = document["made"], document["loss"], document["tensors"]
    if loss["name"] == "cross-entropy":
        loss = {"weights": [], **loss}
    if "solution.smoothing" in tensors:
        raise InputError(
            "a convex memory of before has a row a class where now there is one fewer. Prepare it again: fastntk "
            "prepare RUN, in another run folder if it has answered requests."
        )
    made = {**made, "options": {**made["options"], "shrinkage": 1.0}}
    return {**document, "made": made, "loss": loss, "tail": 0.0}


def _state_3(document: dict[str, Any]) -> dict[str, Any]:
    """Inverses were kept where Cholesky factors are: the primal form's is made from its sums, of which lower triangles
    are kept now; the dual and convex forms are solved anew when something first asks."""
    gone = {f"solution.{name}" for name in _GONE.get(document["form"], ())}
    tensors = {name: each for name, each in document["tensors"].items() if name not in gone}
    if document["form"] == "dual":
        squared = {"smoothing": -1.0, "scale": 10.0, "weights": []}
        tensors |= {f"solution.{name}": torch.tensor(each, dtype=torch.float64) for name, each in squared.items()}
    if document["form"] == "primal":
        sums = Sums(*(tensors[f"solution.sums.{each.name}"] for each in fields(Sums)))
        known = tensors["solution.head_inverse"], document["ridge"]
        schur = complement(sums, *known)
        squares = {"sums.rest": sums.rest, "schur": schur, "factor": factored(schur)}
        tensors |= {f"solution.{name}": lower_of(square) for name, square in squares.items()}
    return {**document, "tensors": tensors}


def _state_4(document: dict[str, Any]) -> dict[str, Any]:
    """Nobody knew of copies; there were two losses, and a smoothing of -1 told them apart."""
    tensors = {**document["tensors"], "pixels": torch.zeros(len(document["ids"]), dtype=torch.long)}
    smoothing, scale, weights = (tensors.pop(f"solution.{name}", None) for name in ("smoothing", "scale", "weights"))
    if smoothing is not None:
        squared = float(smoothing) < 0
        loss = SquaredLoss(float(scale)) if squared else CrossEntropy(float(smoothing), weights.tolist())
        tensors |= {f"solution.{name}": each for name, each in loss_numbers(loss).items()}
    return {**document, "tensors": tensors}


def _state_5(document: dict[str, Any]) -> dict[str, Any]:
    """Nothing said what noise was for."""
    return {"removal": None, **document}


def _request_1(document: dict[str, Any]) -> dict[str, Any]:
    """Nobody knew of copies."""
    unknown = torch.zeros(len(document["tensors"]["positions"]), dtype=torch.long)
    return {**document, "tensors": {**document["tensors"], "pixels": unknown}}


BASE = Format("memory", (_state_0, _state_1, _state_2, _state_3, _state_4, _state_5))
"""Of ``base-N.safetensors``: ``packing``."""

JOURNAL = Format("request", (unchanged, _request_1))
"""Of ``journal-N.safetensors``."""

LEDGER = Format("ledger", (unchanged,))
"""Of the ledger's tables."""

ENTRY = Format("ledger's entry", (_entry_0, _entry_1, _entry_2))
"""Of what the ledger says of a request: a certificate, an audit or a refresh."""
