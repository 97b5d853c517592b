"""The order of the parts, and what the structure is held to (docs/architecture.md)."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import structure

import fastntk

HERE = Path(__file__).parent
LIMITS = {
    "against": 0,
    "circles": 0,
    "function_median": 6,
    "function_p90": 18,
    "function_max": 45,
    "file_max": 350,
    "class_methods_max": 20,
    "public_names_median": 3,
}


def test_every_part_imports_only_from_its_left():
    assert structure.parts() == ["common", "inputs", "tuning", "jacobians", "solve", "memory", "evidence", "cli"]
    assert structure.against(structure.graph()) == []
    assert structure.circles(structure.graph()) == []
    here = {path.stem for path in structure.ROOT.iterdir() if path.name != "__pycache__"}
    assert here == {*structure.parts(), "__init__", "__main__", "py"}


def test_an_import_to_the_right_and_a_circle_are_found():
    edges = {"common.a": {"solve.b"}, "solve.b": {"inputs.c"}, "inputs.c": {"common.a"}, "cli.d": {"inputs.c"}}
    assert sorted(structure.against(edges)) == ["common.a imports solve.b"]
    assert structure.circles(edges) == [{"common.a", "solve.b", "inputs.c"}]


def test_figures_are_within_their_limits():
    found = structure.figures()
    assert found["parts"] == 8
    assert {name: found[name] for name, most in LIMITS.items() if found[name] > most} == {}


def test_the_drawing_shows_every_module():
    drawing = (HERE.parent / "docs" / "parts.svg").read_text()
    words = set(re.findall(r">([a-z_.]+)</text>|>([a-z_.]+)</tspan>", drawing))
    shown = {word for pair in words for word in pair if word}
    missing = {name.partition(".")[2] for name in structure.graph() if "." in name} - shown
    assert not missing, "python tests/structure.py --draw docs/parts.svg"


def test_each_public_name_is_imported_from_where_it_is():
    """What type checkers read and what is imported on demand are the same."""
    tree = structure.sources()[""]
    checked = {
        (alias.name, str(node.module).removeprefix("fastntk."))
        for node in structure.ast.walk(tree)
        if isinstance(node, structure.ast.ImportFrom)
        for alias in node.names
        if str(node.module).startswith("fastntk.") and node.module != "fastntk.evidence"
    }
    made = {(name, module) for module, names in fastntk._HOMES.items() for name in names}
    assert checked == made
    assert fastntk.__all__ == sorted(name for name, _ in made)
    for name in fastntk.__all__:
        assert getattr(fastntk, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Forgotten'"):
        _ = fastntk.Forgotten


def test_methods_and_metrics_have_their_public_names():
    code = (
        "import fastntk.methods, fastntk.metrics\n"
        "from fastntk.methods import *\n"
        "from fastntk.methods import FastNTK\n"
        "import fastntk.evidence.methods as real\n"
        "assert FastNTK is real.FastNTK is fastntk.methods.FastNTK, FastNTK\n"
        "assert fastntk.metrics.accuracy and Scrub\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_that_takes_long_is_imported_before_it_is_needed():
    code = (
        "import sys, fastntk, fastntk.cli.main\n"
        "assert 'torch' not in sys.modules\n"
        "fastntk.Memory, fastntk.audit, fastntk.Report, fastntk.methods.FastNTK\n"
        "late = {'matplotlib', 'jinja2', 'sklearn', 'scipy', 'timm', 'transformers', 'peft', 'datasets'}\n"
        "assert not late & set(sys.modules), late & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_script_prints_the_figures():
    done = subprocess.run([sys.executable, HERE / "structure.py"], capture_output=True, text=True, check=True, cwd=HERE)
    assert json.loads(done.stdout.splitlines()[-1]) == structure.figures()


def test_the_api_page_has_every_public_name():
    page = (HERE.parent / "docs" / "api.md").read_text().partition("\n## Methods")[0]
    assert re.findall(r"^ +- (\w+)$", page, re.MULTILINE) == fastntk.__all__
