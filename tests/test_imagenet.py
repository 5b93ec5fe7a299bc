"""A real ImageNet network and real photographs, where they are at hand.

`OPTICAM_IMAGENET` names a folder with `squeezenet1_0.safetensors`, `images/` and `labels.csv`. The
expected figures were measured with independent implementations: Opti-CAM with its authors' code,
the others with the `grad-cam` package.
"""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest

import opticam_lite as ol
from opticam_lite.datasets import Dataset, Sample

FOLDER = os.environ.get("OPTICAM_IMAGENET")
EVERYTHING = os.environ.get("OPTICAM_IMAGENET_ALL") == "1"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        FOLDER is None, reason="NOT RUN: set OPTICAM_IMAGENET to a folder of real photographs"
    ),
]

# AD, AG, AI in percent, on all 200 photographs and on every fifth.
EXPECTED = {
    200: {
        "opti-cam": (0.58, 84.03, 96.5),
        "fake-cam": (0.07, 0.11, 51.0),
        "grad-cam": (44.77, 6.12, 22.0),
        "xgrad-cam": (42.83, 6.55, 23.0),
        "layer-cam": (38.83, 6.08, 24.0),
        "hires-cam": (44.77, 6.12, 22.0),
    },
    40: {
        "opti-cam": (0.31, 81.27, 95.0),
        "fake-cam": (0.02, 0.17, 52.5),
        "grad-cam": (44.68, 3.30, 12.5),
        "xgrad-cam": (46.52, 3.89, 12.5),
        "layer-cam": (43.35, 5.17, 12.5),
        "hires-cam": (44.68, 3.30, 12.5),
    },
}


class EveryFifth(Dataset):
    """Every fifth sample of another dataset, beginning with the first."""

    def __init__(self, dataset: Dataset) -> None:
        self.name, self._dataset = dataset.name, dataset

    def __len__(self) -> int:
        return len(range(0, len(self._dataset), 5))

    def sample(self, index: int) -> Sample:
        return self._dataset[5 * index]


@pytest.fixture(scope="module")
def classifier() -> ol.Classifier:
    weights = Path(FOLDER or "") / "squeezenet1_0.safetensors"
    return ol.load_model("squeezenet1_0", checkpoint=weights, layer="features.12")


@pytest.fixture(scope="module")
def photos(classifier: ol.Classifier) -> Dataset:
    folder = Path(FOLDER or "")
    return ol.load_dataset(folder / "images", labels=folder / "labels.csv", classifier=classifier)


def check(frame: pd.DataFrame, method: str, n: int, tolerance: tuple[float, ...]) -> None:
    row = ol.summarize(frame).loc[method]
    for metric, expected, within in zip(
        ("AD", "AG", "AI"), EXPECTED[n][method], tolerance, strict=True
    ):
        assert row[metric] == pytest.approx(expected, abs=within), f"{method} {metric} on {n}"


def test_accuracy_is_the_published_one(classifier: ol.Classifier, photos: Dataset) -> None:
    images, targets = photos.batch(range(len(photos)))
    assert targets is not None
    p = classifier.probabilities(images)
    assert 100 * (p.argmax(1) == targets).float().mean().item() == pytest.approx(63.5, abs=0.6)
    assert p.gather(1, targets[:, None]).mean().item() == pytest.approx(0.564, abs=0.003)


# Grad-CAM++ is missing: the package adds 1e-6 to a denominator that is smaller on this network, and
# so measures another method (AD 42.82, AG 4.34; without that constant 41.48 and 5.68).
ONE_PASS = {
    "fake-cam": (0.05, 0.05, 2.5),
    **dict.fromkeys(("grad-cam", "xgrad-cam", "layer-cam", "hires-cam"), (1.0, 0.5, 2.5)),
}


@pytest.fixture(scope="module")
def one_pass(classifier: ol.Classifier, photos: Dataset) -> pd.DataFrame:
    """All of them at once, so that each photograph is read once."""
    return ol.evaluate(classifier, photos, list(ONE_PASS))


@pytest.mark.parametrize("method", ONE_PASS)
def test_one_pass_methods_on_all_photographs(method: str, one_pass: pd.DataFrame) -> None:
    check(one_pass, method, 200, ONE_PASS[method])


def test_opti_cam(classifier: ol.Classifier, photos: Dataset) -> None:
    """On every fifth photograph; `OPTICAM_IMAGENET_ALL=1` takes all 200, which is slow.

    In float32, as the reference was: bfloat16 finds other of the many near optima, and on so few
    photographs their average moves by as much as the tolerance. AI moves by 2.5 for each of them.
    """
    dataset = photos if EVERYTHING else EveryFifth(photos)
    frame = ol.evaluate(classifier, dataset, {"opti-cam": {"precision": "float32"}})
    check(frame, "opti-cam", len(dataset), (0.5, 2.0, 2.5 if EVERYTHING else 5.0))
