"""Ablation-CAM against a slow reference and the `grad-cam` package, on networks of many shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from conftest import make_classifier, make_images, peer
from references import (
    assert_equals_package,
    assert_equals_reference,
    linear_network,
    mask,
    package_masks,
    resnet,
    swin,
    two_halves,
)
from torch import Tensor, nn

import opticam_lite as ol
from opticam_lite.methods import METHODS


def logit_without(classifier: ol.Classifier, x: Tensor, c: int, k: int | None) -> Tensor:
    """y_c of the whole network, run from the image on, with channel k of the layer set to 0."""
    layout = classifier.feature_layout

    def remove(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        output = output.clone()
        if layout.kind == "NCHW":
            output[:, k] = 0
        else:  # the class token is set aside: only the tokens of the grid make a map
            output[:, layout.prefix if layout.kind == "tokens" else 0 :, ..., k] = 0
        return output

    module = classifier.network.get_submodule(classifier.layer)
    hook = module.register_forward_hook(remove) if k is not None else None
    try:
        return classifier.logits(x[None])[0, c]
    finally:
        if hook is not None:
            hook.remove()


@torch.no_grad()
def reference_ablation_cam(classifier: ol.Classifier, x: Tensor, c: int) -> Tensor:
    A = classifier.features(x[None])[0]
    y = logit_without(classifier, x, c, None)
    S = torch.zeros(A.shape[1:])
    for k in range(len(A)):
        S += (y - logit_without(classifier, x, c, k)) / y * A[k]
    return S.relu()


def test_equals_its_slow_reference(
    classifier: ol.Classifier, images: Tensor, targets: Tensor
) -> None:
    assert_equals_reference("ablation-cam", reference_ablation_cam, classifier, images, targets)


def squeezenet() -> nn.Module:
    torch.manual_seed(5)
    return torchvision.models.squeezenet1_1(num_classes=5)


def pointwise(**options: int) -> nn.Module:
    """Ends like SqueezeNet: a 1×1 convolution to the classes, relu, pooling."""
    torch.manual_seed(6)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4),
        nn.ReLU(),
        nn.Dropout(),
        nn.Conv2d(8, 5, **{"kernel_size": 1, **options}),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 5),
    )


WHERE = {
    "inside a residual block": (resnet, "layer2.0.act1"),
    "before a residual sum": (resnet, "layer2.0.bn2"),
    "tokens in four dimensions": (swin, "layers.0.blocks.0.norm1"),
    "a window's shift": (swin, "layers.0.blocks.1.norm1"),
    "before a 1×1 convolution": (pointwise, "1"),
    "before two convolutions": (squeezenet, "features.3.squeeze_activation"),
}


@pytest.mark.parametrize("where", WHERE)
def test_on_other_networks(where: str, targets: Tensor) -> None:
    """The rest of each image (residual branch, class token) goes with it into the head's chunks."""
    build, layer = WHERE[where]
    classifier = ol.Classifier(build(), layer, size=64, device="cpu")
    images = make_images(3, 64, 64)
    assert_equals_reference(
        "ablation-cam", reference_ablation_cam, classifier, images, targets, chunk=7
    )


def test_where_the_head_begins_with_an_attention(targets: Tensor) -> None:
    classifier = ol.load_model("scenes_vit", device="cpu")
    images, targets = ol.load_dataset("scenes").batch(range(2))
    assert_equals_reference("ablation-cam", reference_ablation_cam, classifier, images, targets)
    steps: list[ol.methods.Step] = []
    for chunk, n in ((128, 2), (50, 6)):  # 128 channels
        steps.clear()
        ol.explain("ablation-cam", classifier, images, targets, chunk=chunk, callback=steps.append)
        assert [(s.index, s.total) for s in steps] == [(i, n) for i in range(1, n + 1)]


def test_where_the_head_begins_with_a_pointwise_convolution() -> None:
    def reader(network: nn.Module, layer: str) -> str | None:
        return ol.Classifier(network, layer, size=64).pointwise_reader

    assert reader(squeezenet(), "features.12") == "classifier.1"
    assert reader(squeezenet(), "features.3.squeeze_activation") is None  # two layers read it
    assert reader(resnet(), "layer2.0.act1") is None  # 3×3
    assert reader(pointwise(), "1") == "3"  # behind a dropout
    for options in ({"kernel_size": 3}, {"stride": 2}, {"padding": 1}):
        assert reader(pointwise(**options), "1") is None
    assert make_classifier("cnn").pointwise_reader is None


def test_of_a_negative_and_of_no_logit() -> None:
    image, left = two_halves()
    weights = torch.tensor([[1.0, -1], [-1, -2], [1, 2]])  # logits 0, −1.5, 1.5
    classifier = linear_network([[1, 0, 0], [0, 1, 0]], weights, grid=1)
    assert classifier.logits(image).tolist() == [[0, -1.5, 1.5]]
    zero, negative, positive = ol.explain(
        "ablation-cam", classifier, image.expand(3, -1, -1, -1), [0, 1, 2]
    )
    torch.testing.assert_close(zero[0], left)  # (0 − −½) A_0 + (0 − ½) A_1: where A_0 is
    # A quotient of negative numbers is positive: what makes a logit more negative counts.
    torch.testing.assert_close(negative[0], 1 - left)
    torch.testing.assert_close(positive[0], 1 - left)


def test_no_rounding_is_taken_for_a_weight() -> None:
    """Behind the last attention the patches' tokens reach no logit."""
    classifier = ol.load_model("scenes_vit", device="cpu").at("blocks.3")
    images, targets = ol.load_dataset("scenes").batch(range(8))
    assert targets is not None
    with torch.no_grad():
        assert not METHODS["ablation-cam"].function(classifier, images, targets).any()


@pytest.mark.parametrize(("change", "counts"), [(5e-7, False), (5e-6, True)])
def test_what_counts_as_rounding(
    change: float, counts: bool, images: Tensor, targets: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of the logit by less than a millionth of the largest."""

    def ablation(classifier: ol.Classifier, maps: Tensor, rest: Any) -> Callable[[Tensor], Tensor]:
        y = classifier.head(maps, rest)
        largest = y.abs().amax()
        return lambda k: y - change * largest * (k[:, None] % 2)

    monkeypatch.setattr("opticam_lite.methods.ablation_cam.ablation", ablation)
    with torch.no_grad():
        found = METHODS["ablation-cam"].function(make_classifier("cnn"), images, targets)
    assert bool(found.any()) == counts


class Branched(nn.Module):
    """A parallel branch runs between the layer and the 1×1 convolution that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer = nn.Conv2d(3, 8, 3, 4), nn.Conv2d(8, 8, 3, padding=1)
        self.branch, self.point = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a, b = self.layer(x), self.branch(x)
        return self.fc((b.relu() + self.point(a)).relu().mean((2, 3)))


def test_beside_a_parallel_branch() -> None:
    torch.manual_seed(0)
    classifier = ol.Classifier(Branched(), "layer", size=32, device="cpu")
    x, c = make_images(1), 2
    A, rest = classifier.split(x)
    y = classifier.head(A, rest)[0, c]
    S = torch.zeros(A.shape[2:])
    for k in range(A.shape[1]):
        without = A.clone()
        without[:, k] = 0
        S += (y - classifier.head(without, rest)[0, c]) / y * A[0, k]
    found = ol.explain("ablation-cam", classifier, x, c)[0, 0]
    torch.testing.assert_close(found, mask(S.relu(), x.shape), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["cnn", "dense"])
def test_parity_with_the_package(kind: str, images: Tensor, targets: Tensor) -> None:
    assert_equals_package("ablation-cam", "AblationCAM", kind, images, targets)


def test_the_package_s_ablation_is_another_where_maps_have_no_zero(
    images: Tensor, targets: Tensor
) -> None:
    """It then fills with the least value − 1e7, which moves down from channel to channel."""
    classifier = make_classifier("cnn").at("3")  # before the relu
    A = classifier.features(images)
    assert A.min() < 0
    masks = ol.explain("ablation-cam", classifier, images, targets)
    theirs = package_masks("AblationCAM", classifier, images, targets)
    assert not torch.allclose(masks, theirs, atol=0.1)
    layer = peer("pytorch_grad_cam").ablation_layer.AblationLayer()
    layer.indices = np.arange(3)
    layer.set_next_batch(0, A, 3)
    filled = layer(None)
    assert [filled[k, k].max().item() for k in range(3)] == pytest.approx([-1e7, -2e7, -3e7])
