"""The list of metrics, and `Case`: what the metrics of a batch share."""

from __future__ import annotations

import math
import re

import pytest
import torch
from conftest import make_classifier, make_images

import opticam_lite as ol
from opticam_lite import metrics


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
