"""CAM against a slow reference; where it applies, and which methods are CAM there."""

from __future__ import annotations

import pytest
import torch
from conftest import make_classifier, make_images
from references import assert_equals_reference, mask
from torch import Tensor, nn

import opticam_lite as ol


def reference_cam(classifier: ol.Classifier, x: Tensor, c: int) -> Tensor:
    linear = [m for m in classifier.network.modules() if isinstance(m, nn.Linear)][-1]
    A = classifier.features(x[None])[0]
    S = torch.zeros(A.shape[1:])
    for k in range(len(A)):
        S = S + linear.weight[c, k] * A[k]
    return S


def test_equals_its_slow_reference(
    classifier: ol.Classifier, images: Tensor, targets: Tensor
) -> None:
    if ol.methods.applicable(classifier)["cam"] is None:
        assert_equals_reference("cam", reference_cam, classifier, images, targets)
    else:
        with pytest.raises(ValueError, match=r"cam can't explain .*These can: .*grad-cam"):
            ol.explain("cam", classifier, images, targets)


@pytest.mark.parametrize("name", ["cnn", "scenes_resnet"])
def test_all_are_cam_behind_pooling_and_a_linear_layer(
    name: str, images: Tensor, targets: Tensor
) -> None:
    """There ∂y_c/∂A_k = w_ck / (h·w) everywhere, and channel k adds w_ck · mean(A_k) to y_c."""
    if name == "cnn":
        classifier = make_classifier("cnn")
    else:
        classifier = ol.load_model(name, device="cpu")
        images, targets = ol.load_dataset("scenes").batch(range(3))
    linear = [m for m in classifier.network.modules() if isinstance(m, nn.Linear)][-1]
    w, A = linear.weight[targets], classifier.features(images)
    size = images.shape[2:]
    cam = ol.to_masks(torch.einsum("nk,nkhw->nhw", w, A)[:, None].relu(), size)
    for method in ("grad-cam", "xgrad-cam", "hires-cam"):
        masks = ol.explain(method, classifier, images, targets)
        torch.testing.assert_close(masks, cam, rtol=0, atol=1e-3)
    y = classifier.logits(images).gather(1, targets[:, None])
    lowered = w * A.mean((2, 3))
    S = torch.einsum("nk,nkhw->nhw", lowered / y, A)[:, None].relu()
    masks = ol.explain("ablation-cam", classifier, images, targets)
    torch.testing.assert_close(masks, ol.to_masks(S, size), rtol=0, atol=2e-3)
    assert cam.any()
    assert masks.any()


def test_why_cam_does_not_apply() -> None:
    assert ol.methods.applicable(make_classifier("cnn"))["cam"] is None
    dense = ol.methods.applicable(make_classifier("dense"))["cam"]
    assert "no linear layer takes the 10 channels" in dense
    between = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.ReLU(), nn.Linear(4, 5)
    )
    reason = ol.methods.applicable(ol.Classifier(between, "0", size=32))["cam"]
    assert "more than pooling and one linear layer" in reason


class TwoHeads(nn.Module):
    """The last linear layer is not the one that gives the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.auxiliary = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


def test_cam_reads_the_weights_of_the_head_that_is_used() -> None:
    torch.manual_seed(0)
    classifier = ol.Classifier(TwoHeads(), "conv", size=32, device="cpu")
    x = make_images(1)
    S = torch.einsum("k,khw->hw", classifier.network.fc.weight[1], classifier.features(x)[0])
    torch.testing.assert_close(ol.explain("cam", classifier, x, 1)[0, 0], mask(S, x.shape))


def test_cam_tries_the_head_once(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, seen = make_classifier("cnn"), []
    split = type(classifier).split
    monkeypatch.setattr(
        type(classifier), "split", lambda self, x: seen.append(len(x)) or split(self, x)
    )
    for _ in range(2):
        ol.explain("cam", classifier, make_images(3), 0)
    assert seen == [2, 3, 3]
    reason = ol.methods.applicable(classifier.at("1"))["cam"]
    assert reason is not None
    assert "'1'" in reason


def test_cam_of_a_convolution_in_place_of_the_linear_layer(images: Tensor) -> None:
    """Pooling and a 1×1 convolution are both linear, so their order makes no difference."""
    trunk, conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Conv2d(8, 5, 1)
    pooling = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    before = ol.Classifier(nn.Sequential(*trunk, conv, *pooling), size=32, device="cpu")
    linear = nn.Linear(8, 5)
    linear.load_state_dict({"weight": conv.weight.flatten(1), "bias": conv.bias})
    behind = ol.Classifier(nn.Sequential(*trunk, *pooling, linear), size=32, device="cpu")
    assert before.layer == behind.layer == "1"
    masks = [ol.explain("cam", classifier, images, [0, 1, 2]) for classifier in (before, behind)]
    torch.testing.assert_close(*masks)
    rectified = nn.Sequential(*trunk, conv, nn.ReLU(), *pooling)
    assert ol.methods.applicable(ol.Classifier(rectified, "1", size=32))["cam"] is not None
