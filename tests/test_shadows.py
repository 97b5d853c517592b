import math

import pytest
import torch
from fastntk.metrics import klom, log_odds, published_klom, ulira


def normal(models, samples, shift=0.0, seed=0):
    return torch.randn(models, samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_klom_by_hand():
    left = torch.tensor([[0.0], [1.0], [1.0], [1.0]])
    right = torch.tensor([[0.0], [0.0], [0.0], [1.0]])
    shares = [1.5 / 5, 3.5 / 5]
    assert float(klom(left, right, bins=2)) == pytest.approx((shares[1] - shares[0]) * math.log(shares[1] / shares[0]))
    assert klom(left, left).tolist() == [0]


def test_klom_as_published_by_hand():
    # range 0 to 20, 20 bins of width 1: of four models, shares of 1/4, 1/4 and 1/2, and of 1/2 and 1/2
    left = torch.tensor([[0.0], [5.5], [20.0], [20.0]], dtype=torch.float64)
    right = torch.tensor([[0.0], [0.5], [20.0], [19.5]], dtype=torch.float64)
    whole = 1 + 1e-5  # what the second's shares sum to with the floor where it has nobody and the first has somebody
    expected = 0.25 * math.log(0.25 / (0.5 / whole)) + 0.25 * math.log(0.25 / (1e-5 / whole)) + 0.5 * math.log(whole)
    assert float(published_klom(left, right)) == pytest.approx(expected)
    assert published_klom(left, left).tolist() == [0]
    assert float(published_klom(left + 1e4, right + 1e4)) == 0  # margins beyond 100 are 100
    apart = published_klom(torch.zeros(3, 1).double(), torch.ones(3, 1).double())
    assert float(apart) == pytest.approx(math.log((1 + 1e-5) / 1e-5))


def test_klom_grows_with_the_distance_and_its_floor_falls_with_the_number_of_models():
    near, far = (klom(normal(40, 30, shift), normal(40, 30, seed=1)).mean() for shift in (0.5, 2.0))
    floors = [klom(normal(count, 30), normal(count, 30, seed=1)).mean() for count in (10, 100)]
    assert floors[1] < floors[0] < far
    assert floors[1] < near < far


def test_ulira_tells_kinds_apart_where_they_differ_and_only_there():
    same = ulira(normal(30, 40), normal(30, 40, seed=1))
    assert same.shape == (60, 40)
    assert float(same.mean()) == pytest.approx(0.5, abs=0.05)
    # two normal distributions one deviation apart are told apart in Phi(1/2) = 69 %
    assert float(ulira(normal(60, 40), normal(60, 40, 1.0, seed=1)).mean()) == pytest.approx(0.69, abs=0.03)
    assert float(ulira(normal(5, 4), normal(5, 4, 50.0, seed=1)).mean()) == 1
    with pytest.raises(ValueError, match="three models"):
        ulira(normal(2, 4), normal(5, 4))


def test_ulira_by_hand():
    # asked about 4: the others of its kind have mean 1 and deviation 2 ** 0.5, those of the other kind 7 and 2
    own, other = -(3**2) / 4 - math.log(2**0.5), -(3**2) / 8 - math.log(2)
    assert own < other
    left = torch.tensor([[0.0], [2.0], [4.0]], dtype=torch.float64)
    assert ulira(left, left + 5)[:, 0].tolist() == [1, 1, 0, 0, 1, 1]
    assert ulira(left, 9 - left)[:, 0].tolist() == [1, 1, 0, 1, 1, 0]


def test_margins_that_do_not_vary_are_no_evidence():
    assert ulira(torch.ones(4, 3), torch.ones(4, 3)).tolist() == [[0.5] * 3] * 8


def test_log_odds_are_those_of_the_label_s_probability():
    logits, labels = 3 * normal(20, 4), torch.arange(20) % 4
    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(log_odds(logits, labels), (p / (1 - p)).log())
