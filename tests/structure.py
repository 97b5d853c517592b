"""The shape of the package, read from its source: figures as a table and a last line of JSON, and the drawing in docs.

    python tests/structure.py [--draw docs/parts.svg]

parts      in the order of the package's docstring; ``against`` counts imports from a part to its right, wherever in a
           file they stand and for type checkers too
circles    groups of modules that import each other, directly or not
functions  lines of every function and method, docstring and signature included
classes    the most methods (properties among them) of one
names      public ones that a module defines, median; modules, not packages
"""

import argparse
import ast
import json
import statistics
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1] / "src" / "fastntk"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def sources() -> dict[str, ast.Module]:
    """Every module's syntax tree, by its name without ``fastntk.``; the package itself is the empty name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def parts() -> list[str]:
    """The parts, from the package's docstring."""
    documented = (ast.get_docstring(sources()[""]) or "").splitlines()
    return [line.split()[0] for line in documented if line[:1].islower() and "  " in line]


def imports(tree: ast.Module, known: set[str]) -> Iterator[str]:
    """The modules of the package that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastntk."):
            module = str(node.module).removeprefix("fastntk.")
            yield from {f"{module}.{each.name}" if f"{module}.{each.name}" in known else module for each in node.names}
        elif isinstance(node, ast.Import):
            names = [each.name for each in node.names if each.name.partition(".")[0] == "fastntk"]
            yield from (name.removeprefix("fastntk").removeprefix(".") for name in names)


@cache
def graph() -> dict[str, set[str]]:
    """Which modules each imports; the package's own front door, which imports on demand, is left out."""
    trees = sources()
    return {name: set(imports(tree, set(trees))) & set(trees) for name, tree in trees.items() if name}


def against(edges: dict[str, set[str]]) -> list[str]:
    """Imports from a part to its right, or from a part that is none."""
    order = {part: place for place, part in enumerate(parts())}
    pairs = ((name, target) for name, targets in edges.items() for target in targets if name != "__main__")
    return [
        f"{name} imports {target}"
        for name, target in pairs
        if order.get(target.partition(".")[0], 99) > order.get(name.partition(".")[0], -1)
    ]


def circles(edges: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules that reach each other."""
    reached = {name: _reached(name, edges) for name in edges}
    groups = {frozenset({name} | {other for other in reached[name] if name in reached[other]}) for name in edges}
    return [set(group) for group in groups if len(group) > 1]


def _reached(start: str, edges: dict[str, set[str]]) -> set[str]:
    found, left = set[str](), [start]
    while left:
        for target in edges.get(left.pop(), set()) - found:
            found.add(target)
            left.append(target)
    return found


def figures() -> dict[str, object]:
    """Everything that can be counted."""
    trees, edges = sources(), graph()
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    lengths = sorted(node.end_lineno - node.lineno + 1 for node in nodes if isinstance(node, FUNCTIONS))
    methods = [sum(isinstance(each, FUNCTIONS) for each in n.body) for n in nodes if isinstance(n, ast.ClassDef)]
    files = [len(path.read_text().splitlines()) for path in ROOT.rglob("*.py")]
    packages = {name.rpartition(".")[0] for name in trees}
    names = [len(_public(tree)) for name, tree in trees.items() if name not in packages]
    return {
        "parts": len({name.partition(".")[0] for name in edges if name != "__main__"}),
        "against": len(against(edges)),
        "circles": len(circles(edges)),
        "function_median": statistics.median(lengths),
        "function_p90": lengths[int(0.9 * len(lengths))],
        "function_max": lengths[-1],
        "file_max": max(files),
        "class_methods_max": max(methods),
        "public_names_median": statistics.median(names),
        "modules": len(names),
    }


def _public(tree: ast.Module) -> set[str]:
    found = set[str]()
    for node in tree.body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}
    return {name for name in found if not name.startswith("_")}


def draw(path: Path) -> None:
    """The parts from left to right with their modules, and how many imports lead from each to those before it."""
    import matplotlib
    from matplotlib.figure import Figure

    edges, order = graph(), parts()
    inside = {part: [name.removeprefix(f"{part}.") for name in edges if name.startswith(f"{part}.")] for part in order}
    crossing = Counter((name.partition(".")[0], t.partition(".")[0]) for name, ts in edges.items() for t in ts)
    height = max(map(len, inside.values()))
    figure = Figure(figsize=(13, 0.21 * height + 3.2), layout="constrained")
    axes = figure.subplots()
    axes.axis("off")
    for place, part in enumerate(order):
        axes.text(place, 0, part, weight="bold", fontsize=11, ha="center")
        axes.text(place, -0.8, "\n".join(sorted(inside[part])), fontsize=6.5, ha="center", va="top", linespacing=1.35)
    for (left, right), count in sorted(crossing.items()):
        if left in order and right in order and left != right:
            start, end = order.index(left), order.index(right)
            way = f"arc3,rad={0.28 + 0.02 * (start - end)}"
            look = {"arrowstyle": "-|>", "connectionstyle": way, "color": "#8aa0b8", "lw": 0.5 + count / 16}
            axes.annotate("", (end + 0.05, 1.2), (start - 0.05, 1.2), arrowprops=look)
    axes.set_xlim(-0.6, len(order) - 0.4)
    axes.set_ylim(-0.9 - 0.62 * height, 11)
    with matplotlib.rc_context({"svg.hashsalt": "fastntk", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", type=Path, help="where to write the drawing, as SVG")
    arguments = parser.parse_args()
    if arguments.draw:
        draw(arguments.draw)
    for line in [*against(graph()), *(f"circle: {', '.join(sorted(each))}" for each in circles(graph()))]:
        print(line)
    found = figures()
    for name, value in found.items():
        print(f"{name:22} {value}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
