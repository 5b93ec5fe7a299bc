"""Repeated calls do not grow the process, and the test that says so is able to fail."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable

import psutil
import pytest
import torch
from bench import measure, run
from conftest import make_classifier, make_images
from torch import nn

import opticam_lite as ol

pytestmark = pytest.mark.slow

CALLS = (200, 1000)
# A call that kept its image, its mask or the graph of one pass would keep 16 kB or more: 13 MB.
ALLOWED = 4e6


def growth(call: Callable[[], object]) -> int:
    """By how many bytes the resident memory grows from call 200 to call 1,000."""
    held = []
    for first, last in zip((0, *CALLS), CALLS, strict=False):
        for _ in range(first, last):
            call()
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # what is free is not held
        held.append(psutil.Process().memory_info().rss)
    return held[1] - held[0]


@pytest.mark.parametrize(
    ("method", "kind", "options"),
    [
        ("grad-cam", "cnn", {}),
        ("ablation-cam", "dense", {}),
        ("opti-cam", "cnn", {"iterations": 1}),
        ("rollout", "vit", {}),
        ("score-cam", "cnn", {}),
    ],
)
def test_a_thousand_calls_take_no_memory(method: str, kind: str, options: dict) -> None:
    classifier, images, targets = make_classifier(kind), make_images(1), torch.tensor([1])
    assert growth(lambda: ol.explain(method, classifier, images, targets, **options)) < ALLOWED


def test_a_leak_is_noticed() -> None:
    classifier, images, targets = make_classifier("cnn"), make_images(1), torch.tensor([1])
    kept = []

    def leak() -> None:
        kept.append((images.clone(), ol.explain("cam", classifier, images, targets)))

    assert growth(leak) > ALLOWED


def peak_of_score_cam(n: int) -> int:
    """The most memory in bytes that Score-CAM takes for n images of 224×224 at 2,048 channels."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 32, stride=32), nn.Conv2d(8, 2048, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    classifier = ol.Classifier(nn.Sequential(*network, nn.Linear(2048, 5)), "1")
    images = make_images(n, 224, 224)
    classifier.predict(images[:1])
    meter = measure._Resident()
    ol.explain("score-cam", classifier, images, 0, progress=False)
    return meter.peak()


@pytest.mark.parametrize("n", [1, 3])
def test_score_cam_is_bounded_in_memory(n: int) -> None:
    """Under 1 GB whatever the batch; the masks of one image alone would be 411 MB, of three 1.2 GB.

    What holds is well below that: a chunk of masks and of masked images.
    """
    assert run.alone(peak_of_score_cam, n) < 400e6
