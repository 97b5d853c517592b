"""A grid on a small model of a user's own file: what it runs, keeps, and draws."""

import json
import math
import sqlite3
from dataclasses import asdict, replace
from statistics import geometric_mean, mean

import numpy as np
import pytest
import torch
import yaml
from fastntk.methods import FastNTK, FineTune, Newton, Problem
from fastntk.metrics import accuracy, average_gap, logit_distance, modified_entropy, taken_for_members
from runs import refuse, succeed

import fastntk
from fastntk.evidence import report as reports
from fastntk.evidence.bench import choosing, grid, tables
from fastntk.evidence.bench.config import Setting, read_config
from fastntk.evidence.bench.results import Cell, Measured, Results
from fastntk.evidence.bench.stored import StoredRetraining, fitted
from fastntk.evidence.bench.summary import interval, summarise
from fastntk.evidence.bench.tables import by_model, conclusions, in_words
from fastntk.evidence.compare import compare, references
from fastntk.inputs.batches import labels_of
from fastntk.tuning.outputs import logits_of
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
        "retrained": 3,
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
    results = grid.run(read, tmp_path / "out" / "noise.sqlite")
    [setting] = read.settings()
    assert setting == Setting("noise", "small", 10, 0, "cross-entropy")
    by_class, by_share = results.cells()
    assert (by_class.request, by_share.request) == ("class", "random 20%")
    assert (by_class.facts["images"], by_class.facts["forgotten"], by_class.facts["test_images"]) == (30, 10, 10)
    assert (by_share.facts["forgotten"], by_share.facts["test_images"]) == (6, 15)
    assert by_class.facts["audit"]["samples"] == 3

    model, train, test = grid.opened(read, setting, "cpu")
    recipe = Recipe(epochs=2, learning_rate=1e-2, batch_size=4)
    fit = fastntk.fit(model, train, recipe)
    memory = fastntk.prepare(model, train, fit.initial)
    audit = fastntk.audit(memory, recipe, held_out=test, seed=2)
    forget = torch.randperm(30, generator=torch.Generator().manual_seed(0))[:6].sort().values.tolist()
    methods = {**references(1, 3), "fast_ntk": FastNTK(), "tuned": FineTune(share=0.5)}
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
    kept = results.logits(by_share, "tuned")
    torch.testing.assert_close(kept, report.logits["tuned"]["forget"], rtol=1e-2, atol=1e-2)
    assert torch.equal(results.labels(by_share), report.labels["forget"])
    assert by_share.facts["prepared"] == ["fast_ntk"]


def test_what_is_there_is_not_run_again(config, tmp_path, monkeypatch):
    path, out = written(tmp_path, config), tmp_path / "out" / "noise.sqlite"
    done = []
    monkeypatch.setattr(grid, "compare", lambda *given, **more: done.append(given) or compare(*given, **more))

    def killed(*given, **more):
        raise KeyboardInterrupt

    before = Results.add
    monkeypatch.setattr(Results, "add", lambda self, *given: killed() if done[1:] else before(self, *given))
    with pytest.raises(KeyboardInterrupt):
        grid.run(read_config(path), out)
    [first] = Results(out).cells()
    monkeypatch.setattr(Results, "add", before)
    monkeypatch.setattr(fastntk, "fit", killed)  # the fits are there
    assert len(grid.run(read_config(path), out).cells()) == 2
    assert len(done) == 3
    again = grid.run(read_config(path), out).cells()
    assert len(done) == 3
    assert again[0].rows == first.rows
    more = written(tmp_path, {**config, "methods": {**config["methods"], "more": {"method": "Newton"}}})
    measured, measuring = [], reports.measured_by_all
    monkeypatch.setattr(reports, "measured_by_all", lambda *given: measured.append(given) or measuring(*given))
    again = grid.run(read_config(more), out).cells()
    assert all("more" in each.rows for each in again)
    assert len(done) == 5  # compared again, with the fits and the answers that are there
    assert len(measured) == 2, "of what was measured already nothing is measured again"
    assert again[0].rows == {**first.rows, "more": again[0].rows["more"]}
    monkeypatch.setattr(Newton, "version", 3)
    grid.run(read_config(more), out)
    assert len(measured) == 4, "what it does has changed"
    fewer = written(tmp_path, {**config, "retrained": 2})
    grid.run(read_config(fewer), out)
    assert len(measured) == 4 + 2 * 5, "beside other retrained models, every measure is another"
    monkeypatch.undo()
    changed = written(tmp_path, {**config, "recipe": {"epochs": 1, "batch_size": 4}})
    assert grid.run(read_config(changed), out).cells()[0].rows["original"] != first.rows["original"]


SELECT = {
    "losses": ["squared"],
    "select": {"requests": ["class", "random 20%"]},
    "requests": ["class", "random 10%"],
    "methods": {
        "fast_ntk": {
            "method": "FastNTK",
            "choose": [{"exact_head": [True]}, {"exact_head": [False, True], "gain": [1.5]}],
        },
        "audited": {"method": "FastNTK", "gain": True},
        "tuned": {"method": "FineTune", "share": 0.5, "choose": {"rate": [0.1, 3.0]}},
    },
}


def test_the_command(config, tmp_path):
    out = tmp_path / "results"
    methods = {name: SELECT["methods"][name] for name in ("fast_ntk", "tuned")}
    asked = {
        **config,
        **SELECT,
        "losses": ["smoothed"],
        "seeds": [0, 1],
        "requests": ["random 10%"],
        "methods": methods,
    }
    text = succeed("bench", written(tmp_path, asked), "--out", out)
    assert "noise, small, 10 images a class, smoothed, forgotten: random 10%" in text
    assert (out / "config.sqlite").is_file()
    drawn = (out / "tables.md").read_text()
    assert drawn.index("**tenth, smoothed") < drawn.index("### tenth, smoothed") < drawn.index("### noise, small")
    assert "Seeds: 0, 1. Chosen (seed 0): fast_ntk: FastNTK(" in drawn
    assert "| tuned, chosen | " in drawn
    assert "±" in drawn
    assert "- noise, small, 10 a class, smoothed, seed 1, tenth: " in drawn
    shown = (out / "tables.html").read_text()
    assert shown.count("<svg") == 2
    assert shown.count("<table") == 1 + 1 + 1
    assert '<tr class="ours"><td>fast_ntk, chosen</td>' in shown
    last = json.loads(succeed("bench", "--summary", out, "--json"))
    assert last["cells"] == 2
    found = {(row["loss"], row["kind"], row["method"], row["settings"]) for row in last["rows"]}
    rows = {("original", "default"), ("retrained models", "default")}
    rows |= {(name, settings) for name in ("fast_ntk", "tuned") for settings in ("default", "chosen")}
    assert found == {("smoothed", "tenth", *row) for row in rows}
    assert all(row["requests"] == 2 for row in last["rows"])
    assert (out / "tables.md").read_text() == drawn
    other = json.loads(succeed("bench", "--summary", out, "--ours", "tuned", "--json"))
    assert other["flags"]["good_and_flagged"] == 0, "fine-tuning gives no verdict"
    refuse("no results in", "bench", "--summary", tmp_path / "nowhere")
    refuse("answered by 'ours'.*fast_ntk, tuned", "bench", "--summary", out, "--ours", "ours")
    refuse("--methods goes with a CONFIG", "bench", "--summary", out, "--methods", "some.yaml")
    refuse("either which CONFIG.yaml", "bench")
    asked["models"] = {"small": {**asked["models"]["small"], "model": "resnet999"}}
    refuse("resnet999", "bench", written(tmp_path, asked), "--out", tmp_path / "none")
    assert not list((tmp_path / "none").glob("*.sqlite")), "there is no cell to keep"
    (out / "again.sqlite").write_bytes((out / "config.sqlite").read_bytes())
    refuse("both have", "bench", "--summary", out)


def test_settings_are_chosen_by_the_least_score_on_requests_that_nobody_asks_for(config, tmp_path, monkeypatch):
    read = read_config(written(tmp_path, {**config, **SELECT}))
    assert read.methods["tuned"].others == (FineTune(share=0.5, rate=0.1), FineTune(share=0.5, rate=3.0))
    assert [(each.exact_head, each.gain) for each in read.methods["fast_ntk"].others] == [
        (True, False),
        (False, 1.5),
        (True, 1.5),
    ]
    setting = next(read.settings())
    bench = grid._Bench(read, setting, tmp_path / "fits", "cpu", {})
    asked = {request: set(bench._problem(request, 0)[0].forget) for request in ("class", "random 20%")}
    for trial, request in zip(bench.trials, SELECT["select"]["requests"], strict=True):
        assert set(trial.problem.forget) != asked[request]
        models = trial.retrained
        assert list(models) == ["retrain", "retrain_2"]
        score = by_hand(trial, FineTune(share=0.5)(trial.problem).parameters)
        assert trial.score(FineTune(share=0.5)(trial.problem).parameters) == pytest.approx(score)
        assert trial.score(models["retrain"].parameters) == pytest.approx(by_hand(trial, models["retrain"].parameters))
        broken = {name: tensor * float("nan") for name, tensor in bench.memory.anchor.items()}
        assert trial.score(broken) == float("inf")
    for name, choice in bench.choices.items():
        entry = read.methods[name]
        scores = {
            each: geometric_mean(trial.score(each(trial.problem).parameters) for trial in bench.trials)
            for each in (entry.default, *entry.others)
        }
        assert choice.score == pytest.approx(min(scores.values()), rel=1e-4)
        assert scores[choice.method] == pytest.approx(choice.score, rel=1e-4)
        assert choice.tried == len(scores)
        assert choice.seconds > 0
    facts, report = bench.cell("class", Measured({}, {}, {}))
    assert list(report.rows)[:4] == ["original", "retrain", "retrain_2", "retrain_3"]
    for name, choice in bench.choices.items():
        if choice.method == read.methods[name].default:
            assert report.rows[f"{name}, chosen"] == report.rows[name]
        said = facts["chosen"][name]
        assert said["method"] == [type(choice.method).__name__, asdict(choice.method)]
        assert said["seconds"] > choice.seconds, "with the models retrained for it"
    tried, scored = [], choosing._scored
    monkeypatch.setattr(choosing, "_scored", lambda *given: tried.append(given[1]) or scored(*given))
    more = {**SELECT["methods"], "tuned": {"method": "FineTune", "share": 0.5, "choose": {"rate": [0.1, 3.0, 9.0]}}}
    wider = read_config(written(tmp_path, {**config, **SELECT, "methods": more}))
    results = Results(tmp_path / "kept.sqlite")
    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", lambda made: "{}" if made is facts else object())  # what no row can hold
        with pytest.raises(fastntk.InputError, match="cannot be used"):
            results.add(setting, "class", facts, facts, report)
    assert Results(results.path).cells() == [], "all of a first cell or nothing"
    results.add(setting, "class", {}, facts, report)
    known = Results(results.path).measured(setting, "class").scores
    assert known == facts["scores"]
    again = grid._Bench(wider, setting, tmp_path / "fits", "cpu", known)
    assert tried == [FineTune(share=0.5, rate=9.0)], "what was scored already is not again"
    assert again.choices["fast_ntk"] == bench.choices["fast_ntk"]
    assert again.choices["tuned"].seconds > bench.choices["tuned"].seconds
    assert facts["audited"] == ["audited"]
    assert set(facts["prepared"]) == {"fast_ntk", "audited"}


def by_hand(trial, parameters):
    """A score, written out: of squared loss, so of logits."""

    def measured(which):
        model = fastntk.model_at(trial.problem.model, which)
        sets = {"retain": trial.problem.retain, "forget": trial.problem.forgotten, "test": trial.test}
        logits = {name: logits_of(model, data, "cpu") for name, data in sets.items()}
        labels = {name: labels_of(data) for name, data in sets.items()}
        entropy = {name: modified_entropy(logits[name], labels[name]) for name in sets}
        shares = {name: accuracy(logits[name], labels[name]) for name in sets}
        shares["member"] = taken_for_members(entropy["forget"], entropy["retain"], entropy["test"])
        return logits["forget"], shares

    one, other = (measured(each.parameters) for each in trial.retrained.values())
    ours = measured(parameters)
    floor = logit_distance(one[0], other[0])
    distances, gaps = [], []
    for theirs in (one, other):
        if not torch.equal(theirs[0], ours[0]):
            distances.append(logit_distance(theirs[0], ours[0]))
            gaps.append(average_gap(ours[1], theirs[1]))
        else:  # it is that model: both distances count, one of them 0
            distances.append(0.0)
            gaps.append(0.0)
    return mean(distances) / floor * (1 + mean(gaps)) / (1 + average_gap(one[1], other[1]))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("no field 'epoch'", {"recipe": {"epoch": 3}}),
        ("at least 1", {"recipe": {"epochs": 0}}),
        ("no field 'sede'", {"sede": [1]}),
        ("one of squared, cross-entropy, smoothed, not 'hinge'", {"losses": ["hinge"]}),
        ("losses have a list of their own", {"recipe": {"loss": "squared"}}),
        ("retrained must be a whole number from 2 on", {"retrained": 1}),
        ("select: retrained must be 2 at least", {"select": {"requests": ["class"], "retrained": 1}}),
        ("select has no field 'request'", {"select": {"request": ["class"]}}),
        ("select: there is no request", {"select": {"requests": []}}),
        ("method a: choose must be a table", {"methods": {"a": {"method": "Scrub", "choose": {"rate": 1.0}}}}),
        ("method a: choose must be a table", {"methods": {"a": {"method": "Scrub", "choose": [{"rate": []}]}}}),
        ("method a has no field 'power'", {"methods": {"a": {"method": "Scrub", "choose": {"power": [1.0]}}}}),
        ("method a: rate must be above 0", {"methods": {"a": {"method": "Scrub", "choose": {"rate": [0.0]}}}}),
        ("this name is taken", {"methods": {"a, chosen": {"method": "Scrub"}}}),
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


def test_too_few_images_are_refused(config, tmp_path):
    path = written(tmp_path, {**config, "per_class": [21]})
    with pytest.raises(fastntk.InputError, match="class 0 has no images 0 to 21"):
        grid.run(read_config(path), tmp_path / "out.sqlite")


def row(accuracy=80.0, ratio=1.0, gap=1.0, seconds=10.0, relearn=8.0, back=50.0, doubt=None):
    parts = dict.fromkeys(("retain_accuracy", "forget_accuracy", "test_accuracy"), accuracy)
    measures = {"distance_ratio": ratio, "probability_ratio": 2 * ratio, "average_gap": gap, "membership": 50.0}
    relearned = {"relearn_steps": relearn, "relearned_without": back}
    return {**parts, **measures, **relearned, "seconds": seconds, "moved": 1.0, "doubt": doubt}


def cell(ours, verdict="trusted", request="class", **more):
    rows = {
        "original": row(ratio=4.0),
        "retrain": row(80.0),
        "retrain_2": row(82.0, relearn=None, seconds=20.0, back=56.0),
    }
    facts = {
        "unit": "logits",
        "notes": {"fast_ntk": f"{verdict}: because"},
        "prepare_seconds": 30.0,
        "prepared": ["fast_ntk"],
        "audited": [],
        "audit": {"seconds": 60.0},
        "chosen": {"tuned": {"seconds": 45.0}},
    }
    return Cell(Setting("d", "m", 10, 0, "squared"), request, facts, {**rows, "fast_ntk": ours, **more})


def found_in(cells, method="fast_ntk", settings="default"):
    [found] = [
        each
        for each in summarise(cells, "fast_ntk")["rows"]
        if (each["method"], each["settings"]) == (method, settings)
    ]
    return found


def test_a_summary_has_the_medians_of_each_loss_and_kind_beside_the_retrained_models():
    cells = [
        cell(row(83.0, ratio=1.2, seconds=1.5), tuned=row(ratio=3.0, seconds=3.0)),
        cell(row(84.1, ratio=1.4, gap=2.0, back=57.0), tuned=row(ratio=2.0)),
        cell(row(86.0, ratio=1.3, relearn=4.0), tuned=row(ratio=4.0)),
        cell(row(ratio=9.0), request="random 7%"),
    ]
    three_twice = cells[:3] * 2
    found = found_in(three_twice)
    assert (found["loss"], found["kind"], found["requests"], found["unit"]) == ("squared", "class", 6, "logits")
    assert (found["ratio_logits"], found["ratio_probabilities"]) == (1.3, 2.6)
    assert found["low"] == found["intervals"]["ratio_logits"][0] == 1.2
    assert found["intervals"]["ratio_probabilities"][1] == 2.8
    assert found["intervals"]["gap"] == [1.0, 2.0]
    assert found["ratio_deviation"] == 0
    assert (found["gap"], found["gap_retrained"]) == (1.0, 1.0)
    assert found["off"] == pytest.approx((0 + 1 / 2 + 2 / 2) / 3)  # from 80 and 82: 3 and 1, 4.1 and 2.1, 6 and 4
    assert found["off_retrained"] == 0
    assert found["relearn_forgotten"] == pytest.approx(8 - 19.5)  # 8 and more than 30 steps: 31
    assert found["relearn_retained"] == pytest.approx(-3.0)  # -3, 4 and -3 beside 53
    assert found["relearn_retained_within"] == pytest.approx(1 / 3)  # 50, 57 and 50 beside each of 50 and 56 alone
    assert found["request_fraction"] == pytest.approx(10 / 15)
    assert found["prepared_fraction"] == found["chosen_fraction"] == pytest.approx(40 / 15)
    tuned = found_in(three_twice, "tuned")
    assert tuned["prepared_fraction"] == tuned["chosen_fraction"] == pytest.approx(10 / 15)
    low, high = tuned["nearer"]  # 2.5, 1.43 and 3.08 times as far
    assert (low, high) == (pytest.approx(2 / 1.4), pytest.approx(4 / 1.3))
    assert found_in(cells[:3], "retrained models")["ratio_logits"] == 1
    kinds = {(each["kind"], each["requests"]) for each in summarise(cells, "fast_ntk")["rows"]}
    assert kinds == {("class", 3), ("random 7%", 1)}
    few = summarise(three_twice[1:], "fast_ntk")
    assert all(each["low"] is each["nearer"] is None for each in few["rows"])
    assert conclusions(few)[0].endswith("So few requests give no interval: nothing follows from them.")


@pytest.mark.parametrize("count", range(1, 30))
def test_an_interval_holds_the_median_with_95_percent_and_no_narrower_one_does(count):
    def certain(least, most):
        """That between ``least`` and ``most`` of the values lie below the median."""
        return sum(math.comb(count, k) for k in range(least, most + 1)) / 2**count

    found = interval([float(value) for value in reversed(range(count))])
    if found is None:
        assert certain(1, count - 1) < 0.95
    else:
        lower = int(found[0])
        assert found[1] == count - 1 - lower
        assert certain(lower + 1, count - lower - 1) >= 0.95 > certain(lower + 2, count - lower - 2)


def test_chosen_settings_stand_beside_the_default_ones_and_are_judged():
    cells = [
        cell(
            row(ratio=r),
            tuned=row(ratio=2.0),
            **{"fast_ntk, chosen": row(ratio=r / 2), "tuned, chosen": row(ratio=1.0)},
        )
        for r in (1.8, 2.2) * 3
    ]
    assert found_in(cells, settings="chosen")["ratio_logits"] == pytest.approx(1.0)
    assert found_in(cells, "tuned")["nearer"] == [pytest.approx(2 / 1.1), pytest.approx(2 / 0.9)]
    assert found_in(cells, "tuned", "chosen")["chosen_fraction"] == pytest.approx((10 + 45) / 15)
    assert found_in(cells, "tuned", "chosen")["prepared_fraction"] == pytest.approx(10 / 15)
    [first] = conclusions(summarise(cells, "fast_ntk"))
    assert first.startswith("**class, squared** (6 requests): fast_ntk, chosen lies 1.00 (0.90 to 1.10) times as far")
    assert "0 of 1 other methods are farther, by an interval that excludes it; open: tuned." in first
    assert first.endswith("Falls short: it is not nearer than every other method.")


def test_what_falls_short_is_said_first():
    good = cell(row(ratio=1.0), tuned=row(ratio=3.0))
    bad = cell(row(ratio=1.2, gap=1.4), tuned=row(ratio=3.0), request="random 10%")
    told = conclusions(summarise([good, bad] * 6, "fast_ntk"))
    assert told[0].startswith("**tenth")
    assert told[0].endswith("Falls short: the ratio is above 1.10, the gap is more than theirs.")
    assert told[1].startswith("**class")
    assert "Falls short" not in told[1]


def test_the_summary_counts_what_was_off_and_what_was_flagged_and_doubted():
    cells = [
        cell(row(83.9, doubt=3.5)),  # 2.9 points off: good; 80 is beyond the doubt, 82 within
        cell(row(84.1, doubt=4.2), "retrain needed"),  # off, flagged, doubted; both within
        cell(row(77.0, doubt=1.0)),  # off, not flagged; none within
        cell(row(77.0), "retrain needed"),  # nothing audited it
        cell(row(81.0, doubt=0.5), "refresh needed"),  # good, flagged; none within
    ]
    found = summarise(cells, "fast_ntk")
    bad = {"bad": 2, "bad_and_flagged": 1, "bad_and_doubted": 1}
    assert found["flags"] == {**bad, "good": 2, "good_and_flagged": 1, "good_and_doubted": 1}
    assert found["doubt"] == {"models": 8, "within": 3}
    assert found["kinds"] == {"class": {"flags": found["flags"], "doubt": found["doubt"]}}
    assert conclusions(found)[-1] == (
        "Of 4 answers that an audit speaks of, 2 were off by more than 3 points from the retrained models' mean; the "
        "verdict had flagged 1 of these, and 1 of the others. In 3 of 8 cases a retrained model lay within the doubt."
    )


def test_every_row_stands_beside_as_many_retrained_models():
    more = {f"retrain_{number}": row(back=back) for number, back in ((3, 54.0), (4, 52.0))}
    for back, share in ((49.0, 0), (50.0, 3 / 4), (53.0, 1), (55.0, 3 / 4)):  # beside 50, 52, 54 and 56 but one
        found = found_in([cell(row(back=back), **more)])
        assert found["relearn_retained_within"] == pytest.approx(share)
    theirs = found_in([cell(row(), **more)], "retrained models")
    assert theirs["relearn_retained_within"] == 1 / 2


def test_methods_that_came_to_the_same_count_once():
    same, twin = row(ratio=3.0, seconds=2.0), row(ratio=3.0)
    cells = [cell(row(ratio=1.0), tuned=row(ratio=2.0), same=same, twin=twin)] * 6
    assert "2 of 2 other methods are farther" in conclusions(summarise(cells, "fast_ntk"))[0]


def test_the_figures_of_each_model_are_over_its_requests():
    first, second = cell(row(ratio=1.2, doubt=1.0)), cell(row(90.0, ratio=1.4, doubt=1.0))
    other = replace(cell(row(ratio=3.0)), setting=Setting("d", "another", 10, 0, "squared"))
    without = replace(first, rows={name: each for name, each in first.rows.items() if name != "fast_ntk"})
    table = by_model([first, second, other, without], "fast_ntk")
    assert list(table.rows) == ["d, m, 10, squared", "d, another, 10, squared"]
    found = dict(zip(table.columns, table.rows["d, m, 10, squared"], strict=True))
    assert (found["requests"], found["ratio"]) == ("2", "1.30")
    assert (found["off, flagged"], found["others, flagged"]) == ("1, 0", "1, 0")


def test_a_request_in_words():
    told = in_words(cell(row(81.0, ratio=1.2, doubt=1.0), "retrain needed", request="random 1%"), "fast_ntk")
    assert told == (
        "d, m, 10 a class, squared, seed 0, hundredth: 81.0 % of the forgotten images are still recognised, by "
        "retrained models 80.0 to 82.0 %; 1.20 times as far from these as they from each other, the original 4.00; "
        "verdict: retrain needed."
    )


def test_results_of_an_older_version_are_refused(tmp_path):
    database = sqlite3.connect(tmp_path / "old.sqlite")
    database.executescript("CREATE TABLE about (format, fastntk); INSERT INTO about VALUES (1, '0.1.0')")
    database.close()
    with pytest.raises(fastntk.InputError, match=r"old.sqlite are of an older fastntk, 0.1.0. Run the grid anew"):
        Results(tmp_path / "old.sqlite")


def test_an_answer_that_came_to_nothing_is_not_left_out():
    broken = {**row(), "distance_ratio": None, "relearn_steps": None}
    cells = [cell(row(), tuned=each) for each in (row(ratio=1.1), broken, broken)]
    assert found_in(cells, "tuned")["ratio_logits"] == 1000.0
    assert found_in(cells, "tuned")["relearn_forgotten"] == pytest.approx(31 - 19.5)
    assert found_in(cells, "retrained models")["relearn_retained_within"] == 0, "each beside the other one alone"


def test_what_could_not_be_told_of_a_seed_is_not_left_out_of_a_mean():
    broken = {**row(), "relearn_steps": None}
    cells = [cell({**row(), "relearn_steps": 9.0}), cell(broken)]
    assert tables._cell(cells, "fast_ntk", "relearn_steps").startswith("20.0")


def test_an_audit_that_goes_on_has_the_seconds_that_it_took(config, tmp_path):
    """Retrained models are taken from where they are kept, with what they cost."""
    read = read_config(written(tmp_path, config))
    [setting] = read.settings()
    model, train, _ = grid.opened(read, setting, "cpu")
    done = fitted(model, train, read.fitting(setting), tmp_path / "original.safetensors", "key")
    first, again = (StoredRetraining(model, done, tmp_path, "key") for _ in range(2))
    made = [first(train, number) for number in (1, 2)]
    kept = [again(train, number) for number in (1, 2)]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(made, kept, strict=True) for name in a)
    assert again.seconds == first.seconds > 0


def test_settings_that_nothing_chooses_are_refused(config, tmp_path):
    methods = {"a": {"method": "Scrub", "choose": {"rate": [1.0]}}}
    with pytest.raises(fastntk.InputError, match="a has settings to choose from, and nothing says by what"):
        read_config(written(tmp_path, {**config, "methods": methods}))
    with pytest.raises(fastntk.InputError, match="method 1: its name must be a text"):
        read_config(written(tmp_path, {**config, "methods": {1: {"method": "Scrub"}}}))
    with pytest.raises(fastntk.InputError, match="a loss is one of"):
        read_config(written(tmp_path, {**config, "losses": [["squared"]]}))
