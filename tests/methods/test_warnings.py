"""Of what `explain` warns: sizes that do not fit, masks of zeros; and logits that it refuses."""

from __future__ import annotations

import re
import warnings

import pytest
import timm
import torch
import torchvision
from conftest import NETWORKS, cnn, make_classifier, make_images
from test_every_method import OPTIONS
from torch import Tensor, nn

import opticam_lite as ol
from opticam_lite import metrics


def told(record: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in record]


# ------------------------------------------------------------------------------- the size


@pytest.mark.parametrize("shape", [(15, 32), (32, 65), (224, 224)])
def test_images_of_another_size_are_told_of_once(shape: tuple[int, int]) -> None:
    classifier, images = make_classifier("cnn"), make_images(2, *shape)
    h, w = shape
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        ol.explain("grad-cam", classifier, images)
        classifier.predict(images)
        ol.explain("grad-cam", classifier.at("1"), images)
    (text,) = [t for t in told(record) if "zeros" not in t]
    assert {warning.filename for warning in record} == {__file__}
    assert f"the images have {h}×{w} pixels, and Sequential is said to be made for 32×32" in text
    with pytest.warns(UserWarning, match=f"the images have {h}×{w}"):
        make_classifier("cnn").predict(images)


@pytest.mark.parametrize("shape", [(16, 32), (64, 48), (32, 32)])
def test_images_of_a_similar_size_are_not(shape: tuple[int, int]) -> None:
    make_classifier("cnn").predict(make_images(2, *shape))


def for_small_images() -> nn.Module:
    """Stride 8: maps of 4×4 for 32×32, as a ResNet for CIFAR-10 has them, and of 28×28 for 224."""
    down = [m for k in (3, 4, 4) for m in (nn.Conv2d(k, 4, 3, 2, 1), nn.ReLU())]
    return nn.Sequential(*down, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))


def test_a_network_for_small_images_is_told_of_where_no_size_is_given() -> None:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        classifier = ol.Classifier(for_small_images(), device="cpu", name="mine")
        classifier.at("3")
    (text,) = told(record)
    assert (
        "no size was given, and for images of 224×224, which are assumed, mine has maps of" in text
    )
    assert "28×28 at '5'" in text
    assert "such as size=32, or size=224 if it is right" in text
    assert record[0].filename == __file__
    assert classifier.size == (224, 224)
    for size in (32, 224):
        assert ol.Classifier(for_small_images(), device="cpu", size=size).size == (size, size)


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "timm/test_convnext"])
def test_networks_for_imagenet_are_not(name: str) -> None:
    ol.load_model(name, weights="random", device="cpu")
    library, _, bare = name.rpartition("/")
    build = timm.create_model if library else torchvision.models.get_model
    ol.Classifier(build(bare), device="cpu")


def test_the_tokens_of_a_transformer_may_be_many() -> None:
    network = timm.create_model("vit_tiny_patch16_224", patch_size=8, depth=1)
    assert ol.Classifier(network, device="cpu").layer_shape() == (192, 28, 28)


# -------------------------------------------------------------------------------- zeros


def against(classes: int = 3) -> ol.Classifier:
    """A network whose maps speak against class 0 only, and for class 1."""
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, classes),
    )  # fmt: skip
    network[0].weight.data.abs_()
    network[0].bias.data.zero_()
    network[4].weight.data = torch.tensor([[-1.0], [1.0], [0.5]]).repeat(1, 4)
    return ol.Classifier(network, "1", size=32, device="cpu")


def test_masks_of_zeros_are_told_of_once_a_call(images: Tensor) -> None:
    classifier = against()
    with pytest.warns(UserWarning, match="zeros") as record:
        masks = ol.explain(["grad-cam", "cam", "hires-cam"], classifier, images, [0, 1, 0])
    assert not masks["grad-cam"][[0, 2]].any()
    assert masks["grad-cam"][1].any()
    assert [t.partition(":")[0] for t in told(record)] == [
        "grad-cam gives a mask of zeros for 2 of 3 images (0, 2)",
        "hires-cam gives a mask of zeros for 2 of 3 images (0, 2)",
    ]
    assert "speaks against the class, and relu leaves nothing of it" in told(record)[0]
    assert record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ol.explain("grad-cam", classifier, images, 1)
        ol.explain("fake-cam", classifier, images, 0)


def test_what_makes_many_masks_does_not_tell(images: Tensor) -> None:
    dataset = ol.Images(images, [0, 1, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ol.explain("grad-cam", against(), images, 0, warn=False)
        ol.evaluate(against(), dataset, ["grad-cam"], ["AD", "MS", "ADCC"], progress=False)


# ------------------------------------------------------------------------ logits not finite


class Fails(nn.Module):
    """Logits are not finite where the image's first pixel is above 0.9."""

    def __init__(self, network: nn.Module, value: float) -> None:
        super().__init__()
        self.body, self.value = network, value

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return torch.where(x[:, 0, :1, 0] > 1.6, self.value, y)


class Photos(ol.Images):
    def id(self, index: int) -> str:
        return f"photo {index}"


@pytest.mark.parametrize("kind", ["cnn", "vit"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_every_method_refuses_them(kind: str, value: float) -> None:
    layer = {"cnn": "body.4", "vit": "body.blocks.1.norm1"}[kind]
    network = Fails(NETWORKS[kind][0](), value)
    half = (0.5, 0.5, 0.5)
    classifier = ol.Classifier(network, layer, size=32, mean=half, std=(0.25,) * 3, device="cpu")
    images = make_images(5).clamp(max=0.8)
    images[[1, 4], :, 0, 0] = 1.0
    assert classifier.logits(images).isfinite().all(1).tolist() == [True, False, True, True, False]
    message = "the output of Fails is not finite (NaN or infinity) for the images 1, 4, so"
    for method, reason in ol.methods.applicable(classifier).items():
        if reason is None:
            for targets in (None, 0):
                with pytest.raises(ValueError, match=re.escape(message)):
                    ol.explain(method, classifier, images, targets, batch_size=5)
    with pytest.raises(ValueError, match="for the images 1, so"):
        ol.explain("grad-cam", classifier, images, batch_size=2)
    with pytest.raises(ValueError, match="for the images photo 1, photo 4, so"):
        ol.explain("grad-cam", classifier, Photos(images), 0)
    with pytest.raises(ValueError, match=re.escape(message)):
        classifier.predict(images)
    assert ol.explain("grad-cam", classifier, images[[0, 2, 3]]).isfinite().all()


def test_probabilities_that_are_not_finite_are_named() -> None:
    p, o = torch.full((3,), 0.5), torch.tensor([0.5, torch.nan, 0.2])
    for measure in (metrics.average_drop, metrics.average_gain, metrics.average_increase):
        with pytest.raises(ValueError, match=r"o holds nan \(image 1\); .* output is not finite"):
            measure(p, o)
        with pytest.raises(ValueError, match=r"p holds 50 \(image 0, 1, 2\); .*, not percent"):
            measure(100 * p, p)


# ----------------------------------------------------------------- the passes that this costs


@pytest.mark.parametrize("method", ["cam", "grad-cam", "layer-cam", "ablation-cam"])
@pytest.mark.parametrize("targets", [None, 0])
def test_methods_share_one_pass_with_the_check(
    method: str, targets: int | None, images: Tensor
) -> None:
    class Counter(nn.Module):
        n = 0

        def __deepcopy__(self, memo: dict) -> Counter:
            return self

        def forward(self, x: Tensor) -> Tensor:
            Counter.n += 1 if x.numel() > -1 else 0  # depends on a value: run, not traced
            return x

    network = nn.Sequential(Counter(), *cnn())
    classifier = ol.Classifier(network, "5", size=32, device="cpu")
    ol.explain(method, classifier, images, 0)  # CAM looks for its linear layer once
    before = Counter.n
    ol.explain(method, classifier, images, targets, **OPTIONS.get(method, {}))
    assert Counter.n == before + 1
