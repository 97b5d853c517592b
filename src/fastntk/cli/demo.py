"""The whole job on real images that two PyPI packages bring along: forget, and compare with retraining."""

from pathlib import Path

import torch

from fastntk.common.files import writable
from fastntk.common.progress import console
from fastntk.evidence.compare import compare, one_shot, references
from fastntk.evidence.methods import Problem
from fastntk.evidence.pages import write_report
from fastntk.evidence.report import Report
from fastntk.evidence.requests import drawn
from fastntk.inputs.packaged import digits, pretrained
from fastntk.memory.memory import prepare
from fastntk.tuning.fitting import fit
from fastntk.tuning.recipe import Recipe
from fastntk.tuning.selectors import tune


def run(out: Path, device: torch.device | str = "cpu", seed: int = 0) -> tuple[dict[str, Report], dict[str, str]]:
    """Fit, prepare, forget two requests, retrain twice for each, and write ``report.json`` and ``report.html``.

    Returns:
        The report and the verdict of each request: ``class`` (all of digit 3) and ``random`` (a tenth).
    """
    writable(out)
    model, preprocessing = pretrained(seed)
    train, test = digits(preprocessing, 0, 50), digits(preprocessing, 50, 100)
    tune(model.to(device), "bn", "head")
    console.print("fitting EfficientNet-Lite0's batch norm and head to 500 digits")
    fitted = fit(model, train, Recipe(seed=seed))
    console.print("preparing the memory, once for all requests")
    memory = prepare(model, train, fitted.initial)
    reports, verdicts = {}, {}
    for name, request in {"class": "class", "random": "random 10%"}.items():
        forget, held_out = drawn(request, train, test, seed, gone=3)
        console.print(f"forgetting, and retraining twice to compare: {name}")
        problem = Problem(memory, forget, fitted.recipe)
        methods = references(seed + 1) | one_shot()
        reports[name], notes = compare(problem, held_out, methods, fitted.seconds)
        verdicts[name] = notes["fastntk"]
    write_report(out, "A network forgets every 3", reports, verdicts, "demo.html")
    return reports, verdicts
