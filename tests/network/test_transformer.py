"""What follows from a transformer's description: the last block's few tokens, one channel less."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from conftest import make_images
from timm.models.beit import Beit
from timm.models.eva import Eva
from torch import nn
from torchvision.models import VisionTransformer

import opticam_lite as ol
from opticam_lite.network import Transformer, ablation
from opticam_lite.network.ablation import AttentionAblation
from opticam_lite.network.transformer import Block

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def timm_vit(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    return timm.create_model(name, num_classes=5, **(SMALL | options))


def torchvision_vit() -> nn.Module:
    network = VisionTransformer(32, 8, 2, 3, 24, 48, num_classes=5)
    nn.init.normal_(network.heads.head.weight)  # zeros otherwise
    return network


TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {
    "class token": timm_vit,
    "layer scale": lambda: timm_vit(init_values=0.5),
    "norm of queries": lambda: timm_vit(qk_norm=True),
    "distilled": lambda: timm_vit("deit_tiny_distilled_patch16_224"),
    "registers": lambda: timm_vit(reg_tokens=3),
    "torchvision": torchvision_vit,
    "average": lambda: timm_vit(global_pool="avg", class_token=False),
}
# Their blocks are told positions, and their queries, keys and values may be projected separately.
TOLD: dict[str, Callable[[], nn.Module]] = {
    "relative": lambda: Beit(**SMALL, num_classes=5, global_pool="token", use_rel_pos_bias=True),
    "rotary": lambda: Eva(**SMALL, num_classes=5, global_pool="token", use_rot_pos_emb=True),
    "separate": lambda: Eva(**SMALL, num_classes=5, global_pool="token", qkv_fused=False),
}


def classifier_of(kind: str) -> ol.Classifier:
    torch.manual_seed(0)
    network = (TRANSFORMERS | TOLD)[kind]().eval()
    for p in network.parameters():  # values that begin as 0 or 1, or are small, would hide mistakes
        nn.init.normal_(p, 0.5 * (p.ndim == 1), 0.2)
    return ol.Classifier(network, size=32, device="cpu")


@pytest.mark.parametrize("kind", TRANSFORMERS | TOLD)
def test_the_quick_copy_computes_few_tokens_in_the_last_block(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier, images = classifier_of(kind), make_images(3)
    quick = classifier.quick("float32")
    gradients, seen = [], []
    after = Block.after
    monkeypatch.setattr(
        Block, "after", lambda self, x, *more: seen.append(x.shape[1]) or after(self, x, *more)
    )
    for view in (classifier, quick):
        x = images.clone().requires_grad_()
        y = view.logits(x)
        gradients.append(torch.autograd.grad(y[:, 1].sum(), x)[0])
        torch.testing.assert_close(y, classifier.logits(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)
    tokens = {"average": [16, 16], "distilled": [18, 2], "registers": [20, 1]}.get(kind, [17, 1])
    assert seen == tokens


@pytest.mark.parametrize("kind", TRANSFORMERS | TOLD)
def test_bfloat16_attends_openly_where_it_goes_back(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU the fused kernel's way back is slow in bfloat16; the two are the same function."""
    classifier, images = classifier_of(kind), make_images(3)
    rough = classifier.quick("bfloat16")
    opened = []
    attention = Block._attention
    monkeypatch.setattr(
        Block, "_attention", lambda self, *qk: opened.append(1) or attention(self, *qk)
    )
    with torch.no_grad():
        fused = rough.logits(images)
    assert not opened
    y = rough.logits(images.clone().requires_grad_())
    assert len(opened) == 2
    scale = classifier.logits(images).abs().max()
    assert (y - fused).abs().max() < 0.03 * scale
    assert (y - classifier.logits(images)).abs().max() < 0.05 * scale


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_the_head_without_each_channel(kind: str) -> None:
    """By a matrix of rank one where the last attention reads the maps, else by the head itself."""
    classifier, images = classifier_of(kind), make_images(3)
    k = torch.tensor([0, 5, 23, 7])
    quick = []
    for layer in classifier.layers:
        view = classifier.at(layer)
        A, rest = view.split(images)
        for i in range(len(A)):
            if A.shape[1] <= 23:
                continue
            logits_without = ablation(view, A[i, None], rest.repeat(i, 1))
            maps = A[i].repeat(len(k), 1, 1, 1)
            maps[torch.arange(len(k)), k] = 0
            expected = view.head(maps, rest.repeat(i, len(k)))
            torch.testing.assert_close(logits_without(k), expected, rtol=1e-4, atol=1e-4)
            assert logits_without(k[:0]).shape == (0, 5)
            if isinstance(logits_without, AttentionAblation):
                quick.append(layer)
                assert (expected - view.head(A, rest)[i]).abs().amax(1).min() > 1e-4
    special = kind not in ("norm of queries", "average")
    assert set(quick) == ({classifier.layer} if special else set())


@pytest.mark.parametrize("kind", TOLD)
def test_without_a_channel_where_no_matrix_of_rank_one_helps(kind: str) -> None:
    """Positions and separate weights are not left out: the head itself is run."""
    classifier, images = classifier_of(kind), make_images(1)
    assert isinstance(classifier.transformer, Transformer)
    A, rest = classifier.split(images)
    without = A.clone()
    without[:, 7] = 0
    logits = ablation(classifier, A, rest)(torch.tensor([7]))
    torch.testing.assert_close(logits, classifier.head(without, rest), rtol=1e-4, atol=1e-4)


def test_a_forward_of_its_own_is_not_taken_for_the_standard_one() -> None:
    """The parts are those of a transformer, but they are put together otherwise."""

    class Twice(type(timm_vit())):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    torch.manual_seed(0)
    network = Twice(**SMALL, num_classes=5)
    classifier = ol.Classifier(network, size=32, device="cpu")
    assert "its forward pass is not that of a standard transformer" in classifier.transformer
    assert not isinstance(classifier.transformer, Transformer)
    images = make_images(2)
    expected = classifier.logits(images)
    torch.testing.assert_close(classifier.quick("float32").logits(images), expected)
    A, rest = classifier.split(images)
    torch.testing.assert_close(
        ablation(classifier, A[:1] * 0, rest.repeat(0, 1))(torch.tensor([3])),
        classifier.head(A[:1] * 0, rest.repeat(0, 1)),
    )
