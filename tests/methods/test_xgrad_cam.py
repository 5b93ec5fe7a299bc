"""XGrad-CAM against a slow reference and the `grad-cam` package."""

from __future__ import annotations

import pytest
import torch
from references import (
    assert_equals_package,
    assert_equals_reference,
    assert_equals_reference_on_other_networks,
    linear_network,
    maps_and_gradients,
    two_halves,
)
from torch import Tensor

import opticam_lite as ol


def reference_xgrad_cam(classifier: ol.Classifier, x: Tensor, c: int) -> Tensor:
    A, g = maps_and_gradients(classifier, x, c)
    S = torch.zeros(A.shape[1:], dtype=A.dtype)
    for A_k, g_k in zip(A, g, strict=True):
        if abs(A_k.sum()) > 1e-6 * A_k.abs().sum():
            S += (g_k * A_k).sum() / A_k.sum() * A_k
    return S.relu()


def test_equals_its_slow_reference(
    classifier: ol.Classifier, images: Tensor, targets: Tensor
) -> None:
    assert_equals_reference("xgrad-cam", reference_xgrad_cam, classifier, images, targets)


def test_equals_its_slow_reference_on_other_networks(targets: Tensor) -> None:
    assert_equals_reference_on_other_networks("xgrad-cam", reference_xgrad_cam, targets)


@pytest.mark.parametrize("kind", ["cnn", "dense"])
def test_parity_with_the_package(kind: str, images: Tensor, targets: Tensor) -> None:
    assert_equals_package("xgrad-cam", "XGradCAM", kind, images, targets)


def test_xgrad_cam_gives_a_map_whose_sum_is_zero_no_weight() -> None:
    image, left = two_halves()
    # maps: red − green, whose sum is 0 and whose Σ gA is not, and blue + red / 10
    to_logits = torch.tensor([[-1.0, 1, -1, 1, 1, 1, 1, 1], [0] * 8])
    classifier = linear_network([[1, -1, 0], [0.1, 0, 1]], to_logits, grid=2)
    masks = ol.explain("xgrad-cam", classifier, image, 0)
    torch.testing.assert_close(masks[0, 0], left)
    # Up to rounding, whatever the size of the maps: here the sum is about 0.02 of 64,000.
    image[:, 1] *= 1 - 5e-7
    classifier = linear_network([[1000, -1000, 0], [0.1, 0, 1]], to_logits, grid=2)
    assert classifier.features(image)[0, 0].sum() != 0
    masks = ol.explain("xgrad-cam", classifier, image, 0)
    torch.testing.assert_close(masks[0, 0], left)
