"""Methods side by side on one request."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor
from torch.utils.data import Dataset

from fastntk.common.progress import track
from fastntk.evidence.methods import FastNTK, Golatkar, Method, Problem, Retrain, Unlearned
from fastntk.evidence.methods.problem import measured
from fastntk.evidence.report import ORIGINAL, RETRAINED, Measures, Report, reported, subjects_of
from fastntk.memory.audit import Audit
from fastntk.tuning.outputs import model_at


def references(other_seed: int, count: int = 2, own_seed: int | None = None) -> dict[str, Method]:
    """Models retrained without the data, the first with the fit's own seed and the others with ``other_seed`` and those
    after it, but for ``own_seed``, the fit's if it is known: the yardstick and its noise floor."""
    seeds = (seed for seed in range(other_seed, other_seed + count) if seed != own_seed)
    others = {f"{RETRAINED}_{k + 2}": Retrain(seed) for k, seed in zip(range(count - 1), seeds, strict=False)}
    return {RETRAINED: Retrain(), **others} if count else {}


def one_shot() -> dict[str, Method]:
    """The methods that take one step."""
    ours = {"fastntk": FastNTK(), "fastntk_exact_head": FastNTK(exact_head=True)}
    return {**ours, "golatkar": Golatkar(), "golatkar_step": Golatkar(trapezium=False)}


def compare(
    problem: Problem,
    test: Dataset,
    methods: Mapping[str, Method],
    original_seconds: float | None = None,
    answered: Mapping[str, Mapping[str, Tensor]] | None = None,
    thoroughly: bool = False,
    known: Mapping[str, Measures] | None = None,
) -> tuple[Report, dict[str, str]]:
    """Run every method on the request and measure its model beside the original one.

    Args:
        problem: the request.
        test: samples that no model was fitted to.
        methods: by name; ``references`` should be among them.
        original_seconds: what fitting the original took, if known.
        answered: parameters of answers that are there already, by name.
        thoroughly: with the costly measures.
        known: rows that were measured already.

    Returns:
        The report, whose first row is ``original``, and what the methods said of their own results.
    """
    done = {ORIGINAL: Unlearned(problem.memory.anchor, seconds=original_seconds)}
    done |= {name: measured(method, problem) for name, method in track(methods.items(), "methods")}
    done |= {name: Unlearned(dict(parameters)) for name, parameters in (answered or {}).items()}
    models = {name: model_at(problem.model, each.parameters) for name, each in done.items()}
    sets = {"retain": problem.retain, "forget": problem.forgotten, "test": test}
    subjects = {
        name: replace(
            subject,
            seconds=done[name].seconds,
            bytes=done[name].bytes,
            problem=problem,
            parameters=done[name].parameters,
            audit=_audit_of(methods.get(name), problem),
        )
        for name, subject in subjects_of(models, sets, problem.device).items()
    }
    notes = {name: each.note for name, each in done.items() if each.note}
    return reported(subjects, thoroughly=thoroughly, known=known), notes


def _audit_of(method: Method | None, problem: Problem) -> Audit | None:
    """The audit that speaks of a method's answers."""
    own = getattr(method, "method", method)  # of one whose answers are kept
    return own.audit_of(problem.memory) if isinstance(own, FastNTK) else None
