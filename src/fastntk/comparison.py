"""Methods side by side on one request."""

from collections.abc import Mapping

from torch.utils.data import Dataset

from fastntk.methods import FastNTK, Golatkar, Method, Problem, Retrain
from fastntk.outputs import at
from fastntk.progress import track
from fastntk.report import FLOOR, REFERENCE, Report, evaluate

COMPARED_WITH = ("original", REFERENCE, FLOOR)
"""The rows of a comparison that are no methods."""


def references(other_seed: int) -> dict[str, Method]:
    """Two models retrained without the data, the second with another seed: the yardstick and its noise floor."""
    return {REFERENCE: Retrain(), FLOOR: Retrain(other_seed)}


def one_shot() -> dict[str, Method]:
    """The methods that take one step."""
    return {"fastntk": FastNTK(), "golatkar": Golatkar(), "golatkar_trapezium": Golatkar(trapezium=True)}


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
    device = next(problem.model.parameters()).device
    models = {"original": at(problem.model, problem.memory.anchor)}
    seconds: dict[str, float | None] = {"original": original_seconds}
    notes = {}
    for name, method in track(methods.items(), "methods"):
        done = method(problem)
        models[name], seconds[name] = at(problem.model, done.parameters), done.seconds
        if done.note:
            notes[name] = done.note
    report = evaluate(
        models, retain=problem.retain, forget=problem.forgotten, test=test, seconds=seconds, device=device
    )
    return report, notes
