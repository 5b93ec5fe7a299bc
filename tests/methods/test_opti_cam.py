"""Opti-CAM against a slow reference: objectives, normalisations, starts, stopping."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_classifier, make_images
from references import n_range, up
from torch import Tensor

import opticam_lite as ol
from opticam_lite.methods.opti_cam import OBJECTIVES, SELECTORS


def n_max(A: Tensor) -> Tensor:  # eq. 17
    return A / A.max() if A.max() > 0 else torch.zeros_like(A)


def n_sigmoid(A: Tensor) -> Tensor:  # eq. 18
    return 1 / (1 + torch.exp(-A))


N = {"range": n_range, "max": n_max, "sigmoid": n_sigmoid}


def f(classifier: ol.Classifier, image: Tensor) -> Tensor:
    """Logits of one image `(3, H, W)` in [0, 1]."""
    return classifier.network((image[None] - 0.5) / 0.25)[0]


def g_c(y: Tensor, c: int, selector: str) -> Tensor:
    if selector == "logit":
        return y[c]
    if selector == "margin":
        return y[c] - max(y[j] for j in range(len(y)) if j != c)
    p = torch.exp(y[c]) / torch.exp(y).sum()
    return p if selector == "probability" else torch.log(p)


def reference_opti_cam(
    classifier: ol.Classifier,
    x: Tensor,
    c: int,
    *,
    iterations: int = 100,
    learning_rate: float = 0.1,
    objective: str = "mask",
    normalization: str = "range",
    selector: str = "logit",
    tolerance: float = 1e-10,
) -> Tensor:
    """Eqs. 8-11 for one image, with PyTorch's own Adam."""
    A = classifier.features(x[None])[0]
    n = N[normalization]

    def g(image: Tensor) -> Tensor:
        return g_c(f(classifier, image), c, selector)

    u = torch.zeros(len(A), requires_grad=True)
    adam = torch.optim.Adam([u], lr=learning_rate, maximize=True)
    best, best_mask, before = -math.inf, None, None
    for t in range(iterations + 1):
        S = sum(w * A_k for w, A_k in zip(u.softmax(0), A, strict=True))  # eq. 8
        s = n(up(S, x.shape[1:]))
        if objective == "mask":
            F = g(x * s)  # eq. 10
        elif objective == "diff":
            F = -(g(x) - g(x * s)).abs()  # eq. 19
        elif objective == "io-mask":
            F = g(x * s) - g(x * (1 - s))  # eq. A1
        else:
            F = -(g(x) - g(x * s)).abs() + (g(x) - g(x * (1 - s))).abs()  # eq. A2
        if F.item() > best:
            best, best_mask = F.item(), s.detach()
        if before is not None and abs(F.item() - before) < tolerance:
            break
        before = F.item()
        if t < iterations:
            adam.zero_grad()
            F.backward()
            adam.step()
    return best_mask


def assert_equals_reference(
    classifier: ol.Classifier, images: Tensor, targets: Tensor, **options: object
) -> None:
    masks = ol.explain("opti-cam", classifier, images, targets, **options)
    for x, c, mask in zip(images, targets.tolist(), masks, strict=True):
        expected = reference_opti_cam(classifier, x, c, **options)
        torch.testing.assert_close(mask[0], expected, rtol=0, atol=2e-3)


def test_equals_its_slow_reference(
    classifier: ol.Classifier, images: Tensor, targets: Tensor
) -> None:
    assert_equals_reference(classifier, images, targets, iterations=8)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("selector", SELECTORS)
def test_opti_cam_objectives_and_selectors(
    objective: str, selector: str, images: Tensor, targets: Tensor
) -> None:
    options = {"objective": objective, "selector": selector, "iterations": 5}
    assert_equals_reference(make_classifier("cnn"), images, targets, **options)


@pytest.mark.parametrize("normalization", ["range", "max", "sigmoid"])
@pytest.mark.parametrize("learning_rate", [0.03, 0.5])
def test_opti_cam_normalisations_and_learning_rates(
    normalization: str, learning_rate: float, images: Tensor, targets: Tensor
) -> None:
    options = {"normalization": normalization, "learning_rate": learning_rate, "iterations": 6}
    assert_equals_reference(make_classifier("cnn"), images, targets, **options)


def test_opti_cam_without_iterations_is_the_mean_feature_map(
    images: Tensor, targets: Tensor, classifier: ol.Classifier
) -> None:
    expected = ol.to_masks(classifier.features(images).mean(1, keepdim=True), (32, 32))
    masks = ol.explain("opti-cam", classifier, images, targets, iterations=0)
    torch.testing.assert_close(masks, expected)


def test_opti_cam_without_iterations_is_the_map_of_its_start(
    images: Tensor, targets: Tensor
) -> None:
    classifier = make_classifier("cnn")
    u = torch.zeros(12)
    u[3] = 50
    masks = ol.explain("opti-cam", classifier, images, targets, iterations=0, initial_u=u)
    torch.testing.assert_close(masks, ol.to_masks(classifier.features(images)[:, 3:4], (32, 32)))


def test_opti_cam_returns_the_best_objective_seen(images: Tensor, targets: Tensor) -> None:
    """With an absurd learning rate the objective jumps about; the result never falls below."""
    classifier = make_classifier("cnn")
    seen: list[Tensor] = []
    masks = ol.explain(
        "opti-cam",
        classifier,
        images,
        targets,
        iterations=15,
        learning_rate=20.0,
        callback=lambda step: seen.append(step.objective),
    )
    reached = classifier.logits(images * masks).gather(1, targets[:, None])[:, 0]
    best = torch.stack(seen).amax(0)
    assert (reached >= best - 1e-4).all()
    assert (torch.stack(seen)[-1] < best - 1e-3).any()  # else the test would show nothing


def test_opti_cam_improves_on_its_start(images: Tensor, classifier: ol.Classifier) -> None:
    targets = classifier.predict(images)
    start = ol.explain("opti-cam", classifier, images, targets, iterations=0)
    end = ol.explain("opti-cam", classifier, images, targets, iterations=20)
    before, after = (
        classifier.logits(images * m).gather(1, targets[:, None]).sum() for m in (start, end)
    )
    assert after > before


def test_any_constant_start_is_the_same_and_another_start_is_not(
    images: Tensor, targets: Tensor
) -> None:
    classifier = make_classifier("cnn")

    def run(u: Tensor | None) -> Tensor:
        return ol.explain("opti-cam", classifier, images, targets, iterations=3, initial_u=u)

    torch.testing.assert_close(run(torch.full((12,), 7.0)), run(None), rtol=0, atol=1e-4)
    u = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(run(u), run(None), atol=1e-2)
    alone = ol.explain(
        "opti-cam", classifier, images[1:2], targets[1:2], iterations=3, initial_u=u[1:2]
    )
    torch.testing.assert_close(run(u)[1:2], alone, rtol=0, atol=1e-4)
    batched = ol.explain(
        "opti-cam", classifier, images, targets, iterations=3, initial_u=u, batch_size=2
    )
    torch.testing.assert_close(run(u), batched, rtol=0, atol=1e-4)
    for same in (u.numpy(), u.tolist()):
        of_array = ol.explain(
            "opti-cam", classifier, images, targets, iterations=3, initial_u=same, batch_size=2
        )
        torch.testing.assert_close(of_array, batched, rtol=0, atol=1e-4)


def test_images_stop_one_by_one(targets: Tensor) -> None:
    """A flat image stops at once; its batch-mates go on as if it were not there."""
    classifier = make_classifier("cnn")
    images = make_images()
    images[1] = 0  # a black image: no mask changes it, so its objective never changes
    steps: list[Tensor] = []
    together = ol.explain(
        "opti-cam", classifier, images, targets, iterations=6,
        callback=lambda step: steps.append(step.objective),
    )  # fmt: skip
    assert len(steps) == 6
    history = torch.stack(steps)
    assert (history[:, 1] == history[0, 1]).all()
    for i in (0, 2):
        alone = ol.explain(
            "opti-cam", classifier, images[i : i + 1], targets[i : i + 1], iterations=6
        )
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-4)
    # a tolerance that nothing meets stops every image at its second iteration
    count: list[int] = []
    ol.explain(
        "opti-cam", classifier, images, targets, iterations=50, tolerance=1e9,
        callback=lambda step: count.append(step.index),
    )  # fmt: skip
    assert count == [1, 2]


def test_the_tolerance_judges_each_image_alone(targets: Tensor) -> None:
    """Images that stop at different iterations get the masks that they get by themselves."""
    classifier, images = make_classifier("cnn"), make_images()
    options = {"iterations": 60, "tolerance": 1e-3}

    def run(which: slice) -> tuple[Tensor, int]:
        steps: list[int] = []
        masks = ol.explain(
            "opti-cam",
            classifier,
            images[which],
            targets[which],
            callback=lambda step: steps.append(step.index),
            **options,
        )
        return masks, len(steps)

    together, longest = run(slice(None))
    alone, lengths = zip(*(run(slice(i, i + 1)) for i in range(3)), strict=True)
    assert len(set(lengths)) > 1  # else the test would show nothing
    assert longest == max(lengths) < 60
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-4)


def test_the_callback_sees_every_iteration(images: Tensor, targets: Tensor) -> None:
    classifier = make_classifier("cnn")
    steps: list[ol.methods.Step] = []
    ol.explain("opti-cam", classifier, images, targets, iterations=4, callback=steps.append)
    assert [(s.index, s.total) for s in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    mean = ol.explain("opti-cam", classifier, images, targets, iterations=0)
    torch.testing.assert_close(steps[0].masks(), mean)
    for step in steps:
        y = classifier.logits(images * step.masks()).gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(step.objective, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": -1}, "iterations is -1"),
        ({"iterations": 2.5}, "iterations is 2.5"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"tolerance": -1}, "tolerance is -1"),
        ({"objective": "masks"}, "unknown objective 'masks'; did you mean 'mask'"),
        ({"normalization": "min"}, "unknown normalization 'min'"),
        ({"selector": "logits"}, "unknown selector 'logits'; did you mean 'logit'"),
        ({"initial_u": torch.zeros(5)}, r"initial_u has shape \(5,\)"),
        ({"initial_u": torch.zeros(2, 12)}, r"initial_u has shape \(2, 12\)"),
    ],
)
def test_bad_options_of_opti_cam(options: dict, message: str, images: Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        ol.explain("opti-cam", make_classifier("cnn"), images, 0, **options)


def test_an_unknown_precision_is_refused_without_iterations_too(images: Tensor) -> None:
    with pytest.raises(ValueError, match="unknown precision 'half'"):
        ol.explain("opti-cam", make_classifier("cnn"), images, 1, iterations=0, precision="half")
