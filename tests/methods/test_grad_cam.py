"""Grad-CAM against a slow reference, captum and the `grad-cam` package."""

from __future__ import annotations

import pytest
import torch
from conftest import make_classifier, peer
from references import assert_equals_reference, maps_and_gradients
from torch import Tensor

import opticam_lite as ol

KINDS = ["cnn", "dense"]


def reference_grad_cam(classifier: ol.Classifier, x: Tensor, c: int) -> Tensor:
    A, g = maps_and_gradients(classifier, x, c)
    S = torch.zeros(A.shape[1:], dtype=A.dtype)
    for k in range(len(A)):
        S = S + g[k].mean() * A[k]  # eq. 2
    return S.relu()


def test_equals_its_slow_reference(
    classifier: ol.Classifier, images: Tensor, targets: Tensor
) -> None:
    assert_equals_reference("grad-cam", reference_grad_cam, classifier, images, targets)


def test_cam_equals_grad_cam_behind_pooling_and_a_linear_layer(
    images: Tensor, targets: Tensor
) -> None:
    """∂y_c/∂A_k = w_ck / (h·w) everywhere; so the maps are equal up to scale where both are > 0."""
    classifier = make_classifier("cnn")
    linear = classifier.network[-1]
    A = classifier.features(images)
    S = torch.einsum("nk,nkhw->nhw", linear.weight[targets], A)[:, None]
    expected = ol.to_masks(S.relu(), (32, 32))
    torch.testing.assert_close(ol.explain("grad-cam", classifier, images, targets), expected)


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
    captum = peer("captum.attr").LayerGradCam(classifier.network, layer)
    x = normalised(images)
    maps = captum.attribute(x, targets, relu_attributions=True).detach()
    masks = ol.explain("grad-cam", classifier, images, targets)
    torch.testing.assert_close(masks, up_and_range(maps), rtol=0, atol=1e-4)
    signed = captum.attribute(x, targets).detach()
    assert (signed < 0).any()  # the difference, stated
    torch.testing.assert_close(up_and_range(signed.relu()), masks, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_grad_cam_and_the_grad_cam_package(kind: str, images: Tensor, targets: Tensor) -> None:
    """The package normalises before it resizes; on the coarse maps both agree."""
    classifier = make_classifier(kind)
    layer = classifier.network.get_submodule(classifier.layer)
    output = peer("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget
    chosen = [output(c) for c in targets.tolist()]
    with peer("pytorch_grad_cam").GradCAM(classifier.network, [layer]) as cam:
        cam(normalised(images).requires_grad_(), chosen)
        activations = torch.as_tensor(cam.activations_and_grads.activations[0])
        gradients = torch.as_tensor(cam.activations_and_grads.gradients[0])
        weights = torch.as_tensor(
            cam.get_cam_weights(
                normalised(images), layer, chosen, activations.numpy(), gradients.numpy()
            )
        )
    maps = torch.einsum("nk,nkhw->nhw", weights, activations)[:, None].relu()
    masks = ol.explain("grad-cam", classifier, images, targets)
    torch.testing.assert_close(masks, up_and_range(maps), rtol=0, atol=1e-4)
