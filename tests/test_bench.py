"""A grid on a small model of a user's own file: what it runs, keeps, and draws."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from fastntk.methods import FastNTK, FineTune, Problem
from test_cli import refuse, succeed

import fastntk
from fastntk.evidence.bench import grid
from fastntk.evidence.bench.config import Setting, read_config
from fastntk.evidence.bench.results import Cell, Results
from fastntk.evidence.bench.summary import summarise
from fastntk.evidence.bench.tables import by_model
from fastntk.evidence.compare import compare, references
from fastntk.tuning.recipe import Recipe

MODEL = """
import torch
from torch import nn
from fastntk import Preprocessing

def small(classes):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(4, classes)), Preprocessing(8, (0.5,) * 3, (0.5,) * 3)
"""


@pytest.fixture
def config(tmp_path):
    """What a configuration file holds, and where it goes."""
    (tmp_path / "own.py").write_text(MODEL)
    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 60), ("test", 30)):
        arrays[f"y_{split}"] = np.arange(count) % 3
        arrays[f"x_{split}"] = generator.integers(0, 255, (count, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", **arrays)
    return {
        "recipe": {"epochs": 2, "learning_rate": 1e-2, "batch_size": 4},
        "per_class": [10],
        "test_per_class": 5,
        "data": {"noise": {"source": str(tmp_path / "data.npz")}},
        "models": {"small": {"model": f"{tmp_path}/own.py:small", "select": ["bn", "head"]}},
        "requests": ["class", "random 20%"],
        "methods": {"fast_ntk": {"method": "FastNTK"}, "tuned": {"method": "FineTune", "share": 0.5}},
    }


def written(tmp_path, config):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_cell_holds_what_a_comparison_measures(config, tmp_path):
    read = read_config(written(tmp_path, config))
    results = grid.run(read, tmp_path / "out")
    [setting] = read.settings()
    assert setting == Setting("noise", "small", 10, 0)
    by_class, by_share = results.cells()
    assert (by_class.request, by_share.request) == ("class", "random 20%")
    assert (by_class.facts["images"], by_class.facts["forgotten"], by_class.facts["test_images"]) == (30, 10, 10)
    assert (by_share.facts["forgotten"], by_share.facts["test_images"]) == (6, 15)
    assert by_class.facts["audit"]["samples"] == 3

    model, train, test = grid.opened(read, setting, "cpu")
    recipe = Recipe(epochs=2, learning_rate=1e-2, batch_size=4)
    fit = fastntk.fit(model, train, recipe)
    memory = fastntk.prepare(model, train, fit.initial)
    audit = fastntk.audit(memory, recipe, held_out=test, seed=1)
    forget = torch.randperm(30, generator=torch.Generator().manual_seed(0))[:6].sort().values.tolist()
    methods = {**references(1), "fast_ntk": FastNTK(), "tuned": FineTune(share=0.5)}
    report, _ = compare(Problem(memory, forget, recipe), test, methods, thoroughly=True)
    assert list(by_share.rows) == list(report.rows)
    for name, row in report.rows.items():
        for measure, value in row.items():
            if measure not in ("seconds", "peak_megabytes"):
                expected = value if value is None else pytest.approx(value, rel=1e-4, abs=1e-5)
                assert by_share.rows[name][measure] == expected, (name, measure)
    ours = report.logits["fast_ntk"]["forget"], report.labels["forget"]
    assert by_share.rows["fast_ntk"]["doubt"] == pytest.approx(audit.doubt(*ours), rel=1e-4)
    assert by_share.rows["tuned"]["doubt"] is None
    assert by_share.facts["device"] == "cpu"
    kept = results.logits(by_share, "tuned", "test")
    torch.testing.assert_close(kept, report.logits["tuned"]["test"], rtol=1e-2, atol=1e-2)


def test_what_is_there_is_not_run_again(config, tmp_path, monkeypatch):
    path, out = written(tmp_path, config), tmp_path / "out"
    done = []
    monkeypatch.setattr(grid, "compare", lambda *given, **more: done.append(given) or compare(*given, **more))

    def killed(*given, **more):
        raise KeyboardInterrupt

    before = Results.add
    monkeypatch.setattr(Results, "add", lambda self, *given: killed() if done[1:] else before(self, *given))
    with pytest.raises(KeyboardInterrupt):
        grid.run(read_config(path), out)
    [first] = Results(out / "results.sqlite").cells()
    monkeypatch.setattr(Results, "add", before)
    monkeypatch.setattr(fastntk, "fit", killed)  # the fits are there
    assert len(grid.run(read_config(path), out).cells()) == 2
    assert len(done) == 3
    again = grid.run(read_config(path), out).cells()
    assert len(done) == 3
    assert again[0].rows == first.rows
    more = written(tmp_path, {**config, "methods": {**config["methods"], "more": {"method": "Newton"}}})
    assert all("more" in each.rows for each in grid.run(read_config(more), out).cells())
    assert len(done) == 5  # compared again, with the fits and the answers that are there
    monkeypatch.undo()
    changed = written(tmp_path, {**config, "recipe": {"epochs": 1, "batch_size": 4}})
    assert grid.run(read_config(changed), out).cells()[0].rows["original"] != first.rows["original"]


def test_the_command(config, tmp_path):
    out = tmp_path / "results"
    text = succeed("bench", written(tmp_path, {**config, "seeds": [0, 1]}), "--out", out)
    assert "noise, small, 10 images a class, forgotten: random 20%" in text
    drawn = (out / "tables.md").read_text()
    assert "Seeds: 0, 1." in drawn
    assert "| fast_ntk |" in drawn
    assert "±" in drawn
    shown = (out / "tables.html").read_text()
    assert shown.count("<svg") == 3
    assert shown.count("<table") == 7
    assert '<tr class="ours"><td>fast_ntk</td>' in shown
    assert drawn.index("### All requests") < drawn.index("### noise, small")
    last = json.loads(succeed("bench", "--summary", out, "--json"))
    assert last["cells"] == 4
    assert "| noise, small, 10, class, seed 1 |" in drawn
    assert "### All requests: random 20%\n\nMedians over 2 requests" in drawn
    assert set(last["distance_ratio"]) == {"fast_ntk", "tuned", "retrain_other_seed"}
    assert last["distance_ratio"]["retrain_other_seed"] == 1
    assert (out / "tables.md").read_text() == drawn
    other = json.loads(succeed("bench", "--summary", out, "--ours", "tuned", "--json"))
    assert other["flags"]["off"]["good_and_flagged"] == 0, "fine-tuning gives no verdict"
    refuse("no results in", "bench", "--summary", tmp_path / "nowhere")
    refuse("answered by 'ours'.*fast_ntk, tuned", "bench", "--summary", out, "--ours", "ours")
    refuse("--methods goes with a CONFIG", "bench", "--summary", out, "--methods", "some.yaml")
    refuse("either which CONFIG.yaml", "bench")


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("no field 'epoch'", {"recipe": {"epoch": 3}}),
        ("at least 1", {"recipe": {"epochs": 0}}),
        ("no field 'sede'", {"sede": [1]}),
        ("one of squared, cross-entropy, not 'hinge'", {"recipe": {"loss": "hinge"}}),
        ("'class' or 'random P%', not 'random many'", {"requests": ["random many"]}),
        ("'class' or 'random P%', not 'some'", {"requests": ["some"]}),
        ("method a: say which.*FastNTK", {"methods": {"a": {"method": "Magic"}}}),
        ("method a has no field 'power'", {"methods": {"a": {"method": "Scrub", "power": 3}}}),
        ("this name is taken", {"methods": {"retrain": {"method": "Retrain"}}}),
        ("model m: .*select", {"models": {"m": {"model": "resnet18"}}}),
        ("'split' or 'rest'", {"data": {"d": {"source": "x.npz", "test": "some"}}}),
        ("lacks 'requests'", {"requests": None}),
        ("per_class must be a list", {"per_class": 100}),
        ("requests must be a list", {"requests": []}),
        ("models must be a table", {"models": ["resnet18"]}),
        ("method a: say which", {"methods": {"a": "Newton"}}),
        ("nowhere.yaml cannot be read", {"methods": "nowhere.yaml"}),
    ],
)
def test_a_bad_configuration_is_refused(message, change, config, tmp_path):
    document = {key: value for key, value in {**config, **change}.items() if value is not None}
    with pytest.raises(fastntk.InputError, match=message):
        read_config(written(tmp_path, document))


def test_methods_can_stand_in_a_file_of_their_own(config, tmp_path):
    (tmp_path / "methods.yaml").write_text(yaml.safe_dump(config["methods"]))
    apart = read_config(written(tmp_path, {**config, "methods": "methods.yaml"}))
    assert apart == read_config(written(tmp_path, config))
    other = {**config, "methods": {"given": {"method": "Newton"}}}
    assert read_config(written(tmp_path, other), tmp_path / "methods.yaml") == apart


def test_a_grid_of_cross_entropy(config, tmp_path):
    changed = {
        "recipe": {"epochs": 1, "batch_size": 8, "loss": "cross-entropy"},
        "methods": {"iterated": {"method": "Iterated"}},
    }
    read = read_config(written(tmp_path, {**config, **changed, "requests": ["random 20%"]}))
    assert read.fitting(3) == Recipe(epochs=1, batch_size=8, seed=3, loss=fastntk.CrossEntropy())
    [found] = grid.run(read, tmp_path / "out").cells()
    assert found.rows["iterated"]["distance_ratio"] > 0


def test_too_few_images_are_refused(config, tmp_path):
    path = written(tmp_path, {**config, "per_class": [21]})
    with pytest.raises(fastntk.InputError, match="class 0 has no images 0 to 21"):
        grid.run(read_config(path), tmp_path / "out")


def row(accuracy=80.0, ratio=1.0, membership=50.0, seconds=10.0, relearn=8.0, doubt=None):
    parts = dict.fromkeys(("retain_accuracy", "forget_accuracy", "test_accuracy"), accuracy)
    measures = {"distance_ratio": ratio, "average_gap": 1.0, "membership": membership}
    return {**parts, **measures, "seconds": seconds, "relearn_steps": relearn, "doubt": doubt}


def cell(ours, verdict="trusted", relearn=8.0):
    rows = {"original": row(), "retrain": row(80.0), "retrain_other_seed": row(82.0, relearn=relearn)}
    facts = {"images": 1000, "forgotten": 100, "test_images": 500, "notes": {"fast_ntk": f"{verdict}: because"}}
    return Cell(Setting("d", "m", 10, 0), "class", facts, {**rows, "fast_ntk": ours})


def test_the_summary_counts_what_was_off_and_what_was_flagged():
    cells = [
        cell(row(83.9, ratio=1.2, seconds=0.5)),  # 2.9 points off: good
        cell(row(84.1, ratio=1.4, membership=59.0, relearn=10.1, doubt=3.1), "retrain needed"),  # off, flagged, doubted
        cell(row(77.0, ratio=3.0, membership=61.0, relearn=None)),  # off, not flagged; membership beyond 50 +- 9.6
        cell(row(81.0, relearn=None, doubt=2.9), "refresh needed", relearn=None),  # good, flagged
    ]
    found = summarise(cells, "fast_ntk")
    bad, good = {"bad": 2, "bad_and_flagged": 1, "bad_and_doubted": 1}, {"good": 2, "good_and_flagged": 1}
    assert found["flags"]["off"] == {**bad, **good, "good_and_doubted": 0}
    assert found["membership_within"] == {"fast_ntk": 0.75, "retrain_other_seed": 1}
    assert found["relearn_within"] == {"fast_ntk": 0.5, "retrain_other_seed": 1}
    assert found["off"] == {"fast_ntk": 0.5, "retrain_other_seed": 0}  # 3.9, 4.1, -3 and 1 points; 2
    assert found["distance_ratio"]["fast_ntk"] == pytest.approx(1.3)
    low, high = found["distance_ratio_interval"]
    assert 1.0 <= low < 1.3 < high <= 3.0
    assert found["time_fraction"]["fast_ntk"] == pytest.approx(1.0)
    assert found["time_fraction_with_preparing"] is None
    timed = replace(cells[0], facts={**cells[0].facts, "prepare_seconds": 4.5})
    assert summarise([timed, *cells], "fast_ntk")["time_fraction_with_preparing"] == pytest.approx(0.5)


def test_the_figures_of_each_model_are_over_its_requests():
    first, second = cell(row(ratio=1.2, doubt=1.0)), cell(row(90.0, ratio=1.4, doubt=9.0))
    other = replace(cell(row(ratio=3.0)), setting=Setting("d", "another", 10, 0))
    without = replace(first, rows={name: each for name, each in first.rows.items() if name != "fast_ntk"})
    table = by_model([first, second, other, without], "fast_ntk")
    assert list(table.rows) == ["d, m, 10", "d, another, 10"]
    found = dict(zip(table.columns, table.rows["d, m, 10"], strict=True))
    assert (found["requests"], found["distance ratio"]) == ("2", "1.30")
    assert (found["off, doubted"], found["others, doubted"]) == ("1, 1", "1, 0")


@pytest.mark.parametrize(
    ("ours", "other", "within"),
    [
        (6.0, 8.0, True),
        (5.9, 8.0, False),
        (10.1, 8.0, False),
        (10.1, 9.0, True),
        (1.5, 2.0, True),
        (1.4, 2.0, False),
        (0.0, 0.0, True),
        (40.0, None, True),
        (None, None, True),
        (None, 8.0, False),
        (5.0, None, False),
    ],
)
def test_relearning_is_compared_with_what_the_two_retrained_models_span(ours, other, within):
    judged = cell(row(relearn=ours), relearn=other)
    assert summarise([judged], "fast_ntk")["relearn_within"]["fast_ntk"] == within


def test_what_chance_makes_of_few_samples_is_not_off_beyond_it():
    few = {"forgotten": 10, "images": 1000, "test_images": 500, "notes": {"fast_ntk": "trusted"}}
    gap = {**row(81.0), "forget_accuracy": 90.0}  # 9 points: one image of ten
    near = replace(cell(gap), facts=few)
    assert summarise([near], "fast_ntk")["flags"]["off"]["bad"] == 1
    assert summarise([near], "fast_ntk")["flags"]["off_beyond_chance"]["bad"] == 0
    assert (
        summarise([replace(near, facts={**few, "forgotten": 1000})], "fast_ntk")["flags"]["off_beyond_chance"]["bad"]
        == 1
    )
