"""AD, AI and AG against their equations, one image at a time, and their properties."""

from __future__ import annotations

import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from conftest import make_classifier, make_images
from hypothesis import given
from hypothesis import strategies as st

import opticam_lite as ol
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
        ([50.0], [40.0], "fractions in"),
        ([0.5], [math.nan], "o holds nan"),
        ([], [], "no images"),
    ],
)
def test_bad_input(p: list, o: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.average_drop(p, o)


def test_the_list_of_metrics() -> None:
    names = "AD AG AI I D AOPC MS ADCC OM LE F1 BA SP EP SM"
    assert ol.list_metrics() == names.split()
    directions = {name: metrics.METRICS[name].arrow for name in ol.list_metrics()}
    rows = re.findall(r"^\| (\w+) \|.*\| (.) \|$", metrics.__doc__ or "", re.MULTILINE)
    assert dict(rows) == directions
    with pytest.raises(ValueError, match="unknown metric 'ad'; did you mean 'AD'"):
        metrics.METRICS["ad"]


def make_case(n: int = 4, method: str = "grad-cam", **changes: object) -> metrics.Case:
    """What a tiny network, `n` images and a method make of each other."""
    classifier, images = make_classifier("cnn"), make_images(n)
    targets = torch.arange(n) % classifier.classes
    masks = ol.explain(method, classifier, images, targets)
    p, o = ol.masked_probabilities(classifier, images, masks, targets)
    boxes = [torch.tensor([[4, 6, 20, 28]])] * n
    facts = {
        "classifier": classifier,
        "images": images,
        "targets": targets,
        "predicted": classifier.predict(images),
        "masks": masks,
        "p": p,
        "o": o,
        "boxes": boxes,
        "explain": lambda images, targets: ol.explain(method, classifier, images, targets),
    }
    return metrics.Case(**(facts | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["AD", "AG", "AI"])
def test_the_mean_of_the_images_is_the_metric(name: str) -> None:
    case, metric = make_case(), metrics.METRICS[name]
    values = metric.per_image(case)
    assert values.dtype == torch.float64
    assert metric.average(values, None) == pytest.approx(metric.function(case.p, case.o))
    assert metric.average(torch.tensor([math.nan, 1.0, 3.0]), None) == 2
    assert (metric.arrow, metric.needs) == ("↓" if name == "AD" else "↑", None)


def test_the_predicted_class_is_explained_only_where_it_is_another() -> None:
    asked = []
    case = make_case()
    explain = case.explain
    case.explain = lambda images, targets: asked.append(targets) or explain(images, targets)
    case.targets = case.predicted.clone()
    assert case.masks_of_predicted is case.masks
    assert not asked

    case = make_case(explain=case.explain)
    wrong = case.predicted != case.targets
    assert 0 < wrong.sum() < len(wrong)
    masks = case.masks_of_predicted
    torch.testing.assert_close(asked, [case.predicted[wrong]])
    torch.testing.assert_close(masks, explain(case.images, case.predicted))
    assert case.masks_of_predicted is masks


def test_which_class_and_which_map_the_curves_are_of() -> None:
    case = make_case()
    assert (case.predicted != case.targets).any()
    network, images = case.classifier, case.images
    masks = case.explain(images, case.predicted)
    for name, curve in (("I", metrics.insertion), ("D", metrics.deletion)):
        expected = 100 * curve(network, images, masks, case.predicted).areas
        torch.testing.assert_close(metrics.METRICS[name].per_image(case), expected)
    expected = 100 * metrics.aopc(network, images, case.masks, case.targets).areas
    torch.testing.assert_close(metrics.METRICS["AOPC"].per_image(case), expected)
