"""Tidy rows and the table made of them."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch
from conftest import make_classifier, make_images
from torch import Tensor

import opticam_lite as ol
from opticam_lite.evaluation import choose

METHODS = ["grad-cam", "fake-cam", "opti-cam"]


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    dataset = ol.Images(make_images(7), [0, 1, 2, 3, 4, 0, 1])
    return ol.evaluate(
        make_classifier("cnn"),
        dataset,
        METHODS,
        batch_size=3,
        options={"opti-cam": {"iterations": 3}},
    )


def test_rows_are_tidy(frame: pd.DataFrame) -> None:
    assert len(frame) == 7 * 3 * 3
    columns = "dataset image network layer method options metric value target p o seconds"
    assert " ".join(frame.columns) == columns
    assert not frame.duplicated(["image", "method", "metric"]).any()
    assert set(frame["metric"]) == {"AD", "AG", "AI"}
    assert set(frame["layer"]) == {"4"}
    options = frame.loc[frame["method"] == "opti-cam", "options"].map(json.loads)
    assert all(o == {"iterations": 3} for o in options)
    assert (frame["seconds"] >= 0).all()


def test_values_are_those_of_single_calls(frame: pd.DataFrame) -> None:
    classifier, images = make_classifier("cnn"), make_images(7)
    targets = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    for method in METHODS:
        options = {"iterations": 3} if method == "opti-cam" else {}
        masks = ol.explain(method, classifier, images, targets, **options)
        p, o = ol.masked_probabilities(classifier, images, masks, targets)
        for metric, function in (
            ("AD", ol.metrics.average_drop),
            ("AG", ol.metrics.average_gain),
            ("AI", ol.metrics.average_increase),
        ):
            rows = frame.loc[(frame["method"] == method) & (frame["metric"] == metric)]
            assert rows["value"].mean() == pytest.approx(function(p, o), abs=1e-2)
            assert rows["target"].tolist() == targets.tolist()
            assert rows["p"].tolist() == pytest.approx(p.tolist(), abs=1e-5)


def test_the_summary(frame: pd.DataFrame) -> None:
    table = ol.summarize(frame)
    assert list(table.index) == METHODS
    assert list(table.columns) == ["AD", "AG", "AI", "T"]
    expected = frame.query("method == 'opti-cam' and metric == 'AG'")["value"].mean()
    assert table.loc["opti-cam", "AG"] == pytest.approx(expected)
    seconds = frame.query("method == 'grad-cam'")["seconds"].median()
    assert table.loc["grad-cam", "T"] == pytest.approx(8 * seconds)


def test_images_without_labels_are_explained_for_their_prediction(images: Tensor) -> None:
    classifier = make_classifier("cnn")
    frame = ol.evaluate(classifier, ol.Images(images), ["grad-cam"], ["AD"])
    assert frame["target"].tolist() == classifier.predict(images).tolist()


def test_limit_and_progress(images: Tensor) -> None:
    seen: list[tuple[str, int, int]] = []
    frame = ol.evaluate(
        make_classifier("cnn"),
        ol.Images(make_images(9)),
        ["fake-cam"],
        ["AD"],
        limit=5,
        batch_size=2,
        progress=lambda *step: seen.append(step),
    )
    assert frame["image"].tolist() == [str(i) for i in choose(9, 5)]
    assert seen == [("fake-cam", 2, 5), ("fake-cam", 4, 5), ("fake-cam", 5, 5)]


def test_the_choice_of_images() -> None:
    assert choose(4) == choose(4, 9) == [0, 1, 2, 3]
    few, many = choose(256, 16), choose(256, 64)
    assert few == sorted(few)
    assert set(few) <= set(many)
    assert len({i % 8 for i in many}) == 8  # every class, though classes take turns
    assert choose(256, 16, seed=1) != few


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["gradcam"]}, "unknown method 'gradcam'"),
        ({"metrics": ["ad"]}, "unknown metric 'ad'"),
        ({"limit": 0}, "limit is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"options": {"optic": {}}}, "unknown method 'optic'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(
    arguments: dict, message: str, images: Tensor
) -> None:
    settings = {"methods": ["grad-cam"], "metrics": ["AD"], **arguments}
    with pytest.raises(ValueError, match=message):
        ol.evaluate(make_classifier("cnn"), ol.Images(images), **settings)


def test_a_method_that_does_not_fit_is_refused(images: Tensor) -> None:
    dense = make_classifier("dense")
    dense.name = "DenseNet"
    with pytest.raises(ValueError, match="cam can't explain DenseNet: no linear layer"):
        ol.evaluate(dense, ol.Images(images), ["cam"])
    with pytest.raises(TypeError, match="grad-cam has no option"):
        ol.evaluate(
            make_classifier("cnn"), ol.Images(images), ["grad-cam"], options={"grad-cam": {"a": 1}}
        )
