"""Intervals of averages, against exact ones and by how often they cover the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from opticam_lite.evaluation import intervals
from opticam_lite.evaluation.intervals import interval, interval_of_average, surely_better
from opticam_lite.metrics import average_box_accuracy

PERCENT = (0.0, 100.0)


@pytest.mark.parametrize(("hits", "n"), [(0, 8), (8, 8), (5, 8), (1, 20), (193, 200), (0, 1)])
def test_of_a_share_it_is_that_of_clopper_and_pearson(hits: int, n: int) -> None:
    values = 100 * (torch.arange(n) < hits).double()
    exact = stats.binomtest(hits, n).proportion_ci(method="exact")
    assert interval(values, PERCENT) == pytest.approx([100 * exact.low, 100 * exact.high], abs=1.5)


@pytest.mark.parametrize("n", [5, 8, 30])
def test_it_covers_the_mean_of_rare_losses(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine images of ten lose nothing: the bootstrap alone covers the mean in half of the draws."""
    monkeypatch.setattr(intervals, "DRAWS", 500)
    generator = np.random.default_rng(0)
    covered = {PERCENT: 0, None: 0}
    for _ in range(200):
        lost = generator.uniform(0, 100, n) * (generator.uniform(size=n) < 0.1)
        for limits in covered:
            low, high = interval(torch.tensor(lost), limits)
            covered[limits] += low <= 5 <= high
    assert covered[PERCENT] >= 190 > covered[None]


def test_it_narrows_as_the_standard_error_does() -> None:
    values = 100 * torch.rand(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    error = float(values.std()) / math.sqrt(2000)
    expected = [float(values.mean()) - 1.96 * error, float(values.mean()) + 1.96 * error]
    assert interval(values, PERCENT) == pytest.approx(expected, abs=0.2)
    assert interval(values) == pytest.approx(expected, abs=0.2)


def test_without_limits_two_images_are_needed() -> None:
    one = torch.tensor([3.0, math.nan])
    assert all(map(math.isnan, interval(one)))
    assert all(map(math.isnan, interval(one[1:], PERCENT)))
    low, high = interval(one, PERCENT)
    assert 0 < low < 3 < 90 < high < 100


def test_of_box_accuracy_it_ends_at_the_limits_of_what_overlaps_can_be() -> None:
    def average(values: torch.Tensor, overlaps: torch.Tensor) -> float:
        return average_box_accuracy(overlaps)

    none, values = torch.zeros(8, 3, dtype=torch.float64), torch.zeros(8)
    low, high = interval_of_average(values, none, average)
    assert low == 0
    assert 100 * stats.beta.ppf(0.975, 1, 8) == pytest.approx(high, abs=6)
    low, high = interval_of_average(values, none + 1, average)
    assert (low < 70, high) == (True, 100)


def test_methods_are_told_apart_where_enough_images_favour_one() -> None:
    drops = torch.tensor([10.0, 20, 30, 40, 50, 60])
    assert surely_better(drops + 5, drops)
    assert not surely_better(drops, drops + 5)
    assert not surely_better(drops[:5] + 5, drops[:5])  # 2 in 32 by chance
    same = torch.zeros(200)
    assert not surely_better(same, same)
    assert not surely_better(same.index_fill(0, torch.arange(5), 1.0), same)  # ties tell nothing
    unknown = drops.index_fill(0, torch.tensor([0]), math.nan)
    assert not surely_better(unknown + 5, drops)


def test_equal_methods_are_seldom_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "DRAWS", 1000)
    generator = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        first, second = generator.beta(5, 2, (2, 8)) * 100
        wrong += surely_better(torch.tensor(first), torch.tensor(second))
    assert wrong <= 15  # 5 %, where 2.5 % are meant
