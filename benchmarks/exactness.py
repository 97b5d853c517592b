"""How exact the convex form is, against solvers that know nothing of it, and what it holds at the most.

    python benchmarks/exactness.py                 both figures of exactness, and the peak at 10, 100 and 1,000 classes
    python benchmarks/exactness.py --peak 1000     the peak of preparing, in GiB, and the seconds

Exactness is the largest difference of a parameter over the largest parameter's change since before fitting. The peak is
of ResNet-18 with random weights on 1,000 random images of 64 px with random labels, batch norms and head tuned, four
classes a sample kept.
"""

import argparse
import json
import time

import numpy as np
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from timing import in_own_process
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils.data import TensorDataset

import fastntk
from fastntk.common.machine import peak_memory, settle
from fastntk.inputs.libraries import timm
from fastntk.jacobians.layout import Layout

LOSS = fastntk.CrossEntropy()


def linear_model(ridge: float = 0.7) -> float:
    """A linear model at its optimum, after each of several requests, in two orders: how far it is from scikit-learn's
    logistic regression of the samples that are left."""
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(200, 1, 1, 20, generator=generator).double(), torch.arange(200) % 5
    layer = nn.Linear(20, 5, bias=False)
    model = nn.Sequential(nn.Flatten(), layer).double()

    def regression(stay: Tensor) -> Tensor:
        fit = LogisticRegression(C=1 / ridge, fit_intercept=False, tol=1e-14, max_iter=100_000, solver="newton-cg")
        return torch.tensor(fit.fit(features[stay].flatten(1).numpy(), labels[stay].numpy()).coef_)

    everyone = torch.arange(200)
    with torch.no_grad():
        layer.weight.copy_(regression(everyone))
    initial = {"1.weight": torch.zeros(5, 20).double()}
    requests = [("forget", [3, 50, 120]), ("forget", list(range(0, 50, 7))), ("remember", [50]), ("forget", [9, 110])]
    worst = 0.0
    for order in (requests, [requests[k] for k in (1, 3, 0, 2)]):
        memory = fastntk.prepare(model, TensorDataset(features, labels), initial, ridge=ridge, loss=LOSS, classes="all")
        for kind, ids in order:
            answer = getattr(memory, kind)(ids)
            expected = regression(torch.tensor(sorted(memory.ids)))
            off = (answer.parameters["1.weight"] - expected).abs().max() / expected.abs().max()
            worst = max(worst, float(off))
    return worst


def solved_independently(ridge: float = 0.3) -> float:
    """The linearised optimum of a small convolutional network without some samples, all classes kept, against scipy's
    L-BFGS over all parameters."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    model = nn.Sequential(body, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6)).double().eval()
    data = TensorDataset(torch.randn(60, 3, 12, 12).double(), torch.randint(6, (60,)))
    fastntk.tune(model, "bn", "head")
    initial = fastntk.fit(model, data, loss=LOSS, epochs=20, learning_rate=0.03).initial
    memory = fastntk.prepare(model, data, initial, ridge=ridge, loss=LOSS, classes="all")
    gone = [2, 7, 30, 41]
    moved = memory.preview(gone).parameters
    layout, stay = memory.state.layout, [i for i in range(60) if i not in gone]
    solved = {len(some): _optimum(model, layout, data, some, initial, ridge) for some in (list(range(60)), stay)}
    expected = solved[len(stay)] - solved[60]
    found = layout.flatten(moved) - layout.flatten(memory.anchor)
    return float((found - expected).abs().max() / memory.state.displacement.abs().max())


def _optimum(
    model: nn.Module, layout: Layout, data: TensorDataset, some: list[int], initial: dict[str, Tensor], ridge: float
) -> Tensor:
    images, labels = (tensor[some] for tensor in data.tensors)
    tuned = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    here = layout.flatten(tuned)
    logits = functional_call(model, tuned, (images,)).detach()
    dense = jacrev(lambda v: functional_call(model, layout.unflatten(v, tuned), (images,)))(here)
    u = here - layout.flatten(initial)

    def objective(vector: np.ndarray) -> tuple[float, np.ndarray]:
        d = torch.tensor(vector, requires_grad=True)
        value = len(labels) * LOSS(logits + dense @ d, labels) + ridge / 2 * (d + u).square().sum()
        value.backward()
        return value.item(), torch.zeros_like(d).numpy() if d.grad is None else d.grad.numpy()

    options = {"maxiter": 50_000, "maxfun": 100_000, "ftol": 1e-17, "gtol": 1e-11, "maxcor": 60}
    return torch.tensor(minimize(objective, np.zeros(len(u)), jac=True, method="L-BFGS-B", options=options).x)


def peak_gib(classes: int) -> float:
    """Of preparing, in a process of its own."""
    return in_own_process(__file__, "--peak", classes)["peak_gib"]


def _peak(classes: int) -> dict[str, float]:
    settle()
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(1000, 3, 64, 64, generator=generator), torch.randint(classes, (1000,), generator=generator)
    )
    model = timm().create_model("resnet18", num_classes=classes).eval()
    fastntk.tune(model, "bn", "head")
    initial = fastntk.fit(model, data, loss=LOSS, epochs=1).initial
    planned = fastntk.plan(model, data, loss=LOSS, classes=4, form="convex")
    with peak_memory(torch.device("cpu")) as peak:
        started = time.perf_counter()
        memory = fastntk.prepare(model, data, initial, loss=LOSS, classes=4, form="convex")
        seconds = time.perf_counter() - started
    requests = {f"request_of_{n}": memory.preview(memory.ids[:n]).seconds for n in (10, 100)}
    foreseen = {"planned_gib": planned.bytes / 2**30, "planned_seconds": planned.total_seconds}
    return {"peak_gib": peak.bytes / 2**30, "seconds": seconds, **requests, **foreseen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", type=int)
    arguments = parser.parse_args()
    if arguments.peak:
        print(json.dumps(_peak(arguments.peak)))
        return
    exact = {"linear_model": linear_model(), "independent_solve": solved_independently()}
    print(json.dumps({"exact": exact, "peak_gib": {classes: peak_gib(classes) for classes in (10, 100, 1000)}}))


if __name__ == "__main__":
    main()
