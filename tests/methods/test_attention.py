"""What holds of raw attention, rollout and TIBAV alike: many transformers, and what is none."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from conftest import make_classifier
from slow_transformer import build, classifier_of
from timm.layers import Attention
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ResPostBlock,
    VisionTransformer,
)
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
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
    "mean of the patches": lambda: build(global_pool="avg"),
    "no class token": lambda: build(global_pool="avg", class_token=False),
    "norms after": lambda: build(block_fn=ResPostBlock),
    "torchvision's hidden head": lambda: build(TorchvisionTransformer, representation_size=7),
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_kinds_of_transformers(kind: str, images: Tensor, targets: Tensor) -> None:
    """The walk gives the network's logits, and the maps are alive and of the grid's shape."""
    classifier = classifier_of(VARIANTS[kind]())
    logits, P = need_transformer("", classifier)((images - 0.5) / 0.5)
    torch.testing.assert_close(logits, classifier.logits(images))
    tokens = {"distilled": 18, "registers": 20, "no class token": 16}.get(kind, 17)
    for P_b in P:
        assert P_b.shape == (3, 2, tokens, tokens)
        torch.testing.assert_close(P_b.sum(-1), torch.ones(3, 2, tokens))
    pooled = kind in ("mean of the patches", "no class token")
    assert ("the mean of the patches" in str(ol.methods.applicable(classifier)["tibav"])) == pooled
    for method in METHODS[:2] if pooled else METHODS:
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


ROTARY = {"use_rot_pos_emb": True, "no_embed_class": True}
DINOV3 = ROTARY | {
    "rope_type": "dinov3", "rope_rotate_half": True, "num_reg_tokens": 4, "init_values": 0.1,
    "use_abs_pos_emb": False, "qkv_bias": False, "dynamic_img_size": True,
}  # fmt: skip
# How timm builds them, and what TIBAV has no rule for.
FAMILIES = {
    "BEiT": (
        lambda: build(Beit, use_rel_pos_bias=True, init_values=0.1),
        "the mean of the patches",
    ),
    "BEiT, class token": (
        lambda: build(Beit, use_rel_pos_bias=True, init_values=0.1, global_pool="token"),
        None,
    ),
    "BEiT, shared positions": (
        lambda: build(Beit, use_shared_rel_pos_bias=True, global_pool="token"),
        None,
    ),
    "EVA": (lambda: build(Eva, global_pool="token"), None),
    "EVA-02": (
        lambda: build(
            Eva, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True, **ROTARY
        ),
        "the mean of the patches",
    ),
    "EVA, gated MLP": (
        lambda: build(Eva, swiglu_mlp=True, global_pool="token"),
        "its MLP (GluMlp)",
    ),
    "EVA-02, norms after": (lambda: build(Eva, use_post_norm=True, global_pool="token"), None),
    "DINOv3": (lambda: build(Eva, **DINOV3), "the mean of the patches"),
    "DINOv3's class token": (
        lambda: build(Eva, global_pool="token", **DINOV3),
        "rotary position embedding",
    ),
    "mixed rotary": (
        lambda: build(Eva, rope_type="mixed", attn_type="rope", global_pool="token", **ROTARY),
        "rotary position embedding",
    ),
    "grouped queries": (
        lambda: build(
            Eva,
            num_heads=4,
            num_kv_heads=2,
            attn_type="rope",
            qkv_fused=False,
            qk_norm=True,
            **ROTARY,
        ),
        "the mean of the patches",
    ),
    "relative positions": (
        lambda: build(VisionTransformerRelPos, class_token=True, global_pool="token"),
        None,
    ),
    "relative positions, shared, norms after": (
        lambda: build(
            VisionTransformerRelPos,
            block_fn=ResPostRelPosBlock,
            rel_pos_type="bias",
            shared_rel_pos=True,
        ),
        "the mean of the patches",
    ),
}


def attention_of(network: nn.Module, x: Tensor) -> list[Tensor]:
    """What the network's own blocks give to the dropout after their softmax: P of each block."""
    found: list[Tensor] = []
    hooks = []
    for block in network.blocks:
        block.attn.fused_attn = False
        hooks.append(block.attn.attn_drop.register_forward_pre_hook(lambda _, P: found.append(*P)))
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_attention_is_that_of_the_network(family: str, images: Tensor, targets: Tensor) -> None:
    make, no_rule = FAMILIES[family]
    network = make()
    classifier = classifier_of(network)
    parts = need_transformer("", classifier)
    logits, _ = parts((images - 0.5) / 0.5)
    torch.testing.assert_close(logits, classifier.logits(images), rtol=1e-4, atol=1e-5)

    prefix = network.num_prefix_tokens
    P = [P_b.mean(1) for P_b in attention_of(network, (images - 0.5) / 0.5)]
    product = torch.eye(P[0].shape[-1])
    for P_b in P:
        product = (P_b + torch.eye(P_b.shape[-1])) / 2 @ product
    for method, S in (("raw-attention", P[-1]), ("rollout", product)):
        rows = S[:, prefix:] if network.global_pool == "avg" else S[:, :1]
        S = rows.mean(1)[:, prefix:].view(3, 1, 4, 4)
        masks = ol.explain(method, classifier, images, targets)
        torch.testing.assert_close(masks, ol.to_masks(S, (32, 32)), rtol=0, atol=1e-3)
        assert (masks.amax((1, 2, 3)) == 1).all()

    reason = ol.methods.applicable(classifier)["tibav"]
    assert (reason is None) == (no_rule is None)
    assert (no_rule or "") in (reason or "")
    if no_rule is None:
        masks = ol.explain("tibav", classifier, images, targets)
        assert (masks.amax((1, 2, 3)) == 1).all()


def test_positions_follow_the_size_of_the_images() -> None:
    """A DINOv3 takes images of other sizes, and its rotary embedding is that of their patches."""
    network = build(Eva, **DINOV3)
    classifier, wide = classifier_of(network), torch.rand(2, 3, 32, 64)
    P = attention_of(network, (wide - 0.5) / 0.5)[-1].mean(1)
    expected = ol.to_masks(P[:, 5:, 5:].mean(1).view(2, 1, 4, 8), (32, 64))
    masks = ol.explain("raw-attention", classifier, wide, 0)
    torch.testing.assert_close(masks, expected, rtol=0, atol=1e-3)


# ------------------------------------------------------------------------------------------ errors


class Doubled(VisionTransformer):
    """Looks like a standard transformer and is none."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Unusual(VisionTransformer):
    """The name of one of its parts is not that part's."""

    def _pos_embed(self, x: Tensor, scale: float) -> Tensor:
        return scale * super()._pos_embed(x)

    def forward_features(self, x: Tensor, **_: object) -> Tensor:
        return self.norm(self.blocks(self._pos_embed(self.patch_embed(x), 2.0)))


class Gated(Attention):
    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, gated=True, **options)


UNFIT = {
    "it is a Sequential, and attention is read from timm's": lambda: make_classifier("cnn").network,
    r"its head pools all tokens \('avgmax'\)": lambda: build(global_pool="avgmax"),
    r"not standard ones \(gated attention\)": lambda: build(attn_layer=Gated),
    "put together as those of a standard transformer, fail": lambda: build(Unusual),
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
