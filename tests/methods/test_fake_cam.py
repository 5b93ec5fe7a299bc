"""Fake-CAM is the same for every image."""

from __future__ import annotations

import torch
from torch import Tensor

import opticam_lite as ol


def reference_fake_cam(x: Tensor) -> Tensor:
    S = torch.ones(x.shape[1:])
    S[0, 0] = 0
    return S


def test_equals_its_slow_reference(
    classifier: ol.Classifier, images: Tensor, targets: Tensor
) -> None:
    masks = ol.explain("fake-cam", classifier, images, targets)
    assert masks.shape == (3, 1, 32, 32)
    for x, mask in zip(images, masks, strict=True):
        assert torch.equal(mask[0], reference_fake_cam(x))
