"""Upsampling, normalisation (eqs. 16-18) and masking."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_classifier, make_images
from hypothesis import given, settings
from hypothesis import strategies as st

import opticam_lite as ol
from opticam_lite.masking import check_range


def slow_bilinear(image: list[list[float]], height: int, width: int) -> list[list[float]]:
    """Bilinear interpolation with pixel centres at ½ (align_corners=False), one pixel at a time."""
    h, w = len(image), len(image[0])
    result = []
    for y in range(height):
        row = []
        for x in range(width):
            sy = min(max((y + 0.5) * h / height - 0.5, 0), h - 1)
            sx = min(max((x + 0.5) * w / width - 0.5, 0), w - 1)
            y0, x0 = int(sy), int(sx)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            fy, fx = sy - y0, sx - x0
            top = (1 - fx) * image[y0][x0] + fx * image[y0][x1]
            bottom = (1 - fx) * image[y1][x0] + fx * image[y1][x1]
            row.append((1 - fy) * top + fy * bottom)
        result.append(row)
    return result


def test_upsampling_is_bilinear_without_aligned_corners() -> None:
    maps = torch.rand(1, 1, 3, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor(slow_bilinear(maps[0, 0].tolist(), 7, 16))
    torch.testing.assert_close(ol.upsample(maps, (7, 16))[0, 0], expected)
    with pytest.raises(ValueError, match="zip"):
        ol.upsample(maps, (7, 16, 3))


A = torch.tensor([[[[1.0, 2.0], [3.0, 5.0]]], [[[-2.0, 0.0], [2.0, 6.0]]]])


def test_normalisations_by_hand() -> None:
    assert ol.normalize(A)[0].flatten().tolist() == [0, 0.25, 0.5, 1]
    assert ol.normalize(A)[1].flatten().tolist() == [0, 0.25, 0.5, 1]
    torch.testing.assert_close(
        ol.normalize(A, "max")[0].flatten(), torch.tensor([0.2, 0.4, 0.6, 1])
    )
    torch.testing.assert_close(ol.normalize(A, "max")[1].flatten(), torch.tensor([0, 0, 1 / 3, 1]))
    expected = 1 / (1 + math.exp(2))
    assert ol.normalize(A, "sigmoid")[1, 0, 0, 0].item() == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 0.1, 1e30])
def test_a_constant_map_becomes_zeros(value: float) -> None:
    flat = torch.full((2, 1, 7, 7), value)
    assert not ol.normalize(flat).any()
    assert not ol.to_masks(flat, (224, 224)).any()  # upsampling may round, but makes no structure
    assert not ol.normalize(flat.clamp(max=0), "max").any()


@pytest.mark.parametrize("value", [1.0, -3.0, 1e30])
def test_a_map_is_constant_where_it_varies_by_less_than_a_millionth(value: float) -> None:
    """That is what rounding leaves; a thousandth is structure and has to be stretched."""
    varied = torch.tensor([0.0, 0.25, 0.5, 1]).view(1, 1, 2, 2)
    stretched = ol.normalize(value * (1 + 1e-3 * varied))
    torch.testing.assert_close(stretched, varied if value > 0 else 1 - varied, rtol=0, atol=1e-3)
    assert not ol.normalize(value * (1 + 1e-7 * varied.double())).any()
    assert ol.normalize(value * (1 + 2e-6 * varied.double())).max() == 1


def test_each_map_is_normalised_by_itself() -> None:
    together = ol.normalize(A)
    for i in range(2):
        torch.testing.assert_close(ol.normalize(A[i : i + 1]), together[i : i + 1])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=6, max_size=6),
    st.sampled_from(["range", "max", "sigmoid"]),
)
def test_masks_lie_between_zero_and_one(values: list[float], normalization: str) -> None:
    masks = ol.to_masks(torch.tensor(values).view(1, 1, 2, 3), (9, 9), normalization)
    assert torch.isfinite(masks).all()
    assert masks.min() >= 0
    assert masks.max() <= 1


def test_gradients_are_finite_even_on_flat_maps() -> None:
    maps = torch.ones(1, 1, 3, 3, requires_grad=True)
    ol.to_masks(maps, (8, 8)).sum().backward()
    assert torch.isfinite(maps.grad).all()


def test_an_unknown_normalization_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown normalization 'rang'; did you mean 'range'\?"):
        ol.normalize(A, "rang")
    for name in ("all", "n", "ratio", "size"):  # before, between and behind them
        with pytest.raises(ValueError, match=f"'{name}'.* Valid names: range, max, sigmoid"):
            ol.normalize(A, name)


def test_masked_probabilities(images: torch.Tensor, targets: torch.Tensor) -> None:
    classifier = make_classifier("cnn")
    masks = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    p, o = ol.masked_probabilities(classifier, images, masks, targets)
    for i, c in enumerate(targets.tolist()):
        logits = classifier.network((images[i : i + 1] - 0.5) / 0.25)
        assert p[i].item() == pytest.approx(logits.softmax(1)[0, c].item(), abs=1e-6)
        logits = classifier.network((images[i : i + 1] * masks[i] - 0.5) / 0.25)
        assert o[i].item() == pytest.approx(logits.softmax(1)[0, c].item(), abs=1e-6)
    two = ol.masked_probabilities(classifier, images[:2], masks[:2], targets[:2])
    torch.testing.assert_close(two, (p[:2], o[:2]))


@pytest.mark.parametrize(
    "shape", [(2, 24, 32), (1, 1, 24, 32), (3, 1, 24, 32), (2, 1, 23, 32), (2, 1, 24, 33)]
)
def test_masks_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"need masks of shape \(2, 1, 24, 32\)"):
        ol.masked_probabilities(make_classifier("cnn"), make_images(2, 24), torch.ones(shape), 0)


@pytest.mark.parametrize("value", [-0.5, -0.001, 1.001, 1.5])
def test_only_rounding_leaves_the_range(value: float) -> None:
    check_range("masks", torch.tensor([-5e-7, 0, 1, 1 + 5e-7]))
    with pytest.raises(ValueError, match=f"masks hold {value}; values in"):
        check_range("masks", torch.tensor([0, value, 1]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, m: (x * 255, m), ValueError, "RGB in .0, 1. is needed"),
        (lambda x, m: ((x * 255).byte(), m), TypeError, "float32 in .0, 1. is needed"),
        (lambda x, m: (x, m.numpy()), TypeError, "masks must be a torch.Tensor, not ndarray"),
        (lambda x, m: (x, m.tolist()), TypeError, "masks must be a torch.Tensor, not list"),
        (lambda x, m: (x, 3 * m - 1), ValueError, "masks hold -1; values in .0, 1. are needed"),
        (lambda x, m: (x, m / 0), ValueError, "masks hold (nan|inf); values"),
    ],
)
def test_values_that_are_no_images_or_masks(change, error, message, images: torch.Tensor) -> None:
    masks = torch.linspace(0, 1, 32 * 32).view(1, 1, 32, 32).repeat(3, 1, 1, 1)
    with pytest.raises(error, match=message):
        ol.masked_probabilities(make_classifier("cnn"), *change(images, masks), 0)
