"""Measures against their definitions, written out sample by sample."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastntk.evidence import metrics


def logits(count=7, classes=4, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, classes, generator=generator, dtype=torch.float64)


LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2])


def softmax(row):
    powers = [math.exp(x) for x in row]
    return [x / sum(powers) for x in powers]


def test_kl_divergence_and_agreement():
    left, right = logits(), logits(seed=1)
    total = same = 0.0
    for f, g in zip(left.tolist(), right.tolist(), strict=True):
        p, q = softmax(f), softmax(g)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        same += p.index(max(p)) == q.index(max(q))
    assert metrics.kl_divergence(left, right) == pytest.approx(total / 7)
    assert metrics.kl_divergence(left, left) == 0
    assert metrics.agreement(left, right) == pytest.approx(100 * same / 7)


def test_modified_entropy():
    rows = logits()
    expected = []
    for row, y in zip(rows.tolist(), LABELS.tolist(), strict=True):
        p = softmax(row)
        wrong = sum(p[c] * math.log(1 - p[c]) for c in range(4) if c != y)
        expected.append(-(1 - p[y]) * math.log(p[y]) - wrong)
    assert metrics.modified_entropy(rows, LABELS).tolist() == pytest.approx(expected)


def test_modified_entropy_of_certainty():
    certain = torch.tensor([[800.0, 0.0, 0.0], [800.0, 0.0, 0.0]])
    right, wrong = metrics.modified_entropy(certain, torch.tensor([0, 1])).tolist()
    assert right == 0
    assert wrong == pytest.approx(1600, rel=1e-2)


scores = st.lists(st.integers(0, 8), min_size=1, max_size=12).map(lambda each: torch.tensor(each).double())


@settings(max_examples=60, deadline=None)
@given(scores, scores, scores)
def test_the_attack(asked, members, strangers):
    chance = sum((a < b) + (a == b) / 2 for a in asked for b in strangers) / (len(asked) * len(strangers))
    assert metrics.attack_auc(asked, strangers) == pytest.approx(float(chance))

    def balanced(cut):
        return float((members <= cut).double().mean() + (strangers > cut).double().mean()) / 2

    cut = metrics.threshold(members, strangers)
    assert balanced(cut) == pytest.approx(max(balanced(each) for each in (-1.0, *range(9))))
    share = 100 * float((asked <= cut).double().mean())
    assert metrics.taken_for_members(asked, members, strangers) == pytest.approx(share)


def test_gaps():
    ours = {"retain": 100.0, "forget": 90.0, "test": 80.0}
    retrained = {"retain": 99.0, "forget": 85.0, "test": 82.0}
    assert metrics.average_gap(ours, retrained) == pytest.approx(8 / 3)
    assert metrics.tug_of_war(ours, retrained) == pytest.approx(0.99 * 0.95 * 0.98)
    assert metrics.tug_of_war(ours, ours) == 1
    with pytest.raises(ValueError, match="differ"):
        metrics.average_gap(ours, {"test": 1.0})
