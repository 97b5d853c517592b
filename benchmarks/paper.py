"""The paper's two claims, measured: how far full-model NTK unlearning goes beside Fast-NTK, and how near both come.

    python benchmarks/paper.py --quick --data cifar10.npz       the smallest two networks, some ten minutes
    python benchmarks/paper.py --data cifar10.npz [--only scale|quality] [--draw docs/scale.svg]

scale: random weights, random images of 64 px in ten classes, cross-entropy; every cell in a process of its own that is
told to live in 16 GiB. *fastntk*: batch norms (a vision transformer: ten prompts) and the head. *full*: all parameters,
the kernel summed layer by layer with no Jacobian held, rows of the likeliest classes: the best that the full-model step
can be. *full, rows held*: the step as published, squared loss, all nC x p derivatives in memory. Seconds are of
preparing and of a first answer, for ten images. *retrain*: twelve epochs, from one to three that are run. A cell that
of *full* would take longer than --limit, by the square of the images over the last one's, is not begun.

quality: MobileNetV2 (ImageNet weights) on CIFAR-10, as benchmarks/cross_entropy.py has it: batch norms and head tuned
beside all parameters, a class and a random tenth, three heads, four retrained models each. ratio: the mean distance in
probabilities to these over the mean over their pairs. membership: the share of the forgotten that an attack takes for
training images, of which retrained models have as many as is right. golatkar: the same memory's problem with u = 0, as
published but for the loss, scaled by the trapezium rule.

Rows are written to --out as they are known, and a run that was cut off goes on. The last line is JSON.
"""

import argparse
import json
import math
import time
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import psutil
import torch
from cross_entropy import Answers
from fastntk.metrics import accuracy, probability_distance
from fits import RETRAINED, Case, Setting, opened
from networks import randomise
from rich.console import Console
from rich.table import Table
from scale import Images
from timing import in_own_process, peak_bytes
from torch import nn

import fastntk
import fastntk.memory.prepare as preparing
from fastntk.common.files import read_json, writable, write_json
from fastntk.common.machine import free_bytes, settle
from fastntk.evidence.measures import MEASURES
from fastntk.evidence.methods import Golatkar, Problem
from fastntk.evidence.pages import svg
from fastntk.evidence.report import subjects_of
from fastntk.memory.members import Members
from fastntk.tuning.outputs import model_at

ROOM, SIDE, EPOCHS = 2**34, 64, 12
BN, PROMPTS = ("bn", "head"), ("prompt:10", "head")
NETWORKS = {
    "shufflenet_v2": ("torchvision/shufflenet_v2_x1_0", BN),
    "mobilenet_v2": ("torchvision/mobilenet_v2", BN),
    "resnet18": ("torchvision/resnet18", BN),
    "vit_small_32": ("timm/vit_small_patch32_224", PROMPTS),
    "vit_base_32": ("timm/vit_base_patch32_224", PROMPTS),
}
IMAGES = (100, 200, 500, 1000, 2000, 5000)
METHODS = ("fastntk", "full", "full, rows held", "retrain fastntk's", "retrain all")


def network(name: str, method: str) -> tuple[nn.Module, dict[str, nn.Parameter], int]:
    """A network, what is tuned of it, and how many parameters it has."""
    spec, efficient = NETWORKS[name]
    torch.manual_seed(0)
    model, _ = fastntk.load_model(spec, 10, size=SIDE)
    size = sum(each.numel() for each in model.parameters())
    randomise(model)
    few = method in ("fastntk", "retrain fastntk's")
    return model, fastntk.tune(model, *(efficient if few else ("all",))), size


def _free(device: torch.device) -> int:
    """What is left of the memory that every method has."""
    return min(free_bytes(device), ROOM - psutil.Process().memory_info().rss)


def _no_room(folder: Path | None = None) -> int:
    """All is held in memory."""
    return 0


def cell(name: str, method: str, images: int) -> dict[str, Any]:
    """One, in this process."""
    settle()
    model, tuned, size = network(name, method)
    row = {"method": method, "model": name, "parameters": size, "images": images, "done": True, "why": ""}
    row["tuned"] = sum(each.numel() for each in tuned.values())
    train = Images(images, SIDE)
    if method.startswith("retrain"):
        run = 3 if images <= 500 else 1  # the first steps are slow
        seconds = fastntk.fit(model, train, epochs=run).seconds * EPOCHS / run
        return {**row, "seconds": seconds, "peak_gib": peak_bytes() / 2**30}
    initial = fastntk.snapshot(tuned)
    with torch.no_grad():
        for parameter in tuned.values():
            parameter.add_(0.01 * parameter.abs().mean() * torch.randn_like(parameter))
    preparing.free_bytes = _free  # type: ignore[attr-defined]
    preparing.room = _no_room  # type: ignore[attr-defined]
    form = {"fastntk": "auto", "full": "layerwise"}.get(method, "dual")
    started = time.perf_counter()
    try:
        loss = fastntk.SquaredLoss() if form == "dual" else fastntk.CrossEntropy()
        memory = fastntk.prepare(model, train, initial, form=form, loss=loss)
    except fastntk.InputError as error:
        return {**row, "done": False, "why": str(error).split(" Remedies")[0], "seconds": None, "peak_gib": None}
    memory.preview(range(5, 15))
    seconds = time.perf_counter() - started
    return {**row, "form": memory.form, "seconds": seconds, "peak_gib": peak_bytes() / 2**30}


def scale(arguments: argparse.Namespace, path: Path) -> list[dict[str, Any]]:
    """All cells, those that are known from the file."""
    stored = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = {(row["model"], row["method"], row["images"]): row for row in stored}
    first = IMAGES[: 2 if arguments.quick else None]
    counts = [each for each in first if not arguments.images or each in arguments.images]
    for name in arguments.networks or list(NETWORKS)[: 2 if arguments.quick else None]:
        for method in METHODS:
            before: dict[str, Any] | None = None
            for images in counts:
                known = rows.get((name, method, images))
                done = known and not known["why"].startswith("about")  # --limit may be another
                row = known if known and done else _next(arguments, name, method, images, before)
                if row != known:
                    rows[name, method, images] = row
                    with path.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(json.dumps(row), flush=True)
                before = row if row["done"] else before
    return list(rows.values())


def _next(arguments: argparse.Namespace, name: str, method: str, images: int, before: dict | None) -> dict[str, Any]:
    """A cell, unless the last that was done says that it takes too long."""
    expected = before["seconds"] * (images / before["images"]) ** 2 if before else 0.0
    if before and method == "full" and expected > arguments.limit:
        why = f"about {expected:,.0f} s"
        return {**before, "images": images, "done": False, "why": why, "seconds": None, "peak_gib": None}
    try:
        return in_own_process(__file__, "--cell", name, method, images)
    except SystemExit as error:
        parameters = before["parameters"] if before else None
        row = {"method": method, "model": name, "parameters": parameters, "images": images}
        return {**row, "done": False, "why": f"failed: {str(error)[-200:]}", "seconds": None, "peak_gib": None}


def exponents(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of seconds with images and with the network's parameters, least squares of the logarithms."""
    found = {}
    for method in METHODS:
        done = [row for row in rows if row["method"] == method and row["done"]]
        table = [[math.log(row["images"]), math.log(row["parameters"]), 1.0] for row in done]
        if np.linalg.matrix_rank(table) == 3:
            a, b, _ = np.linalg.lstsq(np.array(table), np.log([row["seconds"] for row in done]), rcond=None)[0]
            found[method] = {"images": float(a), "parameters": float(b)}
    return found


def largest(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """What ended, by parameters, then by images."""
    done = [row for row in rows if row["done"]]
    kept = {}
    for method in METHODS[:3]:
        sizes = [(row["parameters"], row["images"]) for row in done if row["method"] == method]
        if sizes:
            kept[method] = dict(zip(("parameters", "images"), max(sizes), strict=True))
    return kept


class Steps(Answers):
    """Ours, and Golatkar's step from the same memory."""

    def of(self, request: str, ids: list) -> dict[str, tuple]:
        """Every row but the retrained models."""
        problem = Problem(self.memory, ids, self.case.fit.recipe)
        return {**super().of(request, ids), "golatkar": (Golatkar()(problem).parameters, None)}


def answers(case: Case, retrained: int = RETRAINED, found: Answers | None = None) -> list[dict[str, Any]]:
    """A fitted model's rows, beside so many retrained models. Of over 5,000 images that stay, some are looked at."""
    found, rows = found or Steps(case, others=False), []
    everyone = set(found.memory.ids)
    for request, ids, test in case.requests():
        parts = {"forget": Members(case.train, ids), "test": test}
        staying = sorted(everyone - set(ids))
        parts["retain"] = Members(case.train, staying[:: -(-len(staying) // 5000)])
        answered = found.of(request, ids)
        given = {name: each for name, (each, _) in answered.items()}
        given |= {f"retrained {k}": each for k, each in enumerate(case.retrained(request, ids, retrained))}
        models = {name: model_at(case.model, each) for name, each in given.items()}
        subjects = subjects_of(models, parts, case.device)
        rights = [subjects.pop(name) for name in list(subjects) if name.startswith("retrained")]
        floor = mean(probability_distance(a.logits["forget"], b.logits["forget"]) for a, b in combinations(rights, 2))
        for name, each in subjects.items():
            apart = mean(probability_distance(each.logits["forget"], right.logits["forget"]) for right in rights)
            measured = {m: MEASURES[m](each) for m in ("forget_accuracy", "membership")}
            right = {m: float(np.mean([MEASURES[m](other) for other in rights])) for m in measured}
            seen = accuracy(each.logits["test"], each.labels["test"])
            rows.append(
                {
                    "model": case.setting.model,
                    "head": case.setting.head,
                    "images": len(everyone),
                    "request": request,
                    "method": name,
                    "seconds": answered[name][1],
                    "ratio": apart / floor,
                    "forget": measured["forget_accuracy"],
                    "forget_retrained": right["forget_accuracy"],
                    "membership": measured["membership"],
                    "membership_retrained": right["membership"],
                    "test": seen,
                    "test_retrained": mean(accuracy(o.logits["test"], o.labels["test"]) for o in rights),
                }
            )
    return rows


def quality(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows, those that are known from their files."""
    rows: list[dict[str, Any]] = []
    sizes, heads = ((10,), [0]) if arguments.quick else ((20, 50), arguments.heads)
    for head in heads:
        for per_class in sizes:
            for model, recipe in (("mobilenet_v2", "plain"), ("mobilenet_v2_all", "gentle")):
                case = opened(Setting(model, recipe, 10, per_class, head), arguments)
                kept = case.folder / "paper.json"
                if not kept.exists():
                    write_json(kept, {"rows": answers(case)})
                rows += read_json(kept)["rows"]
                print(json.dumps(read_json(kept)["rows"]), flush=True)
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds by images, a panel a network."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure((2.5 * len(names), 3), layout="constrained")
    styles = {
        "fastntk": ("C3", "o-"),
        "full": ("C0", "s-"),
        "full, rows held": ("C0", "x:"),
        "retrain all": ("0.5", "-"),
    }
    for axes, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
        own = [row for row in rows if row["model"] == name]
        for method, (colour, style) in styles.items():
            done = sorted((row["images"], row["seconds"]) for row in own if row["method"] == method and row["done"])
            axes.loglog(*zip(*done, strict=True), style, color=colour, label=method, markersize=4) if done else None
        axes.set_title(f"{name}\n{own[0]['parameters'] / 1e6:.1f}M parameters", fontsize=9)
        axes.set_xlabel("images", fontsize=8)
        axes.tick_params(labelsize=7)
    figure.axes[0].set_ylabel("seconds, with a first answer", fontsize=8)
    handles = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    figure.legend(
        [*handles.values()],
        [str(each) for each in handles],
        loc="outside lower center",
        ncols=len(handles),
        fontsize=8,
        frameon=False,
    )
    path.write_text(svg(figure))


def shown(rows: list[dict[str, Any]]) -> Table:
    """Seconds and memory, for people."""
    counts = sorted({row["images"] for row in rows})
    table = Table("network", "method", *(f"{each:,}" for each in counts))
    for name in dict.fromkeys(row["model"] for row in rows):
        for method in METHODS:
            own = {row["images"]: row for row in rows if (row["model"], row["method"]) == (name, method)}
            table.add_row(name, method, *(_told(own.get(count)) for count in counts))
    return table


def _told(row: dict[str, Any] | None) -> str:
    """Seconds and GiB of a cell, or why there are none."""
    if row is None:
        return ""
    return f"{row['seconds']:.0f} s, {row['peak_gib']:.1f}" if row["done"] else row["why"][:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="CIFAR-10 as .npz, for the quality")
    parser.add_argument("--only", choices=("scale", "quality"), help="one of the two claims")
    parser.add_argument("--quick", action="store_true", help="two networks, 100 and 200 images")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, help="these alone are run")
    parser.add_argument("--images", nargs="+", type=int, help="of these alone the scale is run")
    parser.add_argument("--heads", nargs="+", type=int, default=[0, 1, 2], help="from these the quality is measured")
    parser.add_argument("--limit", type=float, default=900, help="seconds of a cell of the full-model step, at most")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="where rows and fits are kept")
    parser.add_argument("--draw", type=Path, help="where to draw the scale, as SVG")
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.many, arguments.requests = None, "class,tenth"
    if arguments.cell:
        name, method, images = arguments.cell
        print(json.dumps(cell(name, method, int(images))))
        return
    path = writable(arguments.out) / "paper.jsonl"
    rows = scale(arguments, path) if arguments.only != "quality" else []
    if rows:
        Console(width=140).print(shown(rows))
        if arguments.draw:
            draw(rows, arguments.draw)
    found = quality(arguments) if arguments.only != "scale" and arguments.data else []
    print(json.dumps({"rows": rows, "exponents": exponents(rows), "largest": largest(rows), "quality": found}))


if __name__ == "__main__":
    main()
