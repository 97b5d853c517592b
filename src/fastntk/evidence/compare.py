"""Methods side by side on one request."""

from collections.abc import Mapping

from torch import Tensor
from torch.utils.data import Dataset

from fastntk.common.progress import track
from fastntk.evidence.methods import FastNTK, Golatkar, Method, Problem, Retrain
from fastntk.evidence.methods.problem import measured
from fastntk.evidence.recovery import head_recovery, relearn_steps
from fastntk.evidence.report import FLOOR, REFERENCE, Report, evaluate
from fastntk.tuning.outputs import at

COMPARED_WITH = ("original", REFERENCE, FLOOR)
"""The rows of a comparison that are no methods."""


def references(other_seed: int) -> dict[str, Method]:
    """Two models retrained without the data, the second with another seed: the yardstick and its noise floor."""
    return {REFERENCE: Retrain(), FLOOR: Retrain(other_seed)}


def one_shot() -> dict[str, Method]:
    """The methods that take one step."""
    ours = {"fastntk": FastNTK(), "fastntk_exact_head": FastNTK(exact_head=True)}
    return {**ours, "golatkar": Golatkar(), "golatkar_trapezium": Golatkar(trapezium=True)}


def compare(
    problem: Problem, test: Dataset, methods: Mapping[str, Method], original_seconds: float | None = None
) -> tuple[Report, dict[str, str]]:
    """Run every method on the request and measure its model beside the original one.

    Args:
        problem: the request.
        test: samples that no model was fitted to.
        methods: by name; ``references`` should be among them.
        original_seconds: what fitting the original took, if known.

    Returns:
        The report, whose first row is ``original``, and what the methods said of their own results.
    """
    answers: dict[str, Mapping[str, Tensor]] = {"original": problem.memory.anchor}
    seconds: dict[str, float | None] = {"original": original_seconds}
    peaks: dict[str, int | None] = {}
    notes = {}
    for name, method in track(methods.items(), "methods"):
        done = measured(method, problem)
        answers[name], seconds[name], peaks[name] = done.parameters, done.seconds, done.bytes
        if done.note:
            notes[name] = done.note
    models = {name: at(problem.model, parameters) for name, parameters in answers.items()}
    report = evaluate(
        models, retain=problem.retain, forget=problem.forgotten, test=test, seconds=seconds, device=problem.device
    )
    for name, parameters in track(answers.items(), "recovering what was forgotten"):
        peak, audit = peaks.get(name), problem.memory.audit if name in notes else None
        report.rows[name] |= {
            "relearn_steps": relearn_steps(problem, parameters),
            "head_recovery": head_recovery(problem, parameters),
            "peak_megabytes": None if peak is None else peak / 1e6,
            "doubt": None if audit is None else audit.doubt(report.logits[name]["forget"], report.labels["forget"]),
        }
    return report, notes
