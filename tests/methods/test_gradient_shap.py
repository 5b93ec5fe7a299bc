"""GradientSHAP against a slow reference and captum."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import make_classifier, make_images, peer
from torch import Tensor, nn

import opticam_lite as ol


def reference_gradient_shap(
    classifier: ol.Classifier, x: Tensor, c: int, *, samples: int, stdev: float, seed: int = 0
) -> Tensor:
    """GradientSHAP for one image, with the random numbers in the order in which captum draws."""
    numbers = np.random.RandomState(seed)
    generator = torch.Generator().manual_seed(seed)
    choices = numbers.choice(2, samples)
    noise = torch.normal(0, torch.full((samples, *x.shape), stdev), generator=generator)
    alphas = numbers.uniform(0, 1, samples)
    phi = torch.zeros_like(x)
    for i in range(samples):
        noisy = x + noise[i]
        b = [torch.zeros_like(x), x][choices[i]]
        between = (alphas[i] * noisy + (1 - alphas[i]) * b).float().requires_grad_()
        classifier.network((between[None] - 0.5) / 0.25)[0, c].backward()
        phi = phi + (noisy - b) * between.grad / samples
    saliency = phi.abs().sum(0)
    return (saliency - saliency.min()) / (saliency.max() - saliency.min())


@pytest.mark.parametrize("stdev", [1e-4, 0.1])
def test_gradient_shap_equals_its_slow_reference(
    stdev: float, classifier: ol.Classifier, images: Tensor, targets: Tensor
) -> None:
    options = {"samples": 10, "stdev": stdev, "seed": 7}
    masks = ol.explain("gradient-shap", classifier, images, targets, chunk=3, **options)
    for x, c, mask in zip(images, targets.tolist(), masks, strict=True):
        expected = reference_gradient_shap(classifier, x, c, **options)
        torch.testing.assert_close(mask[0], expected, rtol=0, atol=1e-3)


def test_gradient_shap_and_captum_as_it_comes(images: Tensor, targets: Tensor) -> None:
    classifier = make_classifier("dense")
    masks = ol.explain("gradient-shap", classifier, images, targets)
    state = np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        for x, c, mask in zip(images.split(1), targets.tolist(), masks.split(1), strict=True):
            torch.manual_seed(0)
            np.random.seed(0)  # noqa: NPY002
            phi = (
                peer("captum.attr")
                .GradientShap(classifier.logits)
                .attribute(x, torch.cat([x * 0, x]), n_samples=50, stdevs=1e-4, target=c)
            )
            expected = ol.normalize(phi.abs().sum(1, keepdim=True).detach())
            torch.testing.assert_close(mask, expected, rtol=0, atol=1e-4)
    np.random.set_state(state)  # noqa: NPY002


def test_gradient_shap_of_a_linear_network(targets: Tensor) -> None:
    """The gradient is w everywhere, so the map is Σ |w ⊙ x| times the share of black baselines."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 32 * 32, 5))
    classifier = ol.Classifier(network, "0", size=32)
    images = make_images()
    x = images.clone().requires_grad_()
    classifier.logits(x).gather(1, targets[:, None]).sum().backward()
    expected = ol.normalize((x.grad * images).abs().sum(1, keepdim=True))
    masks = ol.explain("gradient-shap", classifier, images, targets, stdev=0)
    torch.testing.assert_close(masks, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"chunk": 0}, "chunk is 0"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"stdev": -0.1}, "stdev is -0.1"),
        ({"stdev": math.nan}, "stdev is nan"),
    ],
)
def test_bad_options(options: dict, message: str, images: Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        ol.explain("gradient-shap", make_classifier("cnn"), images, 0, **options)
