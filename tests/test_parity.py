"""Agreement with independent implementations where they define the same method."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import make_classifier
from torch import Tensor, nn

import opticam_lite as ol

with warnings.catch_warnings():  # what the peers warn of on import is theirs
    warnings.simplefilter("ignore")
    import captum.attr
    from pytorch_grad_cam import GradCAM, ScoreCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

KINDS = ["cnn", "dense"]


def normalised(images: Tensor) -> Tensor:
    return (images - 0.5) / 0.25


def up_and_range(maps: Tensor) -> Tensor:
    """Bring a peer's coarse map to the form of a mask, as definitions say."""
    return ol.to_masks(maps, (32, 32))


@pytest.mark.parametrize("kind", KINDS)
def test_grad_cam_and_captum(kind: str, images: Tensor, targets: Tensor) -> None:
    """captum leaves the relu out unless `relu_attributions` asks for it."""
    classifier = make_classifier(kind)
    layer = classifier.network.get_submodule(classifier.layer)
    peer = captum.attr.LayerGradCam(classifier.network, layer)
    x = normalised(images)
    maps = peer.attribute(x, targets, relu_attributions=True).detach()
    masks = ol.explain("grad-cam", classifier, images, targets)
    torch.testing.assert_close(masks, up_and_range(maps), rtol=0, atol=1e-4)
    signed = peer.attribute(x, targets).detach()
    assert (signed < 0).any()  # the difference, stated
    torch.testing.assert_close(up_and_range(signed.relu()), masks, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_grad_cam_and_the_grad_cam_package(kind: str, images: Tensor, targets: Tensor) -> None:
    """The package normalises before it resizes; on the coarse maps both agree."""
    classifier = make_classifier(kind)
    layer = classifier.network.get_submodule(classifier.layer)
    chosen = [ClassifierOutputTarget(c) for c in targets.tolist()]
    with GradCAM(classifier.network, [layer]) as peer:
        peer(normalised(images).requires_grad_(), chosen)
        activations = torch.as_tensor(peer.activations_and_grads.activations[0])
        gradients = torch.as_tensor(peer.activations_and_grads.gradients[0])
        weights = torch.as_tensor(
            peer.get_cam_weights(
                normalised(images), layer, chosen, activations.numpy(), gradients.numpy()
            )
        )
    maps = torch.einsum("nk,nkhw->nhw", weights, activations)[:, None].relu()
    masks = ol.explain("grad-cam", classifier, images, targets)
    torch.testing.assert_close(masks, up_and_range(maps), rtol=0, atol=1e-4)


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
    chosen = [ClassifierOutputTarget(c) for c in targets.tolist()]
    A = classifier.features(images)
    with ScoreCAM(classifier.network, [layer]) as peer:
        w = torch.as_tensor(peer.get_cam_weights(images, layer, chosen, A.numpy(), None))
    maps = torch.einsum("nk,nkhw->nhw", w, A)[:, None].relu()
    masks = ol.explain("score-cam", classifier, images, targets)
    torch.testing.assert_close(masks, ol.to_masks(maps, (32, 32)), rtol=0, atol=1e-4)
