"""Opti-CAM in few passes: against its definition in plain loops, and the promise in its name."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import NETWORKS, make_classifier, make_images
from torch import Tensor
from torch.nn import functional as F

import opticam_lite as ol
from opticam_lite.methods.opti_cam_fast import _deviation
from opticam_lite.network import Quick


def reference_opti_cam_fast(classifier: ol.Classifier, x: Tensor, c: int, passes: int) -> Tensor:
    """The docstring's formulas for one image, in float64, channel by channel."""
    A = classifier.features(x[None])[0].double()
    sigmas = [math.sqrt(((a - a.mean()) ** 2).mean().item()) for a in A]
    maps = [a / s if s > 1e-6 * max(sigmas) else 0 * a for a, s in zip(A, sigmas, strict=True)]
    w, m = [1.0] * len(A), [0.0] * len(A)
    best, best_mask = -math.inf, None
    T = passes - 1
    for t in range(T):
        weights = torch.tensor(w, requires_grad=True)
        S = sum(w_k * a for w_k, a in zip(weights.double(), maps, strict=True))
        s = F.interpolate(S[None, None], x.shape[1:], mode="bilinear", align_corners=False)
        s = (s - s.min()) / (s.max() - s.min())
        p = classifier.logits(x[None] * s.float())[0].double().softmax(0)[c]
        objective = p.log() - (1 - p).log()
        if objective.item() > best:
            best, best_mask = objective.item(), s.detach()[0].float()
        (g,) = torch.autograd.grad(objective, weights)
        largest = g.abs().max().item()
        for k, g_k in enumerate(g.tolist()):
            m[k] = 0.5 * m[k] + math.copysign(math.sqrt(abs(g_k) / largest), g_k)
            w[k] += 2 * (1 - t / T) * m[k]
    return best_mask


@pytest.mark.parametrize("passes", [2, 3, 6])
@pytest.mark.parametrize("kind", NETWORKS)
def test_equals_its_definition(kind: str, passes: int, images: Tensor, targets: Tensor) -> None:
    classifier = make_classifier(kind)
    masks = ol.explain("opti-cam-fast", classifier, images, targets, passes=passes)
    for x, c, mask in zip(images, targets.tolist(), masks, strict=True):
        expected = reference_opti_cam_fast(classifier, x, c, passes)
        torch.testing.assert_close(mask, expected, rtol=0, atol=2e-3)


def test_of_a_multi_label_network_the_objective_is_the_logit(
    images: Tensor, targets: Tensor
) -> None:
    """It is the class's own log-odds."""
    softmax = make_classifier("cnn")
    arguments = softmax.rebuild_arguments() | {"activation": "sigmoid"}
    classifier, steps = ol.Classifier(**arguments), []
    ol.explain("opti-cam-fast", classifier, images, targets, passes=3, callback=steps.append)
    for step in steps:
        y = classifier.logits(images * step.masks()).gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(step.objective, y, rtol=1e-4, atol=1e-5)


def test_a_channel_is_compared_with_others_of_its_image() -> None:
    A = torch.rand(2, 3, 4, 4) * torch.tensor([1.0, 1e8])[:, None, None, None]
    assert _deviation(A).isfinite().all()


def test_flat_maps_and_a_dead_channel() -> None:
    """A black image has no gradient, flat maps no deviation, and a constant channel no part."""
    classifier = make_classifier("cnn")
    classifier.network[3].bias[2] = -100.0  # the relu behind it makes the map 0
    images = make_images(3)
    images[1] = 0
    steps: list[ol.methods.Step] = []
    masks = ol.explain("opti-cam-fast", classifier, images, 1, passes=4, callback=steps.append)
    for i in (0, 2):
        expected = reference_opti_cam_fast(classifier, images[i], 1, 4)
        torch.testing.assert_close(masks[i], expected, rtol=0, atol=2e-3)
    classifier.network[3].bias[:] = -100.0
    masks = ol.explain("opti-cam-fast", classifier, images, 1, passes=4, callback=steps.append)
    assert not masks.any()
    assert all(step.saliency.isfinite().all() for step in steps)


@pytest.mark.parametrize("passes", [2, 7])
def test_the_network_runs_no_more_often_than_said(
    passes: int, images: Tensor, targets: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = make_classifier("cnn")
    runs = []
    for owner, name in ((ol.Classifier, "split"), (ol.Classifier, "logits"), (Quick, "logits")):
        original = getattr(owner, name)

        def counted(self: object, *args: object, original=original, name: str = name) -> object:
            runs.append(name)
            return original(self, *args)

        monkeypatch.setattr(owner, name, counted)
    ol.explain("opti-cam-fast", classifier, images, targets, passes=passes)
    assert runs == ["split", *["logits"] * (passes - 1)]


def test_the_best_mask_seen_is_returned(images: Tensor, targets: Tensor) -> None:
    classifier = make_classifier("dense")
    steps: list[ol.methods.Step] = []
    masks = ol.explain(
        "opti-cam-fast", classifier, images, targets, passes=9, callback=steps.append
    )
    assert [step.index for step in steps] == list(range(1, 9))
    objectives = torch.stack([step.objective for step in steps])
    for i, t in enumerate(objectives.argmax(0).tolist()):
        torch.testing.assert_close(masks[i], steps[t].masks()[i])
    _, o = ol.masked_probabilities(classifier, images, masks, targets)
    best = objectives.max(0).values
    torch.testing.assert_close((o / (1 - o)).log(), best, rtol=1e-3, atol=1e-3)


def test_more_passes_win_more(targets: Tensor) -> None:
    classifier, images = make_classifier("dense"), make_images(8)
    gains = []
    for passes in (2, 5, 20):
        masks = ol.explain("opti-cam-fast", classifier, images, 3, passes=passes)
        p, o = ol.masked_probabilities(classifier, images, masks, torch.full((8,), 3))
        gains.append(ol.metrics.average_gain(p, o))
    assert gains == sorted(gains)
    assert gains[0] < gains[-1]


@pytest.mark.parametrize("passes", [0, 1, 2.5])
def test_bad_passes(passes: float, images: Tensor) -> None:
    with pytest.raises(ValueError, match=rf"passes is {passes}; a whole number ≥ 2 is needed"):
        ol.explain("opti-cam-fast", make_classifier("cnn"), images, 0, passes=passes)


def test_what_is_reached_does_not_depend_on_batch_mates() -> None:
    """Pixels may differ, for steps magnify rounding; the masked image's probability may not."""
    classifier = ol.load_model("scenes_resnet", device="cpu")
    images, targets = ol.load_dataset("scenes").batch(range(3, 7))
    reached = []
    for batch_size in (1, 4):
        masks = ol.explain("opti-cam-fast", classifier, images, targets, batch_size=batch_size)
        reached.append(ol.masked_probabilities(classifier, images, masks, targets)[1])
    torch.testing.assert_close(*reached, rtol=0, atol=0.02)


@pytest.mark.parametrize("passes", [2.5, "many", math.nan])
def test_passes_that_are_no_number(passes: object, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"passes is .*; a whole number ≥ 2 is needed"):
        ol.explain("opti-cam-fast", make_classifier("cnn"), images, 0, passes=passes)
    assert ol.explain("opti-cam-fast", make_classifier("cnn"), images, 0, passes=3.0).any()
