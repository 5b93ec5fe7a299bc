"""LIME and GradientSHAP against slow references and against the packages that they run through."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import make_classifier, make_images
from skimage.segmentation import quickshift
from torch import Tensor, nn

import opticam_lite as ol

with warnings.catch_warnings():  # what the peers warn of on import is theirs
    warnings.simplefilter("ignore")
    from captum.attr import GradientShap
    from lime.lime_image import LimeImageExplainer

BOTH = ["lime", "gradient-shap"]


@pytest.mark.parametrize("method", BOTH)
def test_passes_are_those_of_the_quick_network(
    method: str, images: Tensor, targets: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = make_classifier("cnn")
    expected = ol.explain(method, classifier, images, targets, samples=4)
    monkeypatch.setattr(classifier.network, "forward", None)  # the untouched one can't be run
    masks = ol.explain(method, classifier, images, targets, samples=4)
    assert torch.equal(masks, expected)


def test_the_packages_are_loaded_when_they_are_needed() -> None:
    """Together they would double the time that the package adds to that of PyTorch and timm."""
    code = "import sys, opticam_lite; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    slow = {"IPython", "captum", "ipywidgets", "lime", "matplotlib", "pandas", "papermill"}
    slow |= {"pyarrow", "ray", "scipy", "skimage", "sklearn"}
    assert slow & set(done.stdout.split()) == set()


def test_names_whose_rooms_are_loaded_when_they_are_used() -> None:
    code = """
import opticam_lite as ol
assert set(ol.__all__) <= set(dir(ol))
from opticam_lite import *
assert (plots.grid, explore, evaluate) == (ol.plots.grid, ol.explore, ol.evaluate)
print(hasattr(ol, "nothing"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lime", {"samples": 0}, "samples is 0"),
        ("lime", {"chunk": 0}, "chunk is 0"),
        ("lime", {"seed": -1}, "seed is -1"),
        ("gradient-shap", {"samples": 0}, "samples is 0"),
        ("gradient-shap", {"chunk": 0}, "chunk is 0"),
        ("gradient-shap", {"seed": 2**32}, "seed is 4294967296"),
        ("gradient-shap", {"stdev": -0.1}, "stdev is -0.1"),
        ("gradient-shap", {"stdev": math.nan}, "stdev is nan"),
    ],
)
def test_bad_options(method: str, options: dict, message: str, images: Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        ol.explain(method, make_classifier("cnn"), images, 0, **options)


@pytest.mark.parametrize("method", BOTH)
def test_chunks_do_not_matter_and_seeds_do(method: str, targets: Tensor) -> None:
    classifier, images = make_classifier("dense"), patchwork()

    def run(**options: object) -> Tensor:
        return ol.explain(method, classifier, images, targets, samples=12, **options)

    steps: list[ol.methods.Step] = []
    first = run(chunk=5, callback=steps.append)
    assert [(s.index, s.total) for s in steps] == [(i, 9) for i in range(1, 10)]  # 3 images × 3
    torch.testing.assert_close(run(chunk=100), first, rtol=0, atol=1e-4)
    torch.testing.assert_close(run(batch_size=1), first, rtol=0, atol=1e-4)
    assert not torch.allclose(run(seed=1), first, atol=1e-2)


# --------------------------------------------------------------------------------------------- LIME


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


def test_lime_and_the_package_as_it_comes(targets: Tensor) -> None:
    """Same segments, same z, same weights; ours only masks on the network's device."""
    classifier = make_classifier("dense")
    images = patchwork()

    def probabilities(batch: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(batch).permute(0, 3, 1, 2).float()
        return classifier.probabilities(x).double().numpy()

    masks = ol.explain("lime", classifier, images, targets, samples=60, seed=42)
    for x, c, mask in zip(images, targets.tolist(), masks, strict=True):
        explanation = LimeImageExplainer(random_state=42).explain_instance(
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


# ------------------------------------------------------------------------------------ GradientSHAP


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
            phi = GradientShap(classifier.logits).attribute(
                x, torch.cat([x * 0, x]), n_samples=50, stdevs=1e-4, target=c
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
