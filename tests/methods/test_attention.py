"""What holds of raw attention, rollout and TIBAV alike: many transformers, and what is none."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from conftest import make_classifier
from slow_transformer import build, classifier_of
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn
from torchvision.models import VisionTransformer as TorchvisionTransformer

import opticam_lite as ol
from opticam_lite.methods.attention import attentions_of, need_transformer, to_map

METHODS = ("raw-attention", "rollout", "tibav")


def test_only_tibav_knows_the_class(images: Tensor) -> None:
    classifier = classifier_of(build())
    for method in METHODS:
        first, second = (ol.explain(method, classifier, images, c) for c in (0, 1))
        assert ((first - second).abs().max() < 1e-6) == (method != "tibav")


@pytest.mark.parametrize("method", METHODS)
def test_where_the_network_is_cut_does_not_matter(method: str, images: Tensor) -> None:
    classifier = classifier_of(build())
    here, there = (
        ol.explain(method, classifier.at(layer), images, 1)
        for layer in ("blocks.0.mlp.fc1", "blocks.1.norm1")
    )
    assert torch.equal(here, there)


@pytest.mark.parametrize("method", METHODS)
def test_fused_attention_or_not(method: str, images: Tensor) -> None:
    network = build()
    masks = []
    for fused in (True, False):
        for block in network.blocks:
            block.attn.fused_attn = fused
        masks.append(ol.explain(method, classifier_of(network), images, 1))
    assert torch.equal(*masks)


def test_uniform_patches_give_zeros() -> None:
    """A flat image without positions: every patch is like any other, and no mask comes of it."""
    network = build()
    network.pos_embed.data.zero_()
    flat = torch.full((1, 3, 32, 32), 0.3)
    for method in METHODS:
        assert not ol.explain(method, classifier_of(network), flat, 1).any()


# ----------------------------------------------------------------------------------- many networks


def torchvision_twin(network: nn.Module) -> nn.Module:
    """A torchvision transformer with the weights of a timm one."""
    twin = build(TorchvisionTransformer)
    names = {
        "cls_token": "class_token",
        "pos_embed": "encoder.pos_embedding",
        "patch_embed.proj": "conv_proj",
        "attn.qkv.": "self_attention.in_proj_",
        "attn.proj": "self_attention.out_proj",
        "norm1": "ln_1",
        "norm2": "ln_2",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.3",
        "blocks.": "encoder.layers.encoder_layer_",
    }
    state = {}
    for k, v in network.state_dict().items():
        for ours, theirs in names.items():
            k = k.replace(ours, theirs)
        k = "encoder.ln" + k.removeprefix("norm") if k.startswith("norm") else k
        state["heads." + k if k.startswith("head.") else k] = v
    twin.load_state_dict(state)
    return twin.eval()


@pytest.mark.parametrize("method", METHODS)
def test_torchvision_and_timm_agree(method: str, images: Tensor, targets: Tensor) -> None:
    network = build(norm_layer=partial(nn.LayerNorm, eps=1e-6))
    ours, twin = classifier_of(network), classifier_of(torchvision_twin(network))
    torch.testing.assert_close(ours.logits(images), twin.logits(images))
    torch.testing.assert_close(
        ol.explain(method, twin, images, targets),
        ol.explain(method, ours, images, targets),
        rtol=0,
        atol=1e-4,
    )


VARIANTS = {
    "distilled": lambda: build(VisionTransformerDistilled),
    "registers": lambda: build(reg_tokens=3),
    "positions without class token": lambda: build(no_embed_class=True, init_values=0.1),
    "norms of queries and keys": lambda: build(qk_norm=True),
    "norms inside": lambda: build(scale_attn_norm=True, scale_mlp_norm=True),
    "norm in front": lambda: build(pre_norm=True, fc_norm=True),
    "any image size": lambda: build(dynamic_img_size=True),
    "torchvision's hidden head": lambda: build(TorchvisionTransformer, representation_size=7),
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_kinds_of_transformers(kind: str, images: Tensor, targets: Tensor) -> None:
    """The walk gives the network's logits, and the maps are alive and of the grid's shape."""
    classifier = classifier_of(VARIANTS[kind]())
    logits, P = need_transformer("", classifier)((images - 0.5) / 0.5)
    torch.testing.assert_close(logits, classifier.logits(images))
    tokens = {"distilled": 18, "registers": 20}.get(kind, 17)
    for P_b in P:
        assert P_b.shape == (3, 2, tokens, tokens)
        torch.testing.assert_close(P_b.sum(-1), torch.ones(3, 2, tokens))
    for method in METHODS:
        assert ol.methods.applicable(classifier)[method] is None
        masks = ol.explain(method, classifier, images, targets)
        assert (masks.amax((1, 2, 3)) == 1).all()
        S = nn.functional.interpolate(masks, (4, 4), mode="area")
        assert (S.flatten(1).std(1) > 0.01).all()


def test_embedded_transformer(images: Tensor) -> None:
    """Its patches come from a stem of convolutions."""
    classifier = ol.load_model("scenes_vit", device="cpu")
    scenes, targets = ol.load_dataset("scenes").batch(range(2))
    for method in METHODS:
        masks = ol.explain(method, classifier, scenes, targets)
        assert masks.shape == (2, 1, 224, 224)
        assert (masks.amax((1, 2, 3)) == 1).all()


# ------------------------------------------------------------------------------------------ errors


class Doubled(VisionTransformer):
    """Looks like a standard transformer and is none."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


UNFIT = {
    "it is a Sequential, not a vision transformer": lambda: make_classifier("cnn").network,
    "it has no class token": lambda: build(class_token=False, global_pool="avg"),
    r"its head pools all tokens \('avg'\)": lambda: build(global_pool="avg"),
    r"its head pools all tokens \('map'\)": lambda: build(global_pool="map"),
    r"not standard ones \(ParallelScalingBlock\)": lambda: build(block_fn=ParallelScalingBlock),
    r"not standard ones \(DiffAttention\)": lambda: build(attn_layer="diff"),
    "its blocks one by one give other logits": lambda: build(Doubled),
    "it is a SwinTransformer": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224",
        embed_dim=12,
        depths=(1, 1),
        num_heads=(1, 1),
        img_size=32,
        window_size=2,
        num_classes=5,
    ),
}


@pytest.mark.parametrize("reason", UNFIT)
def test_networks_that_do_not_fit(reason: str, images: Tensor) -> None:
    classifier = classifier_of(UNFIT[reason]())
    for method in METHODS:
        assert ol.methods.applicable(classifier)[method] is not None
        message = rf"^{method} needs a vision transformer .*{reason}.*grad-cam and opti-cam"
        with pytest.raises(ValueError, match=message):
            ol.methods.METHODS[method].function(classifier, images, torch.zeros(3).long())


def test_attentions_of_three_blocks(images: Tensor) -> None:
    """Each block's, in their order; with two, the second would be the last but also the next."""
    parts = need_transformer("", classifier_of(build(depth=3)))
    x = (images - 0.5) / 0.5
    expected = [P.mean(1) for P in parts(x)[1]]
    assert not torch.allclose(expected[1], expected[2], atol=1e-3)
    torch.testing.assert_close(attentions_of(parts, x), expected)
    torch.testing.assert_close(attentions_of(parts, x, last_only=True), expected[2:])


def test_the_grid_has_the_shape_of_the_image() -> None:
    row = torch.arange(18.0).view(2, 9)
    found = to_map(row, 1, (32, 64))
    assert torch.equal(found, row[:, 1:].view(2, 1, 2, 4))


def test_patches_without_a_grid() -> None:
    with pytest.raises(ValueError, match="7 patches do not form a grid"):
        to_map(torch.rand(2, 8), 1, (32, 32))
