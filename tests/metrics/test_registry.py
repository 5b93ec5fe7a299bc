"""The list of metrics, and `Case`: what the metrics of a batch share."""

from __future__ import annotations

import math
import re

import pytest
import torch
from conftest import make_classifier, make_images

import opticam_lite as ol
from opticam_lite import metrics
from opticam_lite.metrics.registry import check_masks


def test_the_list_of_metrics() -> None:
    names = "AD AG AI I D AOPC MS ADCC ADCC-target OM LE F1 BA SP EP SM"
    assert ol.list_metrics() == names.split()
    directions = {name: metrics.METRICS[name].arrow for name in ol.list_metrics()}
    rows = re.findall(r"^\| ([\w-]+) \|.*\| (.) \|$", metrics.__doc__ or "", re.MULTILINE)
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


def test_tables_are_in_percent_but_for_two_metrics() -> None:
    case = make_case(seed=3)
    images, S, boxes, p, o = case.images, case.masks, case.boxes, case.p, case.o
    right = case.predicted == case.targets
    assert 0 < right.sum() < len(right)
    overlaps, curve = metrics.box_overlaps(S, boxes), (case.classifier, images)
    predicted = case.explain(images, case.predicted), case.predicted
    again = case.explain(images * S, case.targets)
    S_p, c_p = predicted
    p_p, o_p = ol.masked_probabilities(case.classifier, images, S_p, c_p)
    again_p = case.explain(images * S_p, c_p)
    expected = {
        "AD": 100 * metrics.drop(p, o),
        "AG": 100 * metrics.gain(p, o),
        "AI": 100 * metrics.increase(p, o),
        "I": 100 * metrics.insertion(*curve, *predicted, seed=3).areas,
        "D": 100 * metrics.deletion(*curve, *predicted, seed=3).areas,
        "AOPC": 100 * metrics.aopc(*curve, S, case.targets, seed=3).areas,
        "MS": metrics.max_sensitivity(case.explain, images, S, case.targets, seed=3),
        "ADCC": 100 * metrics.adcc(p_p, o_p, S_p, again_p),
        "ADCC-target": 100 * metrics.adcc(p, o, S, again),
        "OM": 100 * metrics.official_metric(S, boxes, right),
        "LE": 100 * metrics.localization_error(S, boxes),
        "F1": 100 * metrics.f1_score(S, boxes),
        "BA": 100 * metrics.box_accuracy(overlaps),
        "SP": 100 * metrics.pointing_game(S, boxes),
        "EP": 100 * metrics.energy_pointing_game(S, boxes),
        "SM": metrics.saliency_metric(S, p),
    }
    assert list(expected) == ol.list_metrics()
    for name, values in expected.items():
        torch.testing.assert_close(metrics.METRICS[name].per_image(case), values)
    # A class below the target is as wrong as one above it.
    below = make_case(predicted=case.targets - 1)
    assert metrics.METRICS["OM"].per_image(below).tolist() == [100] * 4
    ba = metrics.METRICS["BA"]
    torch.testing.assert_close(ba.detail(case), overlaps)
    assert ba.average(expected["BA"], overlaps) == metrics.average_box_accuracy(overlaps)
    case.known = torch.tensor([True, False, True, False])
    official = metrics.METRICS["OM"].per_image(case)
    assert official.isnan().tolist() == [False, True, False, True]
    torch.testing.assert_close(official[::2], expected["OM"][::2])


@pytest.mark.parametrize(
    "shape", [(1, 8, 8), (4, 0, 8, 8), (4, 1, 8), (4, 2, 8, 8), (4, 1, 8, 8, 1)]
)
def test_masks_have_one_channel(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(N, 1, H, W\) is needed"):
        check_masks(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (5, 1, 8, 8), (4, 1, 7, 8), (4, 1, 8, 9)])
def test_masks_fit_their_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"need masks of shape \(4, 1, 8, 8\)"):
        check_masks(torch.zeros(shape), torch.zeros(4, 3, 8, 8))


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
