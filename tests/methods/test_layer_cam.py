"""LayerCAM against a slow reference and the `grad-cam` package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from references import (
    assert_equals_package,
    assert_equals_reference,
    assert_equals_reference_on_other_networks,
    maps_and_gradients,
)
from torch import Tensor

import opticam_lite as ol


def reference_layer_cam(classifier: ol.Classifier, x: Tensor, c: int) -> Tensor:
    A, g = maps_and_gradients(classifier, x, c)
    S = torch.zeros(A.shape[1:], dtype=A.dtype)
    for A_k, g_k in zip(A, g, strict=True):
        for i, j in np.ndindex(*A_k.shape):
            S[i, j] += max(g_k[i, j], 0) * A_k[i, j]
    return S.relu()


def test_equals_its_slow_reference(
    classifier: ol.Classifier, images: Tensor, targets: Tensor
) -> None:
    assert_equals_reference("layer-cam", reference_layer_cam, classifier, images, targets)


def test_equals_its_slow_reference_on_other_networks(targets: Tensor) -> None:
    assert_equals_reference_on_other_networks("layer-cam", reference_layer_cam, targets)


@pytest.mark.parametrize("kind", ["cnn", "dense"])
def test_parity_with_the_package(kind: str, images: Tensor, targets: Tensor) -> None:
    assert_equals_package("layer-cam", "LayerCAM", kind, images, targets)
