"""Models fitted with cross-entropy: the convex form's answers beside four retrained models, and what they cost.

    python benchmarks/cross_entropy.py --quick --data cifar10.npz         MobileNetV2, plain and smoothed, one head
    python benchmarks/cross_entropy.py --data cifar10.npz [--many cifar100.npz]

The .npz hold x_train, y_train, x_test, y_test. Tuned are batch norms and the head (ViT: ten prompts, or LoRA of rank 8,
and the head), for 12 epochs: with plain cross-entropy, with label smoothing 0.1, or by AdamW (weight decay 0.05 toward
zero) on images that are flipped and cropped. MobileNetV2 is fitted from three heads.

A cell is a fitted model, a request (a class, a random tenth, a random hundredth) and a method. ratio is the mean
distance on the forgotten images to the four retrained models over the mean over their six pairs, in probabilities and
in logits; forget and test are accuracies, those of the retrained models means. Seconds are of this process: of
preparing, of a request, and of one retraining, done for that in the same run. Fits, answers and cells are kept under
--out, so a run that was cut off goes on; --fits makes the fits and nothing else, --again works out kept cells anew.

one step: of Gauss-Newton over all classes; Golatkar's step from the same memory. fine-tuning, SalUn: two epochs at the
fit's own rate. The gain is of an audit of another tenth, two retrained models.

bound: a class is to be forgotten up to 2 points more than retrained models have of it, its test accuracy within 2
points of theirs, its ratio at most 1.10; a tenth's at most 1.15, and with a gain its accuracy within 4 points.
"beyond chance" is what misses a bound by more than two standard deviations of the retrained models' own figures (of a
ratio: each one's to the other three). The last line is JSON.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev

from exactness import linear_model, peak_gib, solved_independently
from fastntk.methods import Method
from fastntk.metrics import accuracy, label_probability, logit_distance, probability_distance
from fits import REQUESTS, Case, Setting, opened
from memories import automatic
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset

import fastntk
from fastntk.common.files import read_json, write_json
from fastntk.common.machine import settle
from fastntk.evidence.bench.stored import StoredRetraining
from fastntk.evidence.methods import FineTune, Golatkar, Problem, RandomLabel, Retrain
from fastntk.inputs.batches import labels_of
from fastntk.memory.members import Members
from fastntk.tuning.outputs import logits_of, model_at

BOUNDS = {"class": 1.10, "tenth": 1.15}  # of the ratio in probabilities
_FEW_TUNED = ("plain", "smoothed", "adamw")
QUICK = [Setting("mobilenet_v2", recipe, 10, 100, 0) for recipe in ("plain", "smoothed")]
SETTINGS = [
    *(Setting("mobilenet_v2", recipe, 10, 100, head) for recipe in _FEW_TUNED for head in range(3)),
    *(
        Setting(model, recipe, 10, 100, 0)
        for model in ("efficientnet_lite0", "vit_s14", "vit_s14_lora")
        for recipe in ("plain", "smoothed")
    ),
    *(
        Setting("mobilenet_v2", recipe, 100, each, head)
        for each in (20, 50)
        for head in range(3)
        for recipe in _FEW_TUNED
    ),
]


class Answers:
    """What every method makes of a case's requests, from memories that were prepared for it."""

    def __init__(self, case: Case, others: bool) -> None:
        self.case = case
        started = time.perf_counter()
        self.memory = case.prepared()
        self.prepared = time.perf_counter() - started
        self.old = case.prepared(form="dual") if others and case.setting.classes == 10 else None
        self.others = others
        if others:
            retraining = StoredRetraining(case.model, case.fit, case.folder, case.key)
            fastntk.audit(self.memory, retraining, seed=case.setting.head + 1)

    def of(self, request: str, ids: list) -> dict[str, tuple[dict[str, Tensor], float | None]]:
        """Every row but the retrained models, with seconds; of the verdict's answer first."""
        memory, problem = self.memory, Problem(self.memory, ids, self.case.fit.recipe)
        answer = memory.preview(ids)
        self.certificate = answer.certificate
        found: dict[str, tuple[dict[str, Tensor], float | None]] = {
            "original": (memory.anchor, 0.0),
            "step": (answer.parameters, answer.seconds),
        }
        ways = {"step and exact head": False} | ({"gain": True, "gain and exact head": True} if self.others else {})
        for name, gain in ways.items():
            head = name.endswith("head")
            started = time.perf_counter()
            done = fastntk.finished(memory, answer.parameters, gain=gain, exact_head=head, without=ids)
            found[name] = done, answer.seconds + time.perf_counter() - started
        methods = {"fine-tuning": FineTune(), "salun": RandomLabel(0.5)} if self.others else {}
        for name, method in methods.items():
            found[name] = self.case.kept(f"{request}-{name}", partial(_parameters, method, problem), method), None
        if self.old:
            found["one step"] = self.old.preview(ids).parameters, None
            golatkar = Golatkar()(Problem(self.old, ids, self.case.fit.recipe)).parameters
            found["golatkar, trapezium"] = golatkar, None
        return found

    def verdict(self, method: str) -> str | None:
        """On an answer of ours, finished as it is."""
        certificate, audit = self.certificate, self.memory.audit
        if not method.startswith(("step", "gain")):
            return None
        if method.startswith("gain") and audit:
            certificate = replace(certificate, audit=audit.with_gain)
        done = method.endswith("head") and certificate.verdict == "exact head needed"
        return "trusted" if done else certificate.verdict

    def audited(self, method: str) -> float | None:
        """The audit's ratio, which the verdict rests on."""
        audit = self.memory.audit
        if audit is None or not method.startswith(("step", "gain")):
            return None
        return (audit.with_gain if method.startswith("gain") else audit).ratio


def _parameters(method: Method, problem: Problem) -> dict[str, Tensor]:
    return method(problem).parameters


def cells(case: Case, others: bool) -> list[dict[str, object]]:
    """All rows of a fitted model."""
    answers, rows = Answers(case, others), list[dict[str, object]]()
    problem = Problem(answers.memory, next(case.requests())[1], case.fit.recipe)
    started = time.perf_counter()
    Retrain(100)(problem)
    once = time.perf_counter() - started
    for request, ids, held_out in case.requests():
        rows += compared(case, answers, request, ids, held_out, once)
    return rows


def compared(
    case: Case, answers: Answers, request: str, ids: list, test: Dataset, once: float
) -> Iterator[dict[str, object]]:
    """A request's rows beside the retrained models."""

    def logits(parameters: dict[str, Tensor], data: Dataset) -> Tensor:
        return logits_of(model_at(case.model, parameters), data, case.device).cpu()

    state, forgotten = answers.memory.state, Members(case.train, ids)
    labels, test_labels, models = labels_of(forgotten), labels_of(test), case.retrained(request, ids)
    gone, unseen = ([logits(parameters, data) for parameters in models] for data in (forgotten, test))
    floors = {d: mean(d(a, b) for a, b in combinations(gone, 2)) for d in (probability_distance, logit_distance)}
    own = [mean(probability_distance(a, b) for b in gone if b is not a) for a in gone]
    known, seen = [accuracy(each, labels) for each in gone], [accuracy(each, test_labels) for each in unseen]
    chance = {"ratio": stdev(own) / floors[probability_distance], "forget": stdev(known), "test": stdev(seen)}
    sure = mean(label_probability(each, labels) for each in gone)
    for method, (parameters, taken) in answers.of(request, ids).items():
        ours = logits(parameters, forgotten)
        ratios = {d: mean(d(ours, each) for each in gone) / floor for d, floor in floors.items()}
        yield {
            **vars(case.setting),
            "loss": case.setting.recipe,
            "images": len(case.train),
            "kept": state.network.keep,
            "ridge_factor": automatic(answers.memory).factor,
            "gain": answers.memory.audit.gain if answers.memory.audit else None,
            "request": request,
            "method": method,
            "forget": accuracy(ours, labels),
            "forget_retrained": mean(known),
            "sure": label_probability(ours, labels),
            "sure_retrained": sure,
            "test": accuracy(logits(parameters, test), test_labels),
            "test_retrained": mean(seen),
            "ratio_probabilities": ratios[probability_distance],
            "ratio_logits": ratios[logit_distance],
            "chance": chance,
            "prepare_over_retrain": answers.prepared / once,
            "request_over_retrain": None if taken is None else taken / once,
            "verdict": answers.verdict(method),
            "audit_ratio": answers.audited(method),
        }


def bound(row: dict) -> str:
    """Whether a row keeps its bounds, misses one, or misses one by more than chance; empty where there is none."""
    if row["request"] not in BOUNDS:
        return ""
    chance, forget, test = row["chance"], row["forget"] - row["forget_retrained"], row["test"] - row["test_retrained"]
    found = [(row["ratio_probabilities"] - BOUNDS[row["request"]], chance["ratio"])]
    if row["request"] == "class":
        found += [(forget - 2, chance["forget"]), (abs(test) - 2, chance["test"])]
    elif row["method"].startswith("gain"):
        found += [(abs(forget) - 4, chance["forget"])]
    if any(over > 2 * sd + 1e-9 for over, sd in found):
        return "beyond chance"
    return "missed" if any(over > 1e-9 for over, _ in found) else "kept"


def verdicts(rows: list[dict]) -> dict[str, object]:
    """How often ours are trusted, and the trusted ones that miss their bound by more than chance."""
    ours = [row for row in rows if row["verdict"] and row["request"] in BOUNDS and row["method"] != "step"]
    trusted = [row for row in ours if row["verdict"] == "trusted"]
    wrong = [row for row in trusted if bound(row) == "beyond chance"]
    names = ("model", "loss", "classes", "per_class", "head", "request", "method")
    return {
        "answers": len(ours),
        "trusted": len(trusted),
        "wrong": [" ".join(str(row[name]) for name in names) for row in wrong],
    }


def table(rows: list[dict[str, object]]) -> Table:
    """For people."""
    names = ("model", "loss", "classes", "head", "request", "method")
    accuracies = ("forget", "forget_retrained", "test", "test_retrained")
    shares = ("ratio_probabilities", "ratio_logits", "prepare_over_retrain", "request_over_retrain")
    found = Table(*names, *accuracies, *shares, "bound", "verdict")
    for row in rows:
        numbers = [f"{row[name]:.1f}" for name in accuracies]
        numbers += ["" if row[name] is None else f"{row[name]:.3f}" for name in shares]
        found.add_row(*(str(row[name]) for name in names), *numbers, bound(row), str(row["verdict"] or ""))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 as .npz")
    parser.add_argument("--many", help="CIFAR-100 as .npz")
    parser.add_argument("--quick", action="store_true", help="MobileNetV2, one head, ours alone")
    parser.add_argument("--only", default="", help="settings whose name has this in it")
    parser.add_argument("--requests", default=",".join(REQUESTS), help="these alone, with commas")
    parser.add_argument("--ours", action="store_true", help="no other methods and no audit")
    parser.add_argument("--fits", action="store_true", help="make the fits, and nothing else")
    parser.add_argument("--again", action="store_true", help="work out kept cells anew")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="where fits and answers are kept")
    arguments = parser.parse_args()
    settle()
    settings = [each for each in (QUICK if arguments.quick else SETTINGS) if arguments.only in str(each)]
    rows: list[dict[str, object]] = []
    for setting in settings:
        if setting.classes > 10 and not arguments.many:
            continue
        case = opened(setting, arguments)
        ours = arguments.quick or arguments.ours
        kept = case.folder / f"{'ours' if ours else 'cells'}-{arguments.requests.replace(',', '-')}.json"
        if arguments.fits:
            for request, ids, _ in case.requests():
                case.retrained(request, ids)
        elif arguments.again or not kept.exists():
            write_json(kept, {"cells": cells(case, not ours)})
        if kept.exists():
            rows += read_json(kept)["cells"]
            Console(width=200).print(table(read_json(kept)["cells"]))
    if not arguments.fits:
        exact = {"linear_model": linear_model(), "independent_solve": solved_independently()}
        peak = {classes: peak_gib(classes) for classes in (10, 100, 1000)}
        print(json.dumps({"cells": rows, "exact": exact, "peak_gib": peak, "verdicts": verdicts(rows)}))


if __name__ == "__main__":
    main()
