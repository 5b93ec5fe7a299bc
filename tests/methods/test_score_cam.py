"""Score-CAM against a slow reference and the `grad-cam` package."""

from __future__ import annotations

import pytest
import torch
from conftest import make_classifier, peer
from references import assert_equals_reference, linear_network, mask
from torch import Tensor, nn

import opticam_lite as ol


def reference_score_cam(classifier: ol.Classifier, x: Tensor, c: int) -> Tensor:
    A = classifier.features(x[None])[0]
    f_0 = classifier.logits(torch.zeros_like(x)[None])[0, c]
    u = [classifier.logits(x[None] * mask(A_k, x.shape))[0, c] - f_0 for A_k in A]  # eq. 3
    w = torch.stack(u).softmax(0)
    S = torch.zeros(A.shape[1:])
    for w_k, A_k in zip(w, A, strict=True):
        S += w_k * A_k
    return S.relu()


def test_equals_its_slow_reference(
    classifier: ol.Classifier, images: Tensor, targets: Tensor
) -> None:
    assert_equals_reference("score-cam", reference_score_cam, classifier, images, targets)


def test_a_flat_map_gets_the_score_of_a_black_image() -> None:
    """Its u is 0 whatever the logit of black is; here that map lowers what the relu cuts off."""
    image = torch.stack([torch.linspace(0, 1, 8).expand(8, 8), *torch.full((2, 8, 8), 0.5)])
    classifier = linear_network([[1, 0, 0], [0, -1, 0]], torch.eye(2), grid=1)
    linear = classifier.network[-1]
    linear.bias = nn.Parameter(torch.tensor([3.0, 0.0]), requires_grad=False)
    expected = mask(reference_score_cam(classifier, image, 0), image.shape)
    masks = ol.explain("score-cam", classifier, image[None], 0)
    torch.testing.assert_close(masks[0, 0], expected)
    assert (expected == 0).float().mean() > 0.2


def test_without_a_normalisation(images: Tensor, targets: Tensor) -> None:
    network = make_classifier("cnn").network
    settings = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.1), "size": 32, "device": "cpu"}
    classifier = ol.Classifier(network, "4", **settings, normalize=False)
    masks = ol.explain("score-cam", classifier, images, targets)
    for x, c, found in zip(images, targets.tolist(), masks, strict=True):
        expected = mask(reference_score_cam(classifier, x, c), x.shape)
        torch.testing.assert_close(found, expected.view_as(found), rtol=0, atol=1e-4)


def test_in_another_precision(images: Tensor, targets: Tensor) -> None:
    classifier = make_classifier("cnn")
    exact = ol.explain("score-cam", classifier, images, targets)
    quick = ol.explain("score-cam", classifier, images, targets, precision="bfloat16")
    assert not torch.equal(quick, exact)
    torch.testing.assert_close(quick, exact, rtol=0, atol=0.02)
    with pytest.raises(ValueError, match="float16"):
        ol.explain("score-cam", classifier, images, targets, precision="float16")


def test_in_chunks(images: Tensor, targets: Tensor) -> None:
    classifier = make_classifier("cnn")
    whole = ol.explain("score-cam", classifier, images, targets, chunk=1000)
    steps: list[ol.methods.Step] = []
    chunked = ol.explain("score-cam", classifier, images, targets, chunk=7, callback=steps.append)
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-4)
    assert [s.index for s in steps] == list(range(1, 7))  # 12 channels in chunks of 7, thrice
    assert {s.total for s in steps} == {6}
    assert steps[0].masks() is None


def test_score_cam_and_the_grad_cam_package(images: Tensor, targets: Tensor) -> None:
    """Equal where the two things in which the package differs from the definition play no part.

    It enlarges maps with aligned corners, and it masks the normalised image, so that a masked pixel
    is grey there and black here. Maps as large as the image and a mean of 0 leave neither.
    """
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(96, 5),
    )
    classifier = ol.Classifier(network, "1", size=32)
    layer = classifier.network.get_submodule("1")
    output = peer("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget
    chosen = [output(c) for c in targets.tolist()]
    A = classifier.features(images)
    with peer("pytorch_grad_cam").ScoreCAM(classifier.network, [layer]) as cam:
        w = torch.as_tensor(cam.get_cam_weights(images, layer, chosen, A.numpy(), None))
    maps = torch.einsum("nk,nkhw->nhw", w, A)[:, None].relu()
    masks = ol.explain("score-cam", classifier, images, targets)
    torch.testing.assert_close(masks, ol.to_masks(maps, (32, 32)), rtol=0, atol=1e-4)
