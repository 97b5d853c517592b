"""Per-sample Jacobians of the families of networks that there are, against torch.func: exact, refused or wrong.

python benchmarks/jacobians_of_families.py [--only TEXT]
"""

import argparse
import ast
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import fastntk
from fastntk.common.machine import settle
from fastntk.inputs.libraries import timm, torchvision, transformers
from fastntk.inputs.makers import Logits
from fastntk.jacobians.per_sample import PerSampleJacobian
from fastntk.tuning.parameters import snapshot
from fastntk.tuning.selectors import select, tunables

CLASSES, IMAGES, AT_MOST, EXACT = 3, 3, 60_000, 1e-7

TIMM = open("/tmp/fam/timm.txt").read()
TORCHVISION = open("/tmp/fam/tv.txt").read()
TRANSFORMERS = open("/tmp/fam/tr.txt").read()


def of_timm(name: str, **options: Any) -> nn.Module:
    return timm().create_model(name, num_classes=CLASSES, **options)


def of_torchvision(name: str, **options: Any) -> nn.Module:
    return torchvision().models.get_model(name, num_classes=CLASSES, **options)


def of_transformers(name: str, **options: Any) -> nn.Module:
    auto = transformers()
    config = auto.AutoConfig.for_model(name, num_labels=CLASSES, **options)
    return Logits(auto.AutoModelForImageClassification.from_config(config))


def families() -> Iterator[tuple[str, int, Callable[[], nn.Module]]]:
    """Name, side of the images, and the model, of every line above."""
    libraries = (("timm", TIMM, of_timm), ("torchvision", TORCHVISION, of_torchvision))
    for library, lines, make in (*libraries, ("transformers", TRANSFORMERS, of_transformers)):
        for line in lines.replace("\n", ";").split(";"):
            if words := line.split():
                options = {
                    key: ast.literal_eval(value) for key, _, value in (word.partition("=") for word in words[2:])
                }
                yield f"{library}/{words[0]}", int(words[1]), lambda m=make, n=words[0], o=options: m(n, **o)


def prepared(make: Callable[[], nn.Module], side: int) -> tuple[nn.Module, Tensor]:
    """The model, with nothing in it zero that a derivative could hide behind and batch norms as after training, and
    images."""
    torch.manual_seed(0)
    model, x = make().double().eval(), torch.randn(2 * IMAGES, 3, side, side).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2 or bool((parameter == parameter.flatten()[0]).all()):
                parameter += torch.randn_like(parameter) * min(0.1, parameter[:1].numel() ** -0.5)
        norms = [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.train().momentum = None
        if norms:
            model(x)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.mul_(1 + 0.2 * torch.rand_like(buffer)).add_(0.1 * buffer.mean())
    return model.eval(), x[:IMAGES]


def kinds(model: nn.Module) -> list[str]:
    """Parameters of every kind of module, at most so many: all if they are that few."""
    modules, seen = dict(model.named_modules()), set[tuple]()
    ranked = []
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[1].numel()):
        path = name.split(".")
        module = modules[".".join(path[:-1])]
        kind = (type(module), path[-1])
        role = (*kind, *path[-2:-1], *(str(getattr(module, each, "")) for each in ("kernel_size", "stride", "groups")))
        ranked.append((0 if kind not in seen else 1 if role not in seen else 2, parameter.numel(), name))
        seen |= {kind, role}
    return _within(ranked)


def _within(ranked: list[tuple[int, int, str]]) -> list[str]:
    """Names, by rank and size, until there are so many parameters."""
    chosen, size = [], 0
    for _, numel, name in sorted(ranked):
        if size + numel <= AT_MOST:
            chosen, size = [*chosen, name], size + numel
    return chosen


def light(model: nn.Module) -> list[str]:
    """Norms, biases and the head, those that the model has."""
    wanted = [each for each in ("norm", "bias", "head") if each in tunables(model)]
    sizes = {name: each.numel() for name, each in model.named_parameters()}
    return _within([(0, sizes[name], name) for name in select(model, *wanted)])


def by_torch_func(model: nn.Module, parameters: dict[str, Tensor], images: Tensor) -> list[dict[str, Tensor]]:
    def logits(free: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, free, (image[None],))[0]

    return [jacrev(logits)(parameters, image) for image in images]


def compared(model: nn.Module, names: list[str], images: Tensor) -> dict[str, Any]:
    parameters = snapshot(fastntk.tune(model, names))
    jacobian = PerSampleJacobian(model, parameters)
    started = time.perf_counter()
    found = jacobian(images).dense()
    ours = time.perf_counter() - started
    started = time.perf_counter()
    layout, expected = jacobian.layout(images), by_torch_func(model, parameters, images)
    theirs = time.perf_counter() - started
    wrong, size = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for rows, each in zip(found, expected, strict=True):
        for c, row in enumerate(rows):
            for name, tensor in layout.unflatten(row, parameters).items():
                wrong[name] += float((tensor - each[name][c]).square().sum())
                size[name] += float(each[name][c].square().sum())
    whole = sum(size.values())
    single = {name: (wrong[name] / size[name]) ** 0.5 for name in names if size[name] > 1e-14 * whole}
    worst = max(single, key=lambda name: single[name])
    count = lambda part: sum(parameters[name].numel() for name in part)
    return {
        "p": count(names),
        "fast": count(layout.fast),
        "slow": count(layout.slow),
        "head": count(layout.head),
        "error": (sum(wrong.values()) / whole) ** 0.5,
        "single": single[worst],
        "worst": worst,
        "ours": ours,
        "theirs": theirs,
        "zero": [n for n in names if size[n] == 0],
        "slow_names": layout.slow,
        "norm": whole**0.5,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    settle()
    warnings.simplefilter("ignore")
    for name, side, make in families():
        if arguments.only not in name:
            continue
        t = time.perf_counter()
        try:
            model, images = prepared(make, side)
        except Exception as e:
            print(name, side, "CANNOT MAKE", repr(e)[:300], flush=True)
            continue
        made = time.perf_counter() - t
        total = sum(p.numel() for p in model.parameters())
        ks = {type(m).__name__ for m in model.modules() if any(True for _ in m.parameters(recurse=False))}
        chosen = kinds(model)
        mods = dict(model.named_modules())
        lacking = ks - {type(mods[n.rpartition(".")[0]]).__name__ for n in chosen}
        missing = [k for k in ("norm", "bias", "head") if k not in tunables(model)]
        print(
            f"{name} {side} {total / 1e6:.2f}M made {made:.1f}s {'LACKS ' + str(missing) if missing else ''} {'UNCOVERED ' + str(lacking) if lacking else ''}",
            flush=True,
        )
        for what, names in (("light", light(model)), ("kinds", chosen)):
            t = time.perf_counter()
            try:
                r = compared(model, names, images)
                bad = "  <<<<<<<" if r["single"] > 1e-7 or r["error"] > 1e-7 else ""
                print(
                    f"    {what} p={r['p']} n={len(names)} {r['fast']}/{r['slow']}/{r['head']} err {r['error']:.1e} single {r['single']:.1e} {r['worst']} ours {r['ours']:.1f} theirs {r['theirs']:.1f} zero {len(r['zero'])} {r['zero'][:4]} |J| {r['norm']:.1e} slow: {len(r['slow_names'])} {r['slow_names'][:5]} {bad}",
                    flush=True,
                )
            except fastntk.InputError as e:
                print("   ", what, "REFUSED", e, flush=True)
            except Exception as e:
                import traceback

                print(
                    "   ",
                    what,
                    "CRASH",
                    repr(e)[:400],
                    "|",
                    " / ".join(traceback.format_exc().splitlines()[-7:-1])[:900],
                    flush=True,
                )


if __name__ == "__main__":
    main()
