"""Rollout against a slow reference."""

from __future__ import annotations

import pytest
import torch
from slow_transformer import KINDS, Slow, assert_equals_reference, build, classifier_of
from torch import Tensor

import opticam_lite as ol
from opticam_lite.methods.attention import roll_out
from opticam_lite.network import Transformer


def reference_rollout(slow: Slow, c: int) -> Tensor:
    product = torch.eye(17, dtype=torch.float64)
    for s in slow.seen:
        A = sum(s["P"]) / slow.heads + torch.eye(17)
        for i in range(17):
            A[i] = A[i] / A[i].sum()
        product = A @ product
    return slow.row(product)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_its_slow_reference(kind: str, images: Tensor, targets: Tensor) -> None:
    assert_equals_reference("rollout", reference_rollout, kind, images, targets)


def test_rolling_out_is_the_row_of_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.rand(2, 6, 6, generator=generator).softmax(-1) for _ in range(3)]
    product = matrices[2] @ matrices[1] @ matrices[0]
    for pooled, expected in ((False, product[:, 0]), (True, product[:, 2:].mean(1))):
        parts = Transformer(torch.clone, (), torch.nn.Identity(), (), prefix=2, pooled=pooled)
        row = roll_out(parts, matrices)
        torch.testing.assert_close(row, expected)
        torch.testing.assert_close(row.sum(1), torch.ones(2))  # a mixture of the tokens


def test_with_one_block_rollout_is_raw_attention(images: Tensor) -> None:
    """(P + I)/2 has the patches' attention, halved; and the mask has no scale."""
    one = classifier_of(build(depth=1))
    torch.testing.assert_close(
        ol.explain("rollout", one, images, 0), ol.explain("raw-attention", one, images, 0)
    )
    two = classifier_of(build(depth=2))
    rollout, raw = (ol.explain(m, two, images, 0) for m in ("rollout", "raw-attention"))
    assert (rollout - raw).abs().max() > 0.05
