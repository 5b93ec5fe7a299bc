"""What the tests of CAM methods share: formulas, networks, the `grad-cam` package's masks."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from conftest import make_classifier, make_images, peer
from torch import Tensor, nn

import opticam_lite as ol

Reference = Callable[[ol.Classifier, Tensor, int], Tensor]


def up(S: Tensor, size: tuple[int, int]) -> Tensor:
    return nn.functional.interpolate(S[None, None], size, mode="bilinear")[0, 0]


def n_range(A: Tensor) -> Tensor:  # eq. 16
    return (A - A.min()) / (A.max() - A.min()) if A.max() > A.min() else torch.zeros_like(A)


def mask(S: Tensor, size: torch.Size) -> Tensor:
    """n(up(S)) of one map `(h, w)`."""
    return n_range(up(S.float(), tuple(size[-2:])))


def maps_and_gradients(classifier: ol.Classifier, x: Tensor, c: int) -> tuple[Tensor, Tensor]:
    """A and g = ∂y_c/∂A of one image, each `(K, h, w)`, float64."""
    A, rest = classifier.split(x[None])
    A = A.detach().requires_grad_()
    classifier.head(A, rest)[0, c].backward()
    return A.detach()[0].double(), A.grad[0].double()


def assert_equals_reference(
    method: str,
    reference: Reference,
    classifier: ol.Classifier,
    images: Tensor,
    targets: Tensor,
    **options: object,
) -> None:
    """The method's masks are n(up(S)) of the reference's maps S, image by image."""
    masks = ol.explain(method, classifier, images, targets, **options)
    for x, c, actual in zip(images, targets.tolist(), masks, strict=True):
        expected = mask(reference(classifier, x, c), x.shape)
        torch.testing.assert_close(actual[0], expected, rtol=0, atol=2e-3)
    assert masks.any()


def resnet() -> nn.Module:
    torch.manual_seed(3)
    return timm.models.resnet.ResNet(
        timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=5, channels=(8, 8, 12, 12),
        zero_init_last=False,
    )  # fmt: skip


def swin() -> nn.Module:
    torch.manual_seed(4)
    return timm.models.swin_transformer.SwinTransformer(
        img_size=64, patch_size=2, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(1, 2),
        num_classes=5,
    )  # fmt: skip


def assert_equals_reference_on_other_networks(
    method: str, reference: Reference, targets: Tensor
) -> None:
    """Inside a residual block, and where a window shifts tokens in four dimensions."""
    for build, layer in ((resnet, "layer2.0.act1"), (swin, "layers.0.blocks.1.norm1")):
        classifier = ol.Classifier(build(), layer, size=64, device="cpu")
        assert_equals_reference(method, reference, classifier, make_images(3, 64, 64), targets)


def two_halves() -> tuple[Tensor, Tensor]:
    """An image that is bright on the left in red, on the right in green, all over in blue."""
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    return torch.stack([left, 1 - left, torch.full((8, 8), 0.5)])[None], left


def linear_network(to_maps: list[list[float]], to_logits: Tensor, grid: int) -> ol.Classifier:
    """Maps that are mixtures of the colours, pooling to a grid, one linear layer."""
    conv = nn.Conv2d(3, len(to_maps), 1, bias=False)
    linear = nn.Linear(len(to_maps) * grid**2, len(to_logits), bias=False)
    network = nn.Sequential(conv, nn.AdaptiveAvgPool2d(grid), nn.Flatten(), linear)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor(to_maps)[:, :, None, None])
        linear.weight.copy_(to_logits)
    return ol.Classifier(network, "0", size=8, device="cpu")


def package_masks(name: str, classifier: ol.Classifier, images: Tensor, targets: Tensor) -> Tensor:
    """The output of a class of the `grad-cam` package, from beginning to end."""
    layer = classifier.network.get_submodule(classifier.layer)
    output = peer("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget
    chosen = [output(c) for c in targets.tolist()]
    method = getattr(peer("pytorch_grad_cam"), name)
    with method(classifier.network, [layer]) as cam, torch.enable_grad():
        masks = cam(((images - 0.5) / 0.25).requires_grad_(), chosen)
    return torch.from_numpy(masks)[:, None]


def assert_equals_package(
    method: str, name: str, kind: str, images: Tensor, targets: Tensor
) -> None:
    """It too takes the relu of the sum; its constants of 1e-7 play no part in maps of this size."""
    classifier = make_classifier(kind)
    masks = ol.explain(method, classifier, images, targets)
    expected = package_masks(name, classifier, images, targets)
    torch.testing.assert_close(masks, expected, rtol=0, atol=1e-3)
    assert masks.any()
