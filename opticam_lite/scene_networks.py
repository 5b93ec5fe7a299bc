"""The small networks that the kit ships: trained on scenes, built from timm's own classes.

Each has the layer at which it is explained by default (the paper, Appendix A: the last block of a
ResNet, the relu before the last max pooling of a VGG, the first norm of the last block of a ViT).
:mod:`opticam_lite.making.training` trains them; ``data/networks/<name>.safetensors`` keeps their
weights.
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

from .datasets.scenes import CLASSES


@dataclass(frozen=True)
class SceneNetwork:
    """How a network is built for a number of classes, and its default layer."""

    builder: Callable[[int], nn.Module]
    layer: str


def _resnet(num_classes: int) -> nn.Module:
    # A stem of three narrow 3x3 convolutions: timm's plain 7x7 stem of 64 channels would cost half
    # as much as the rest of the network.
    return ResNet(
        BasicBlock,
        (1, 1, 2, 2),
        num_classes=num_classes,
        channels=(24, 48, 96, 160),
        stem_type="deep_tiered",
        stem_width=12,
    )


def _vgg(num_classes: int) -> nn.Module:
    # VGG's dense layers would have more parameters than all its convolutions: a small ratio narrows
    # the first of them (a 7x7 convolution in timm) to 80 channels.
    return VGG(
        [16, "M", 32, "M", 64, "M", 96, "M", 128, 128, "M"],
        num_classes=num_classes,
        mlp_ratio=80 / 4096,
        norm_layer=nn.BatchNorm2d,
        drop_rate=0.2,
    )


def _vit(num_classes: int) -> nn.Module:
    # A linear patch embedding learns too slowly from a few thousand images. Four 3x3 convolutions
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


NETWORKS: dict[str, SceneNetwork] = {
    "scenes_resnet": SceneNetwork(_resnet, "layer4.1"),
    "scenes_vgg": SceneNetwork(_vgg, "features.21"),
    "scenes_vit": SceneNetwork(_vit, "blocks.3.norm1"),
    # A Clever Hans: trained where the environment nearly determines the class, it uses only that.
    "scenes_shortcut": SceneNetwork(_resnet, "layer4.1"),
    # It has memorised permuted labels of the evaluation scenes: no object explains what it says.
    "scenes_random_labels": SceneNetwork(_resnet, "layer4.1"),
}


def build(name: str, num_classes: int = len(CLASSES)) -> nn.Module:
    """Build a network with random weights, in evaluation mode.

    Raises ``KeyError`` for an unknown name.
    """
    if name not in NETWORKS:
        raise KeyError(f"no embedded network is called {name!r}; there are {', '.join(NETWORKS)}")
    return NETWORKS[name].builder(num_classes).eval()


def load(name: str, path: str | Path) -> nn.Module:
    """Build a network and fill it with the weights of the safetensors file at ``path``.

    The file is in half precision; the network computes in float32, in evaluation mode.
    """
    network = build(name)
    state = load_file(str(path))
    network.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    )
    return network.requires_grad_(False)
