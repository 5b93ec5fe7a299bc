"""LIME against a slow reference and the `lime` package."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import make_classifier, peer
from skimage.segmentation import quickshift
from torch import Tensor, nn

import opticam_lite as ol
from opticam_lite.methods import lime


def reference_lime(
    classifier: ol.Classifier, x: Tensor, c: int, *, samples: int, seed: int = 0
) -> Tensor:
    """LIME for one image, with the random numbers of the package."""
    segments = quickshift(
        x.permute(1, 2, 0).double().numpy(), kernel_size=4, max_dist=200, ratio=0.2, rng=seed
    )
    S = segments.max() + 1
    z = np.random.RandomState(seed).randint(0, 2, (samples, S))
    z[0] = 1
    p, pi = [], []
    for row in z:
        masked = x.clone()
        for s in range(S):
            if not row[s]:
                for channel in range(3):
                    inside = torch.from_numpy(segments == s)
                    masked[channel][inside] = x[channel][inside].mean()
        p.append(classifier.probabilities(masked[None])[0, c].item())
        d = 1 - row.sum() / math.sqrt(row.sum() * S) if row.any() else 1.0  # 1 − cos(z, 1)
        pi.append(math.sqrt(math.exp(-(d**2) / 0.25**2)))
    # Weighted ridge with a free intercept, α = 1: the normal equations of the centred data.
    p, pi = np.array(p), np.array(pi)
    centred = z - (pi @ z) / pi.sum()
    Q = centred.T @ np.diag(pi) @ centred + np.eye(S)
    w = np.linalg.solve(Q, centred.T @ (pi * (p - (pi @ p) / pi.sum())))
    w = np.maximum(w, 0)
    saliency = torch.zeros(x.shape[1:])
    for s in range(S):
        saliency[torch.from_numpy(segments == s)] = w[s] / w.max() if w.max() > 0 else 0
    return saliency


def patchwork(height: int = 48, width: int = 64) -> Tensor:
    """Three images of twelve patches of different colours with a fine checkerboard on them.

    Quickshift finds the patches, and their mean colour takes the checkerboard away.
    """
    colours = torch.rand(3, 3, 3, 4, generator=torch.Generator().manual_seed(5))
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    patches = colours[:, :, rows * 3 // height, columns * 4 // width]
    return 0.1 + 0.8 * patches + 0.05 * checkerboard(height, width)


def checkerboard(height: int, width: int) -> Tensor:
    return 1.0 - 2 * ((torch.arange(height)[:, None] + torch.arange(width)) % 2)


@pytest.mark.parametrize("kind", ["cnn", "dense"])
def test_lime_equals_its_slow_reference(kind: str, targets: Tensor) -> None:
    classifier = make_classifier(kind)
    images = patchwork()
    masks = ol.explain("lime", classifier, images, targets, samples=40)
    assert any(len(mask.unique()) > 5 for mask in masks)  # else the test would show little
    for x, c, mask in zip(images, targets.tolist(), masks, strict=True):
        expected = reference_lime(classifier, x, c, samples=40)
        torch.testing.assert_close(mask[0], expected, rtol=0, atol=1e-3)


def test_the_probability_of_a_multi_label_network(targets: Tensor) -> None:
    arguments = make_classifier("cnn").rebuild_arguments() | {"activation": "sigmoid"}
    arguments["network"][-1].weight.data *= 8
    classifier, images = ol.Classifier(**arguments), patchwork()
    masks = ol.explain("lime", classifier, images, targets, samples=40)
    assert any(len(mask.unique()) > 5 for mask in masks)
    for x, c, mask in zip(images, targets.tolist(), masks, strict=True):
        expected = reference_lime(classifier, x, c, samples=40)
        torch.testing.assert_close(mask[0], expected, rtol=0, atol=1e-3)


def test_lime_and_the_package_as_it_comes(targets: Tensor) -> None:
    """Same segments, same z, same weights; ours only masks on the network's device."""
    classifier = make_classifier("dense")
    images = patchwork()

    def probabilities(batch: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(batch).permute(0, 3, 1, 2).float()
        return classifier.probabilities(x).double().numpy()

    explainer = peer("lime.lime_image").LimeImageExplainer
    masks = ol.explain("lime", classifier, images, targets, samples=60, seed=42)
    for x, c, mask in zip(images, targets.tolist(), masks, strict=True):
        explanation = explainer(random_state=42).explain_instance(
            x.permute(1, 2, 0).double().numpy(),
            probabilities,
            labels=(c,),
            top_labels=None,
            num_samples=60,
            random_seed=42,
        )
        expected = np.zeros(explanation.segments.shape)
        for s, weight in explanation.local_exp[c]:
            expected[explanation.segments == s] = max(weight, 0)
        expected = torch.from_numpy(expected / expected.max()).float()
        torch.testing.assert_close(mask[0], expected, rtol=0, atol=1e-3)


def test_lime_finds_the_patch_that_counts() -> None:
    """The logit is the checkerboard's contrast in one patch, whatever the others show."""
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(3 * 48 * 64, 2))
    w = torch.zeros(2, 3, 48, 64)
    w[1, :, :16, :16] = checkerboard(16, 16) / 10
    with torch.no_grad():
        network[0].weight.copy_(torch.eye(3)[:, :, None, None])
        network[0].bias.zero_()
        network[2].weight.copy_(w.flatten(1))
        network[2].bias.zero_()
    classifier = ol.Classifier(network, "0", size=(48, 64))
    masks = ol.explain("lime", classifier, patchwork(), 1, samples=200)
    assert (masks[:, :, :16, :16] == 1).float().mean() > 0.95
    masks[:, :, :16, :16] = 0
    assert (masks < 0.1).float().mean() > 0.99


def test_the_superpixels_are_quickshift_s() -> None:
    """Kernel of 4 pixels, links of at most 200, a ratio of 0.2."""
    options = lime._quickshift(3).keywords
    assert options == {"kernel_size": 4, "max_dist": 200, "ratio": 0.2, "rng": 3}


def test_an_image_of_one_colour_has_no_superpixel_that_counts() -> None:
    """What rounding leaves of a weight, about 1e-32, would be the largest."""
    images = torch.tensor([0.1, 0.3, 0.7]).view(3, 1, 1, 1).expand(3, 3, 48, 64)
    for kind in ("cnn", "dense"):
        assert not ol.explain("lime", make_classifier(kind), images, 0, samples=20).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"chunk": 0}, "chunk is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_options(options: dict, message: str, images: Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        ol.explain("lime", make_classifier("cnn"), images, 0, **options)
