import json
import re
from dataclasses import fields, replace
from itertools import combinations
from math import prod
from statistics import mean

import pytest
import torch
from fastntk.metrics import accuracy, logit_distance, margins
from torch import nn
from torch.utils.data import TensorDataset

import fastntk
from fastntk.evidence import metrics
from fastntk.evidence.drawings import draw
from fastntk.evidence.measures import MEASURES, PARTS, Subject, shown
from fastntk.evidence.pages import html, write_report
from fastntk.evidence.report import document

LOGITS = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 5.0], [1.0, 0.0, -1.0]])
LABELS = torch.tensor([0, 1, 2])


def test_metrics_by_hand():
    assert accuracy(LOGITS, LABELS) == pytest.approx(100 / 3)
    assert margins(LOGITS, LABELS).tolist() == [2, -3, -2]
    assert logit_distance(LOGITS, LOGITS) == 0
    assert logit_distance(LOGITS, LOGITS + torch.tensor([3.0, 0.0, 4.0])) == pytest.approx(5)
    assert logit_distance(torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [0.0, 2.0]])) == pytest.approx(2**0.5)


def reported():
    generator = torch.Generator().manual_seed(0)
    data = [
        TensorDataset(torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator))
        for n in (6, 4, 5)
    ]
    torch.manual_seed(0)
    models = {name: nn.Linear(4, 3) for name in ("original", "retrain", "retrain_2", "retrain_3", "fastntk")}
    return (
        models,
        data,
        fastntk.evaluate(models, retain=data[0], forget=data[1], test=data[2], seconds={"fastntk": 0.5}),
    )


def test_evaluate_measures_on_each_set():
    models, data, report = reported()
    retrained = [models[name](data[1].tensors[0]).detach() for name in report.retrained]
    floor = mean(logit_distance(*pair) for pair in combinations(retrained, 2))
    for name, model in models.items():
        logits = [model(part.tensors[0]).detach() for part in data]
        row = report.rows[name]
        assert row["retain_accuracy"] == accuracy(logits[0], data[0].tensors[1])
        assert row["forget_accuracy"] == accuracy(logits[1], data[1].tensors[1])
        assert row["test_accuracy"] == accuracy(logits[2], data[2].tensors[1])
        others = [each for each in ("retrain", "retrain_2", "retrain_3") if each != name]
        theirs = [models[each](data[1].tensors[0]).detach() for each in others]
        distance = mean(logit_distance(logits[1], each) for each in theirs)
        assert row["forget_distance"] == pytest.approx(distance)
        assert row["distance_ratio"] == pytest.approx(distance / floor)
        torch.testing.assert_close(report.margins(name), margins(logits[1], data[1].tensors[1]))
        parts = ("retain", "forget", "test")
        entropy = [metrics.modified_entropy(each, part.tensors[1]) for each, part in zip(logits, data, strict=True)]
        assert row["membership"] == metrics.taken_for_members(entropy[1], entropy[0], entropy[2])
        assert row["forget_agreement"] == pytest.approx(mean(metrics.agreement(logits[1], each) for each in theirs))
        assert row["forget_kl"] == pytest.approx(mean(metrics.kl_divergence(each, logits[1]) for each in theirs))
        gaps = [
            [abs(row[k] - report.rows[each][k]) for k in (*(f"{part}_accuracy" for part in parts), "membership")]
            for each in others
        ]
        assert row["average_gap"] == pytest.approx(mean(sum(each) / 4 for each in gaps))
        assert row["tug_of_war"] == pytest.approx(mean(prod(1 - gap / 100 for gap in each[:3]) for each in gaps))
    assert report.rows["fastntk"]["seconds"] == 0.5
    assert report.rows["original"]["seconds"] is None


def test_parameters_at_which_a_model_is_evaluated_do_not_change_it():
    model, images = nn.Linear(4, 3), torch.randn(2, 4)
    before = model(images)
    zero = fastntk.model_at(model, {"weight": torch.zeros(3, 4), "bias": torch.ones(3)})
    assert torch.equal(zero(images), torch.ones(2, 3))
    assert torch.equal(model(images), before)


def test_files_hold_the_numbers_and_need_nothing_else(tmp_path):
    _, _, report = reported()
    write_report(tmp_path, "A title", {"class": report}, {"class": "A verdict."})
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["scenarios"]["class"]["rows"] == report.rows
    assert stored["environment"]["torch"] == torch.__version__
    assert document({"class": report})["scenarios"]["class"]["retrained"] == ["retrain", "retrain_2", "retrain_3"]
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 1
    assert (tmp_path / "class.svg").read_text().startswith("<svg")
    assert "A verdict." in page
    assert f"{report.rows['fastntk']['forget_distance']:.2f}" in page
    assert not re.search(r"<(script|link|img|iframe)", page)
    assert not re.search(r"""(src|href)=["']https?:""", page)


def test_distances_over_the_floor():
    models, data, _ = reported()
    given = {"retain": data[0], "forget": data[1], "test": data[2]}
    rows = fastntk.evaluate(models, **given, retrained=["original", "retrain"]).rows
    assert rows["retrain"]["distance_ratio"] == 1
    assert rows["original"]["distance_ratio"] == 1
    floor = rows["retrain"]["forget_distance"]
    assert rows["fastntk"]["distance_ratio"] == pytest.approx(rows["fastntk"]["forget_distance"] / floor)
    with pytest.raises(fastntk.InputError, match="no model 'retrian' to compare with, only original, retrain"):
        fastntk.evaluate(models, **given, retrained=["retrian"])
    one = fastntk.evaluate(models, **given, retrained=["retrain"]).rows
    assert one["fastntk"]["forget_distance"] > 0
    assert one["fastntk"]["distance_ratio"] is one["retrain"]["forget_distance"] is None


def test_without_a_reference_there_are_no_distances():
    models, data, _ = reported()
    models = {name: models[name] for name in ("original", "fastntk")}
    report = fastntk.evaluate(models, retain=data[0], forget=data[1], test=data[2])
    assert report.rows["fastntk"]["forget_distance"] is None
    assert report.rows["fastntk"]["average_gap"] is None
    assert report.rows["fastntk"]["membership"] is not None
    assert report.table().row_count == 2


def test_nothing_to_measure_is_refused():
    models, data, _ = reported()
    with pytest.raises(fastntk.InputError, match="no model"):
        fastntk.evaluate({}, retain=data[0], forget=data[1], test=data[2])
    empty = TensorDataset(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    with pytest.raises(fastntk.InputError, match="the forget set is empty"):
        fastntk.evaluate(models, retain=data[0], forget=empty, test=data[2])


@pytest.mark.parametrize(
    ("requested", "retained", "inexactness", "moved", "verdict"),
    [
        (0.5, 0.15, 1e-12, True, "trusted"),
        (0.1, None, 1e-12, True, "trusted"),
        (0.51, 0.0, 1e-12, False, "retrain needed"),
        (0.1, 0.16, 1e-12, True, "refresh needed"),
        (0.1, 0.1, 1e-5, False, "refresh needed"),
        (0.1, 0.1, float("nan"), False, "refresh needed"),
    ],
)
def test_a_certificate_is_trusted_within_all_limits(requested, retained, inexactness, moved, verdict):
    certificate = fastntk.Certificate(
        request="r",
        kind="forget",
        samples=1,
        retained=2,
        ridge=3.0,
        departure_requested=requested,
        departure_retained=retained,
        inexactness=inexactness,
        limit=1e-9,
        moved=moved,
        before="b",
        after="a",
        salt="s",
        hashes=["h"],
    )
    assert certificate.verdict == verdict
    assert certificate.trusted == (verdict == "trusted")
    assert certificate.explanation.startswith(f"{verdict}: ")
    assert certificate.to_dict()["verdict"] == verdict
    assert "salt" not in certificate.to_ledger()


def test_every_measure_says_what_it_needs_and_how_it_is_read():
    _, _, report = reported()
    headings = [measure.heading for measure in MEASURES.values()]
    assert len(set(headings)) == len(headings)
    bare = Subject({part: report.logits["fastntk"][part] for part in PARTS}, report.labels)
    for name, measure in MEASURES.items():
        assert measure.meaning
        assert measure.better in ("more", "less", "near")
        assert measure.place in ("terminal", "pages", "nowhere")
        assert set(measure.needs) <= {*(each.name for each in fields(Subject)), "forgotten"}
        value = measure(bare)
        assert (value is None) == (bool(set(measure.needs) - {"forgotten"}) or name == "seconds"), name
        assert measure.text(value) == ("–" if value is None else f"{value:.{measure.decimals}f}")
        nobody = replace(bare, labels={**bare.labels, "forget": bare.labels["forget"][:0]})
        assert measure(nobody) is None or name in ("retain_accuracy", "test_accuracy", "peak_megabytes"), name
    assert set(report.rows["fastntk"]) == set(MEASURES)
    assert list(shown("terminal")) == [n for n, m in MEASURES.items() if m.place == "terminal"]


def test_no_drawing_has_a_forgotten_image_s_own_margin():
    _, _, report = reported()
    own = {round(float(value), 6) for name in report.rows for value in report.margins(name)}
    for axes in draw(report).axes:
        drawn = {round(float(x), 6) for line in axes.lines for x in line.get_xdata()}
        assert not drawn & own
        assert all(len(line.get_xdata()) <= 2 for line in axes.lines)


def test_a_drawing_says_what_is_not_known_and_nothing_of_a_few_images():
    """Forgotten images that are gone from the disk have no accuracy; and four have no margins to show."""
    _, _, report = reported()
    gone = {name: {**row, "forget_accuracy": None} for name, row in report.rows.items()}
    figure = draw(replace(report, rows=gone))
    told = [text.get_text() for text in figure.axes[0].texts]
    assert told.count("–") == len(report.rows)
    assert {float(x) for line in figure.axes[1].lines for x in line.get_xdata()} == {0.0}, "the axis alone"
    many = {**report.labels, "forget": torch.zeros(21, dtype=torch.long)}
    logits = {
        name: {**parts, "forget": torch.randn(21, 3, generator=torch.Generator().manual_seed(1))}
        for name, parts in report.logits.items()
    }
    more = replace(report, labels=many, logits=logits)
    own = {round(float(each), 5) for each in more.margins("fastntk")}
    drawn = {round(float(x), 5) for line in draw(more).axes[1].lines for x in line.get_xdata()}
    assert len(drawn) > 5
    assert not drawn & own


def test_a_module_is_measured_in_eval_mode_and_stays_as_it_was():
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    data = TensorDataset(torch.randn(9, 4), torch.zeros(9, dtype=torch.long))
    mean = module[1].running_mean.clone()
    report = fastntk.evaluate({"a": module, "retrain": module}, retain=data, forget=data, test=data)
    assert report.rows["a"]["forget_distance"] == 0
    assert torch.equal(module[1].running_mean, mean)
    assert module.training


def test_the_demo_s_page_tells_a_story_first():
    _, _, report = reported()
    rows = {name: {**row, "seconds": 1.25} for name, row in report.rows.items()}
    rows["fastntk_exact_head"] = {**rows["fastntk"], "forget_accuracy": 7.0, "probability_ratio": 1.06}
    logits = {**report.logits, "fastntk_exact_head": report.logits["fastntk"]}
    told = replace(report, rows=rows, logits=logits)
    drawings = {"class": "", "random": ""}
    text = html("A network forgets every 3", {"class": told, "random": told}, {}, drawings, "demo.html")
    assert text.index("The memory.") < text.index("7 %") < text.index("1.06 times") < text.index("Request: class")
    assert not re.search(r"""(src|href)=["']https?:""", text)
    assert "The memory." not in html("Another", {"class": told}, {}, drawings)
