"""Repeated calls do not grow the process, and the test that says so is able to fail."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable

import psutil
import pytest
import torch
from conftest import make_classifier, make_images

import opticam_lite as ol

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
