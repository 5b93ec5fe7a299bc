"""AD, AI and AG against their equations, one image at a time, and their properties."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opticam_lite import metrics

probability = st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.0, 1.0, 1 - 2**-24, 2**-30]))
pairs = st.lists(st.tuples(probability, probability), min_size=1, max_size=20)


def slow_average_drop(pairs: list[tuple[float, float]]) -> float:
    """Eq. 13, with a drop from 0 being 0."""
    total = 0.0
    for p, o in pairs:
        if p > 0:
            total += max(p - o, 0) / p
    return total / len(pairs) * 100


def slow_average_gain(pairs: list[tuple[float, float]]) -> float:
    """Eq. 15, with a gain at 1 being 0."""
    total = 0.0
    for p, o in pairs:
        if p < 1:
            total += max(o - p, 0) / (1 - p)
    return total / len(pairs) * 100


def slow_average_increase(pairs: list[tuple[float, float]]) -> float:
    """Eq. 14."""
    return sum(1 for p, o in pairs if p < o) / len(pairs) * 100


@given(pairs)
def test_the_equations(pairs: list[tuple[float, float]]) -> None:
    p, o = (torch.tensor(v, dtype=torch.float32) for v in zip(*pairs, strict=True))
    assert metrics.average_drop(p, o) == pytest.approx(slow_average_drop(pairs), abs=1e-6)
    assert metrics.average_gain(p, o) == pytest.approx(slow_average_gain(pairs), abs=1e-6)
    assert metrics.average_increase(p, o) == pytest.approx(slow_average_increase(pairs), abs=1e-6)


@given(pairs)
def test_properties(pairs: list[tuple[float, float]]) -> None:
    p, o = (torch.tensor(v) for v in zip(*pairs, strict=True))
    drop, gain, increase = metrics.drop(p, o), metrics.gain(p, o), metrics.increase(p, o)
    for values in (drop, gain, increase):
        assert torch.isfinite(values).all()
        assert ((values >= 0) & (values <= 1)).all()
    assert not ((drop > 0) & (gain > 0)).any()  # the two never speak of one image
    assert ((gain > 0) <= (increase > 0)).all()
    # AG is AD of the complement: what is missing before and after
    torch.testing.assert_close(gain, metrics.drop(1 - p.double(), 1 - o.double()))
    unmasked = metrics.average_drop(p, p), metrics.average_gain(p, p)
    assert unmasked == (0, 0)
    assert metrics.average_increase(p, p) == 0


def test_by_hand() -> None:
    p, o = [0.5, 0.8, 0.2, 0.0, 1.0], [0.25, 0.9, 0.2, 0.5, 1.0]
    assert metrics.average_drop(p, o) == pytest.approx(10)  # (0.5 + 0 + 0 + 0 + 0) / 5
    assert metrics.average_gain(p, o) == pytest.approx(20)  # (0 + 0.5 + 0 + 0.5 + 0) / 5
    assert metrics.average_increase(p, o) == pytest.approx(40)


def test_the_drop_is_relative() -> None:
    assert metrics.average_drop([0.1], [0.05]) == pytest.approx(50)


def test_numbers_keep_their_digits() -> None:
    for make in (list, np.array, partial(torch.tensor, dtype=torch.float64)):
        assert metrics.average_gain(make([1 - 1e-9]), make([1.0])) == pytest.approx(100)
    learnt = torch.tensor([0.5], requires_grad=True)
    assert not metrics.drop(learnt, learnt).requires_grad


@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("o", [0.0, 0.5, 1.0])
def test_defined_at_the_ends(p: float, o: float) -> None:
    for metric in (metrics.average_drop, metrics.average_gain, metrics.average_increase):
        assert math.isfinite(metric([p], [o]))


@pytest.mark.parametrize(
    ("p", "o", "message"),
    [
        ([0.5, 0.5], [0.5], "o must be a vector of 2 values"),
        ([[0.5]], [[0.5]], "p must be a vector, one an image"),
        (0.5, 0.5, "p must be a vector, one an image"),
        ([0.5], [0.5, 0.5], "o must be a vector of 1 values"),
        ([50.0], [40.0], "fractions in"),
        ([1.01], [0.5], "p holds 1.01"),
        ([0.5], [-0.01], "o holds -0.01"),
        ([0.5], [math.nan], "o holds nan"),
        ([], [], "no images"),
    ],
)
def test_bad_input(p: list, o: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.average_drop(p, o)
