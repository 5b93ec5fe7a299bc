"""Grad-CAM++ against a slow reference and the `grad-cam` package."""

from __future__ import annotations

import torch
from conftest import make_classifier, make_images
from hypothesis import given, settings
from hypothesis import strategies as st
from references import (
    assert_equals_reference,
    assert_equals_reference_on_other_networks,
    linear_network,
    maps_and_gradients,
    package_masks,
    two_halves,
)
from torch import Tensor

import opticam_lite as ol


def reference_grad_cam_plus_plus(classifier: ol.Classifier, x: Tensor, c: int) -> Tensor:
    A, g = maps_and_gradients(classifier, x, c)
    K, h, w = A.shape
    S = torch.zeros(h, w, dtype=A.dtype)
    for k in range(K):
        w_k, total = 0.0, float(A[k].sum())
        for i in range(h):
            for j in range(w):
                g_ij = float(g[k, i, j])
                denominator = 2 * g_ij**2 + total * g_ij**3
                alpha = g_ij**2 / denominator if denominator else 0.0
                w_k += alpha * max(g_ij, 0.0)
        S += w_k * A[k]
    return S.relu()


def test_equals_its_slow_reference(
    classifier: ol.Classifier, images: Tensor, targets: Tensor
) -> None:
    assert_equals_reference("grad-cam++", reference_grad_cam_plus_plus, classifier, images, targets)


def test_equals_its_slow_reference_on_other_networks(targets: Tensor) -> None:
    assert_equals_reference_on_other_networks("grad-cam++", reference_grad_cam_plus_plus, targets)


def test_where_the_denominator_is_0_the_coefficient_is_0() -> None:
    """Red − 2 green sums to −32, its gradient is 1/16: 2 + ΣA·g = 0. Its positive part is left."""
    image, left = two_halves()
    classifier = linear_network([[1, -2, 0], [0, 1, 0]], torch.tensor([[4.0, 1], [0, 0]]), grid=1)
    masks = ol.explain("grad-cam++", classifier, image, 0)
    torch.testing.assert_close(masks[0, 0], 1 - left)
    # With a gradient of 1/8 it is −2: the coefficient is −½, the weight −4, that of red 0.4.
    classifier = linear_network([[1, -2, 0], [1, 0, 0]], torch.tensor([[8.0, 1], [0, 0]]), grid=1)
    masks = ol.explain("grad-cam++", classifier, image, 0)
    torch.testing.assert_close(masks[0, 0], 1 - left)


@settings(max_examples=15, deadline=None)
@given(st.floats(-20, 3))
def test_grad_cam_plus_plus_of_gradients_of_any_size(exponent: float) -> None:
    """The squares of small gradients are 0 in float32; float64 holds them."""
    classifier = make_classifier("cnn")
    classifier.network[-1].weight.mul_(10**exponent)
    c = torch.tensor([1])
    assert_equals_reference(
        "grad-cam++", reference_grad_cam_plus_plus, classifier, make_images(1), c
    )


def test_the_package_s_grad_cam_plus_plus_needs_large_gradients(
    images: Tensor, targets: Tensor
) -> None:
    """It adds 1e-6 to a denominator of the order g²: at g = 1e-3 that is half of it."""
    classifier = make_classifier("dense")
    linear = classifier.network[-1]
    for scale, agree in ((1e3, True), (1e-3, False)):
        linear.weight.mul_(scale)
        masks = ol.explain("grad-cam++", classifier, images, targets)
        theirs = package_masks("GradCAMPlusPlus", classifier, images, targets)
        assert torch.allclose(masks, theirs, atol=1e-3) is agree
        assert_equals_reference(
            "grad-cam++", reference_grad_cam_plus_plus, classifier, images, targets
        )
        linear.weight.div_(scale)
