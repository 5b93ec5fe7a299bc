"""The embedded networks: small relatives of the paper's, built from timm's own classes.

Each knows the layer at which it is explained by default (the paper, Appendix A: the last block of a
ResNet, the relu before the last max pooling of a VGG, the first norm of the last block of a ViT).
Their weights are trained by :mod:`opticam_lite.training` on rendered scenes and kept in
``data/networks/<name>.safetensors``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors.torch import load_file
from timm.layers import HybridEmbed
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vgg import VGG
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn

NUM_CLASSES = 8
VGG_LAYOUT = (16, "M", 32, "M", 64, "M", 96, "M", 128, 128, "M")


@dataclass(frozen=True)
class Embedded:
    """What is known of an embedded network before its weights are read."""

    name: str
    layer: str
    builder: Callable[[int], nn.Module]


def _resnet(num_classes: int) -> nn.Module:
    # A stem of three narrow 3x3 convolutions: timm's plain 7x7 stem of 64 channels would alone cost
    # as much as half of the rest.
    return ResNet(
        BasicBlock,
        (1, 1, 2, 2),
        num_classes=num_classes,
        channels=(24, 48, 96, 160),
        stem_type="deep_tiered",
        stem_width=12,
    )


def _vgg(num_classes: int) -> nn.Module:
    # VGG's dense layers would outweigh all its convolutions: a small ratio narrows the first of
    # them (a 7x7 convolution in timm) to 80 channels.
    return VGG(
        list(VGG_LAYOUT),
        num_classes=num_classes,
        mlp_ratio=80 / 4096,
        norm_layer=nn.BatchNorm2d,
        drop_rate=0.2,
    )


def _vit(num_classes: int) -> nn.Module:
    # A plain patch embedding learns too slowly from a few thousand pictures. Four 3x3 convolutions
    # of stride 2 in its place also make one token of 16x16 pixels.
    stem = ConvStem(
        depth=4, channels=(16, 32, 64, 128), kernel_size=3, stride=(2, 2, 2, 2), act_layer=nn.ReLU
    )
    return VisionTransformer(
        img_size=224,
        patch_size=1,
        embed_layer=partial(HybridEmbed, backbone=stem, proj=False),
        embed_dim=128,
        depth=4,
        num_heads=4,
        num_classes=num_classes,
    )


EMBEDDED: dict[str, Embedded] = {
    e.name: e
    for e in (
        Embedded("scenes_resnet", "layer4.1", _resnet),
        Embedded("scenes_vgg", "features.21", _vgg),
        Embedded("scenes_vit", "blocks.3.norm1", _vit),
        # A Clever Hans: trained where the environment gives the class away, it looks at that alone.
        Embedded("scenes_shortcut", "layer4.1", _resnet),
    )
}


def build(name: str, num_classes: int = NUM_CLASSES) -> nn.Module:
    """Build an embedded network with random weights, in evaluation mode.

    Raises ``KeyError`` for an unknown name.
    """
    if name not in EMBEDDED:
        raise KeyError(f"no embedded network is called {name!r}; there are {', '.join(EMBEDDED)}")
    return EMBEDDED[name].builder(num_classes).eval()


def load(name: str, path: str | Path) -> nn.Module:
    """Build an embedded network and fill it with the weights of the safetensors file at ``path``.

    The file keeps half precision; the network computes in float32. Evaluation mode.
    """
    network = build(name)
    state = load_file(str(path))
    network.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    )
    return network.requires_grad_(False)
