"""Raw attention against a slow reference."""

from __future__ import annotations

import pytest
import torch
from slow_transformer import KINDS, Slow, assert_equals_reference, build, classifier_of
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor

import opticam_lite as ol
from opticam_lite.methods.attention import need_transformer


def reference_raw_attention(slow: Slow, c: int) -> Tensor:
    return slow.row(sum(slow.seen[-1]["P"]) / slow.heads)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_its_slow_reference(kind: str, images: Tensor, targets: Tensor) -> None:
    assert_equals_reference("raw-attention", reference_raw_attention, kind, images, targets)


def test_the_distilled_tokens_are_set_aside(images: Tensor) -> None:
    """The map begins at the third token; the class token's row is the first."""
    classifier = classifier_of(build(VisionTransformerDistilled))
    parts = need_transformer("", classifier)
    P = parts((images - 0.5) / 0.5)[1][-1].mean(1)
    expected = ol.to_masks(P[:, 0, 2:].view(3, 1, 4, 4), (32, 32))
    torch.testing.assert_close(ol.explain("raw-attention", classifier, images, 0), expected)
