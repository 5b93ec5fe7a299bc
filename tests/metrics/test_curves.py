"""Insertion, deletion and AOPC against plain loops and Quantus, and their properties."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import NETWORKS, make_classifier, make_images, peer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import opticam_lite as ol
from opticam_lite import metrics
from opticam_lite.metrics.curves import _ranks
from opticam_lite.network import Quick


def make_sharp(kind: str) -> ol.Classifier:
    """One of the small networks, made so sure of itself that every pixel counts."""
    network = make_classifier(kind).network
    last = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
    last.weight.mul_(SHARPNESS[kind])
    return ol.Classifier(
        network, NETWORKS[kind][1], mean=(0.5,) * 3, std=(0.25,) * 3, size=32, device="cpu"
    )


SHARPNESS = {"cnn": 30, "dense": 100, "vit": 30}
CNN = make_sharp("cnn")


@pytest.fixture(scope="module", params=list(NETWORKS))
def classifier(request: pytest.FixtureRequest) -> ol.Classifier:
    """Each of the small networks in turn, sharpened."""
    return make_sharp(request.param)


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Three images without black."""
    return 0.2 + 0.8 * make_images()


def make_saliency(n: int, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    """Random maps without ties."""
    generator = torch.Generator().manual_seed(seed)
    pixels = height * width
    maps = [torch.randperm(pixels, generator=generator) / pixels for _ in range(n)]
    return torch.stack(maps).view(n, 1, height, width)


def probability(classifier: ol.Classifier, image: np.ndarray, c: int) -> float:
    with torch.no_grad():
        logits = classifier.logits(torch.from_numpy(image)[None])
    return float(logits.softmax(1)[0, c])


def slow_replacement(
    classifier: ol.Classifier, start: Tensor, end: Tensor, S: Tensor, c: int
) -> tuple[float, list[float]]:
    """RISE's procedure: one image, one step at a time, pixels in the order of argsort(−S)."""
    height, width = S.shape[1:]
    order = np.argsort(-S.numpy().ravel())
    image, final = start.numpy().copy(), end.numpy()
    values = [probability(classifier, image, c)]
    for k in range(height):
        for pixel in order[k * width : (k + 1) * width]:
            y, x = divmod(int(pixel), width)
            image[:, y, x] = final[:, y, x]
        values.append(probability(classifier, image, c))
    area = sum((a + b) / 2 for a, b in pairwise(values)) / height
    return area, values


def slow_blur(image: Tensor) -> Tensor:
    """A Gaussian of 11×11, σ = 5, mirrored at the border."""
    weights = [[np.exp(-(dy**2 + dx**2) / 50) for dx in range(-5, 6)] for dy in range(-5, 6)]
    kernel = np.array(weights) / np.sum(weights)
    padded = np.pad(image.double().numpy(), ((0, 0), (5, 5), (5, 5)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (11, 11), axis=(1, 2))
    return torch.from_numpy((windows * kernel).sum((3, 4))).float()


def test_insertion_and_deletion_are_rises(classifier: ol.Classifier, images: Tensor) -> None:
    S, predicted = make_saliency(3), classifier.predict(images)
    inserted = metrics.insertion(classifier, images, S)
    deleted = metrics.deletion(classifier, images, S)
    assert inserted.values.shape == deleted.values.shape == (3, 33)
    assert inserted.areas.dtype == deleted.values.dtype == torch.float64
    assert (deleted.values.amax(1) - deleted.values.amin(1)).amin() > 0.1
    assert (inserted.values.amax(1) - inserted.values.amin(1)).amin() > 0.02
    for i, c in enumerate(predicted[:2].tolist()):
        black, blurred = torch.zeros_like(images[i]), slow_blur(images[i])
        area, values = slow_replacement(classifier, images[i], black, S[i], c)
        assert deleted.values[i].tolist() == pytest.approx(values, abs=1e-5)
        assert float(deleted.areas[i]) == pytest.approx(area, abs=1e-5)
        area, values = slow_replacement(classifier, blurred, images[i], S[i], c)
        assert inserted.values[i].tolist() == pytest.approx(values, abs=1e-5)
        assert float(inserted.areas[i]) == pytest.approx(area, abs=1e-5)


def test_a_step_is_a_rows_worth_of_pixels() -> None:
    images, S = make_images(1, 24, 40), make_saliency(1, 24, 40)
    curves = metrics.deletion(CNN, images, S, 2)
    area, values = slow_replacement(CNN, images[0], torch.zeros_like(images[0]), S[0], 2)
    assert curves.values[0].tolist() == pytest.approx(values, abs=1e-5)
    assert float(curves.areas[0]) == pytest.approx(area, abs=1e-5)


INCREASING: list[Callable[[Tensor], Tensor]] = [
    lambda S: S * 2 + 1,
    lambda S: S**3,
    lambda S: S.double().exp(),
    lambda S: -1 / (S + 0.5),
]


@settings(max_examples=8)
@given(st.integers(0, 2**31), st.sampled_from(INCREASING), st.sampled_from([3, 40, 1000]))
def test_only_the_order_counts(
    seed: int, increasing: Callable[[Tensor], Tensor], levels: int
) -> None:
    S = torch.randint(0, levels, (1, 1, 16, 16), generator=torch.Generator().manual_seed(seed))
    S, image = S / levels, make_images(1, 16, 16)
    for metric in (metrics.insertion, metrics.deletion):
        assert torch.equal(metric(CNN, image, S).values, metric(CNN, image, increasing(S)).values)


@settings(max_examples=8)
@given(st.integers(0, 2**31))
def test_deletion_is_insertion_of_the_negative_map_backwards(seed: int) -> None:
    S, image = make_saliency(1, 16, 16, seed), make_images(1, 16, 16)
    black = torch.zeros_like(image)
    deleted = metrics.deletion(CNN, image, S, 1)
    inserted = metrics.replacement(CNN, black, image, -S, 1)
    torch.testing.assert_close(deleted.values, inserted.values.flip(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(deleted.areas, inserted.areas, atol=1e-6, rtol=0)


def test_the_ends(classifier: ol.Classifier, images: Tensor, targets: Tensor) -> None:
    S = make_saliency(3)
    p = classifier.probabilities(images).double().gather(1, targets[:, None])[:, 0]
    black = classifier.probabilities(torch.zeros_like(images)).double()
    deleted = metrics.deletion(classifier, images, S, targets).values
    inserted = metrics.insertion(classifier, images, S, targets).values
    torch.testing.assert_close(deleted[:, 0], p, atol=1e-6, rtol=0)
    torch.testing.assert_close(inserted[:, -1], p, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        deleted[:, -1], black.gather(1, targets[:, None])[:, 0], atol=1e-6, rtol=0
    )


def test_alone_as_in_a_batch_of_any_size(classifier: ol.Classifier, images: Tensor) -> None:
    S = make_saliency(3).mul(20).round()  # with ties
    for metric in (metrics.insertion, metrics.aopc):
        together = metric(classifier, images, S, 1)
        for other in (
            metric(classifier, images[1:2], S[1:2], 1).values,
            metric(classifier, images, S, 1, batch_size=100).values[1:2],
        ):
            torch.testing.assert_close(together.values[1:2], other, atol=1e-6, rtol=0)


def test_as_many_steps_at_once_as_the_network_has_memory_for(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    logits = Quick.logits

    def counted(quick: Quick, x: Tensor) -> Tensor:
        sizes.append(len(x))
        return logits(quick, x)

    monkeypatch.setattr(Quick, "logits", counted)
    monkeypatch.setattr(ol.Classifier, "images_at_once", lambda self, size: 3)
    metrics.deletion(CNN, images[:1], make_saliency(1), 1)
    assert max(sizes) == 3
    metrics.deletion(CNN, images[:1], make_saliency(1), 1, batch_size=5)
    assert max(sizes) == 5


class Logits(nn.Module):
    """What Quantus takes for a network."""

    def __init__(self, classifier: ol.Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.logits(images)


def test_deletion_is_quantus_pixel_flipping() -> None:
    images, S, targets = make_images(2, 24, 32), make_saliency(2, 24, 32), torch.tensor([0, 3])
    measure = peer("quantus").PixelFlipping(
        features_in_step=3 * 32,  # it counts the values of all channels
        perturb_baseline=0.0,
        normalise=False,
        abs=False,
        disable_warnings=True,
    )
    arrays = images.numpy(), targets.numpy(), S.numpy()
    theirs = measure(Logits(CNN).eval(), *arrays, device="cpu", softmax=True)
    ours = metrics.deletion(CNN, images, S, targets)
    # It leaves the start out of its curve.
    np.testing.assert_allclose(np.array(theirs), ours.values[:, 1:], atol=1e-5)


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([1, 2, 1000]), st.floats(-5, 5))
def test_ranges(seed: int, levels: int, offset: float) -> None:
    """Of flat maps and of maps of any range, too."""
    S = torch.randint(0, levels, (1, 1, 16, 16), generator=torch.Generator().manual_seed(seed))
    S, image = S / levels + offset, make_images(1, 16, 16, seed=seed)
    for metric in (metrics.insertion, metrics.deletion):
        areas, values = metric(CNN, image, S)
        assert 0 <= float(areas) <= 1
        assert values.shape == (1, 17)
        assert ((values >= 0) & (values <= 1)).all()
    areas, values = metrics.aopc(CNN, image, S, seed % 5, patch=3)
    assert -1 <= float(areas) <= 1
    assert ((values >= 0) & (values <= 1)).all()


def test_ties_favour_no_place() -> None:
    ranks = _ranks(torch.zeros(2, 1024), seed=0).double()
    assert sorted(ranks[0].tolist()) == list(range(1024))
    assert torch.equal(ranks[0], ranks[1])
    quarters = ranks[0].view(2, 16, 2, 16).mean((1, 3))  # by position the upper two would be 256
    assert ((quarters - 511.5).abs() < 60).all()
    assert not torch.equal(ranks[0], _ranks(torch.zeros(1, 1024), seed=1)[0].double())


def test_the_map_goes_before_the_ties() -> None:
    S = torch.tensor([[0.0, 2.0, 0.0, 3.0, -1.0, 2.0]])
    ranks = _ranks(S, seed=0)[0].tolist()
    assert ranks[3] == 0
    assert {ranks[1], ranks[5]} == {1, 2}
    assert {ranks[0], ranks[2]} == {3, 4}
    assert ranks[4] == 5


@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_defined_at_p_0_and_1(logit: float) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.append(nn.Linear(4, 2))
    nn.init.zeros_(network[3].weight)
    network[3].bias = nn.Parameter(torch.tensor([logit, 0.0]))
    classifier = ol.Classifier(network, "0", size=16, device="cpu")
    images, S = make_images(1, 16, 16), torch.zeros(1, 1, 16, 16)
    expected = pytest.approx([float(logit > 0)], abs=1e-12)
    assert metrics.insertion(classifier, images, S, 0).areas.tolist() == expected
    assert metrics.deletion(classifier, images, S, 0).areas.tolist() == expected
    assert metrics.aopc(classifier, images, S, 0, patch=4).areas.tolist() == [0]


def slow_aopc(classifier: ol.Classifier, image: Tensor, S: Tensor, c: int, patch: int, L: int):
    """Mean of p − p_k, blackening patch after patch."""
    height, width = S.shape[1:]
    corners = [(y, x) for y in range(0, height, patch) for x in range(0, width, patch)]
    corners.sort(key=lambda at: -float(S[0, at[0] : at[0] + patch, at[1] : at[1] + patch].sum()))
    pixels = image.numpy().copy()
    p, falls = probability(classifier, pixels, c), []
    for y, x in corners[:L]:
        pixels[:, y : y + patch, x : x + patch] = 0
        falls.append(p - probability(classifier, pixels, c))
    return sum(falls) / len(falls)


def test_aopc_is_of_the_predicted_class_by_default(images: Tensor) -> None:
    S = make_saliency(3)
    predicted, default = CNN.predict(images), metrics.aopc(CNN, images, S, patch=4)
    assert torch.equal(default.values, metrics.aopc(CNN, images, S, predicted, patch=4).values)
    others = (predicted + 1) % CNN.classes
    assert not torch.equal(default.values, metrics.aopc(CNN, images, S, others, patch=4).values)


@pytest.mark.parametrize(("patch", "regions"), [(4, 10), (14, 10), (32, 1)])
def test_aopc(
    classifier: ol.Classifier, images: Tensor, targets: Tensor, patch: int, regions: int
) -> None:
    S = make_saliency(3).double()
    curves = metrics.aopc(classifier, images, S, targets, patch=patch, regions=regions)
    assert curves.areas.abs().amax() > 0.03
    assert curves.values.shape == (3, 1 + min(regions, (-(-32 // patch)) ** 2))
    for i, c in enumerate(targets.tolist()):
        expected = slow_aopc(classifier, images[i], S[i], c, patch, regions)
        assert float(curves.areas[i]) == pytest.approx(expected, abs=1e-6)


def test_aopc_of_an_image_that_is_not_square() -> None:
    images, S = 0.2 + 0.8 * make_images(1, 24, 40), make_saliency(1, 24, 40).double()
    for height, width in ((24, 40), (40, 24)):
        x, s = images.reshape(1, 3, height, width), S.reshape(1, 1, height, width)
        curves = metrics.aopc(CNN, x, s, 2, patch=14, regions=3)
        expected = slow_aopc(CNN, x[0], s[0], 2, 14, 3)
        assert float(curves.areas) == pytest.approx(expected, abs=1e-6)


def test_curves_have_no_gradient() -> None:
    images = make_images(1, 16, 16).requires_grad_()
    assert not metrics.aopc(CNN, images, make_saliency(1, 16, 16), 0, patch=4).values.requires_grad


def test_aopc_is_quantus_region_perturbation(
    classifier: ol.Classifier, images: Tensor, targets: Tensor
) -> None:
    S = make_saliency(3)

    def by_quantus(baseline: float | str) -> np.ndarray:
        measure = peer("quantus").RegionPerturbation(
            patch_size=8,
            regions_evaluation=10,
            perturb_baseline=baseline,
            normalise=False,
            disable_warnings=True,
        )
        curves = measure(
            Logits(classifier).eval(), images.numpy(), targets.numpy(), S.numpy(), device="cpu"
        )
        return np.array(curves)

    ours = metrics.aopc(classifier, images, S, targets, patch=8)
    theirs = by_quantus(0.0)
    falls = (ours.values[:, :1] - ours.values[:, 1:]).numpy()
    np.testing.assert_allclose(theirs, falls, atol=1e-5)
    np.testing.assert_allclose(theirs.mean(1), ours.areas, atol=1e-5)
    # Its "black" is the darkest value of the image, not 0.
    assert np.abs(by_quantus("black") - falls).max() > 1e-3
    # Samek et al. count step 0, too, and divide by L + 1.
    with_0 = (ours.values[:, :1] - ours.values).mean(1)
    torch.testing.assert_close(with_0, ours.areas * 10 / 11)


def test_the_curves_of_one_image_can_be_drawn(images: Tensor) -> None:
    S = make_saliency(1)
    inserted = metrics.insertion(CNN, images[:1], S)
    deleted = metrics.deletion(CNN, images[:1], S)
    series = {"insertion": inserted.values[0], "deletion": deleted.values[0]}
    picture = ol.plots.curves(series, xlabel="steps", ylabel="probability")
    assert picture.png.startswith(b"\x89PNG")
    assert f"insertion goes from {inserted.values[0, 0]:.3g}" in picture.alt


def test_no_images() -> None:
    empty = metrics.deletion(CNN, torch.zeros(0, 3, 32, 32), torch.zeros(0, 1, 32, 32))
    assert (empty.areas.shape, empty.values.shape) == ((0,), (0, 33))


@pytest.mark.parametrize(
    ("masks", "options", "message"),
    [
        (torch.zeros(3, 1, 16, 16), {}, r"need masks of shape \(3, 1, 32, 32\)"),
        (torch.zeros(3, 3, 32, 32), {}, r"\(N, 1, H, W\) is needed"),
        (torch.full((3, 1, 32, 32), torch.nan), {}, "masks hold NaN"),
        (torch.zeros(3, 1, 32, 32), {"batch_size": 0}, "batch_size is 0"),
        (torch.zeros(3, 1, 32, 32), {"batch_size": 2.5}, "batch_size is 2.5; a whole number"),
        (torch.zeros(3, 1, 32, 32), {"seed": 0.5}, "seed is 0.5; a whole number"),
        (torch.zeros(3, 1, 32, 32), {"seed": -1}, "seed is -1; a whole number"),
        (torch.zeros(3, 1, 32, 32), {"seed": 2**63}, f"seed is {2**63}; a whole number"),
    ],
)
def test_bad_input(images: Tensor, masks: Tensor, options: dict, message: str) -> None:
    for metric in (metrics.insertion, metrics.deletion, metrics.aopc):
        with pytest.raises(ValueError, match=message):
            metric(CNN, images, masks, 0, **options)
    for options in ({"regions": 0}, {"regions": 2.5}, {"patch": 0}, {"patch": 2.5}):
        (name, value), *_ = options.items()
        with pytest.raises(ValueError, match=f"{name} is {value}; a whole number ≥ 1 is needed"):
            metrics.aopc(CNN, images, torch.zeros(3, 1, 32, 32), 0, **options)


def test_whole_numbers_may_be_of_any_type(images: Tensor) -> None:
    S = make_saliency(3)
    inserted = [metrics.insertion(CNN, images, S, 0, batch_size=n).areas for n in (8, 8.0)]
    assert torch.equal(*inserted)
    perturbed = [
        metrics.aopc(CNN, images, S, 0, patch=n * 7, regions=n, seed=n).areas
        for n in (2, 2.0, np.int64(2))
    ]
    assert torch.equal(perturbed[0], perturbed[1])
    assert torch.equal(perturbed[0], perturbed[2])


def test_the_least_and_the_largest_numbers() -> None:
    images, S = make_images(1, 16, 16), make_saliency(1, 16, 16)
    curves = metrics.aopc(CNN, images, S, 0, patch=1, regions=1, batch_size=1, seed=2**63 - 1)
    torch.testing.assert_close(curves.areas, curves.values[:, 0] - curves.values[:, 1])


def test_aopc_has_the_paper_s_ten_patches_of_14() -> None:
    images, S = make_images(1, 64, 64), make_saliency(1, 64, 64)
    usual = metrics.aopc(CNN, images, S, 0)
    assert usual.values.shape == (1, 11)
    assert torch.equal(usual.values, metrics.aopc(CNN, images, S, 0, patch=14, seed=0).values)


@pytest.mark.parametrize("curve", [metrics.insertion, metrics.deletion, metrics.aopc])
def test_the_seed_is_0(curve: Callable[..., metrics.Curves], images: Tensor) -> None:
    """It orders pixels of equal saliency."""
    flat = torch.ones(3, 1, 32, 32)
    found = curve(CNN, images, flat, 0).values
    assert torch.equal(found, curve(CNN, images, flat, 0, seed=0).values)
    assert not torch.equal(found, curve(CNN, images, flat, 0, seed=1).values)


def test_both_ends_of_a_curve_are_images_of_one_shape(images: Tensor) -> None:
    masks = torch.rand(3, 1, 32, 32)
    with pytest.raises(ValueError, match=r"start has shape .* and end .*; the same is needed"):
        metrics.curves.replacement(CNN, images, images[:2], masks, 0)
    with pytest.raises(ValueError, match=r"RGB in \[0, 1\] is needed"):
        metrics.curves.replacement(CNN, images, images * 255, masks, 0)


def test_no_images_give_no_curve(images: Tensor) -> None:
    assert metrics.aopc(CNN, images[:0], torch.rand(0, 1, 32, 32), 0).areas.shape == (0,)
