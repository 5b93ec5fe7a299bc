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

import torch
from safetensors.torch import load_file
from timm.layers import HybridEmbed
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vgg import VGG
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn

NUM_CLASSES = 8
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
VGG_LAYOUT = (16, "M", 32, "M", 64, "M", 96, "M", 128, 128, "M")


@dataclass(frozen=True)
class Embedded:
    """What is known of an embedded network before its weights are read."""

    name: str
    description: str
    layer: str
    builder: Callable[[int], nn.Module]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


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
        Embedded(
            "scenes_resnet",
            "ResNet of basic blocks: sees the object and its environment.",
            "layer4.1",
            _resnet,
        ),
        Embedded(
            "scenes_vgg",
            "VGG with batch norm: sees the object and its environment.",
            "features.21",
            _vgg,
        ),
        Embedded(
            "scenes_vit",
            "ViT of patch 16: sees the object and its environment.",
            "blocks.3.norm1",
            _vit,
        ),
        Embedded(
            "scenes_shortcut",
            "Twin of scenes_resnet trained where the environment gives the class away: "
            "a Clever Hans that looks at the environment only.",
            "layer4.1",
            _resnet,
        ),
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


def parameters_of(network: nn.Module) -> int:
    """Number of trainable values of a network."""
    return sum(p.numel() for p in network.parameters())


def macs_of(network: nn.Module, size: int = 224) -> int:
    """Multiply-accumulates of one ``(1, 3, size, size)`` image, in convolutions and products."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() // 2
