"""The recipe of docs/own_networks.md for networks of Hugging Face, with small ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_images
from torch import Tensor, nn

import opticam_lite as ol

pytestmark = pytest.mark.slow

DOCUMENT = Path(__file__).parents[2] / "docs" / "own_networks.md"
SIZE = 64
LABELS = {0: "cat", 1: "dog", 2: "hen", 3: "cow", 4: "emu"}


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        image_size=SIZE, patch_size=16, id2label=LABELS,
    )  # fmt: skip
    return ViTForImageClassification(config)


def swin() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=SIZE, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[2, 2],
        window_size=4, id2label=LABELS,
    )  # fmt: skip
    return SwinForImageClassification(config)


# The network, its default layer, the shape of its maps, and how many tokens are before theirs.
NETWORKS = {
    "ViT": (vit, "vit.layers.1.layernorm_before", (48, 4, 4), 1),
    "Swin": (swin, "swin.layernorm", (24, 8, 8), 0),
}


def recipe() -> str:
    section = DOCUMENT.read_text(encoding="utf-8").partition("## Networks of Hugging Face\n")[2]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


def grad_cam_by_hooks(
    network: nn.Module, layer: str, prefix: int, x: Tensor, targets: Tensor
) -> Tensor:
    """Grad-CAM of a network that is run whole, with its layer's output kept by a hook."""
    kept: list[Tensor] = []
    hook = network.get_submodule(layer).register_forward_hook(lambda *run: kept.append(run[2]))
    logits = network(x.clone().requires_grad_()).logits
    hook.remove()
    (g,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), kept[0])
    A, g = kept[0][:, prefix:].detach(), g[:, prefix:]  # (N, tokens, K)
    S = (A * g.mean(1, keepdim=True)).sum(2).relu()
    side = round(S.shape[1] ** 0.5)
    return ol.to_masks(S.view(-1, 1, side, side), x.shape[2:])


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_recipe(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForImageClassification

    make, layer, shape, prefix = NETWORKS[kind]
    torch.manual_seed(0)
    network = make().eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, 0.5 * (parameter.ndim == 1), 0.2)
    monkeypatch.setattr(AutoModelForImageClassification, "from_pretrained", lambda name: network)
    images = make_images(3, SIZE, SIZE)
    names: dict[str, Any] = {"ol": ol, "images": images}
    exec(recipe(), names)
    classifier: ol.Classifier = names["classifier"]

    assert classifier.labels == list(LABELS.values())
    assert (classifier.layer, classifier.layer_shape()) == (layer, shape)
    x, targets = (images - 0.5) / 0.5, classifier.predict(images)
    with torch.no_grad():
        expected = network(x).logits
    logits = classifier.logits(images)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(classifier.head(*classifier.split(images)).to(images), logits)
    masks = grad_cam_by_hooks(network, layer, prefix, x, targets)
    torch.testing.assert_close(names["masks"], masks, rtol=0, atol=1e-3)
    assert (masks.amax((1, 2, 3)) == 1).any()

    found = ol.explain("opti-cam", classifier, images, targets, iterations=10)
    assert found.shape == (3, 1, SIZE, SIZE)
    assert (found.amax((1, 2, 3)) == 1).all()
    hooks = [m for m in classifier.network.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks
    with pytest.raises(ValueError, match="attention is read from timm's VisionTransformer"):
        ol.explain("rollout", classifier, images)
