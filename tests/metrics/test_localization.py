"""Localisation metrics (eqs. A1-A7) against sets of pixels and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import measure
from torch import Tensor

from opticam_lite import metrics

H, W = 12, 16
Box = tuple[int, int, int, int]
Pixels = set[tuple[int, int]]


@st.composite
def a_box(draw: st.DrawFn) -> Box:
    x0, y0 = draw(st.integers(0, W - 1)), draw(st.integers(0, H - 1))
    return x0, y0, draw(st.integers(x0 + 1, W)), draw(st.integers(y0 + 1, H))


@st.composite
def a_map(draw: st.DrawFn) -> Tensor:
    """Maps with few levels: ties, several components, sometimes flat."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    levels, grain = draw(st.sampled_from([1, 2, 5, 1000])), draw(st.sampled_from([1, 4]))
    coarse = torch.randint(0, levels, (1, 1, H // grain, W // grain), generator=generator)
    S = coarse.repeat_interleave(grain, 2).repeat_interleave(grain, 3) / max(levels - 1, 1)
    return S * draw(st.sampled_from([1.0, 0.3]))


some_boxes = st.lists(a_box(), min_size=1, max_size=3)


def pixels_of(box: Box) -> Pixels:
    x0, y0, x1, y1 = box
    return {(y, x) for y in range(y0, y1) for x in range(x0, x1)}


def iou(a: Pixels, b: Pixels) -> float:
    return len(a & b) / len(a | b)


def slow_box(S: Tensor, threshold: float) -> Pixels:
    """The box of the largest component, by scikit-image."""
    components = measure.label(S[0, 0].double().numpy() > threshold, connectivity=2)
    regions = measure.regionprops(components)
    if not regions:
        return set()
    y0, x0, y1, x1 = max(regions, key=lambda region: region.area).bbox
    return pixels_of((x0, y0, x1, y1))


def slow_mean(S: Tensor) -> float:
    return math.fsum(S.double().flatten().tolist()) / S.numel()


def tensors(boxes: list[Box]) -> list[Tensor]:
    return [torch.tensor(boxes, dtype=torch.int64).view(-1, 4)]


@given(a_map(), some_boxes)
def test_the_equations(S: Tensor, boxes: list[Box]) -> None:
    B_p = slow_box(S, slow_mean(S))
    best = max(iou(pixels_of(box), B_p) for box in boxes)
    true = tensors(boxes)
    assert float(metrics.localization_error(S, true)) == pytest.approx(1 - best)  # A2
    for correct in (True, False):
        value = metrics.official_metric(S, true, torch.tensor([correct]))
        assert float(value) == pytest.approx(1 - best * correct)  # A1

    U = set().union(*(pixels_of(box) for box in boxes))
    inside = math.fsum(float(S[0, 0, y, x]) for y, x in U)
    total = math.fsum(S.double().flatten().tolist())
    P, R = inside / total if total else 0.0, inside / len(U)  # A3, A4
    assert float(metrics.energy_pointing_game(S, true)) == pytest.approx(P, abs=1e-6)
    F_1 = 2 * P * R / (P + R) if P + R else 0.0
    assert float(metrics.f1_score(S, true)) == pytest.approx(F_1, abs=1e-6)

    top = float(S.max())
    peaks = [(y, x) for y in range(H) for x in range(W) if float(S[0, 0, y, x]) == top]
    hits = sum(peak in U for peak in peaks) / len(peaks)  # A6
    assert float(metrics.pointing_game(S, true)) == pytest.approx(hits)

    area = max(0.05, len(B_p) / (H * W))
    value = metrics.saliency_metric(S, [0.25])
    assert float(value) == pytest.approx(math.log(area) - math.log(0.25))  # A7


@settings(max_examples=30)
@given(a_map(), some_boxes)
def test_overlaps_at_thresholds(S: Tensor, boxes: list[Box]) -> None:
    thresholds = [0.0, 0.1, 0.25, 0.5, 0.9]
    overlaps = metrics.box_overlaps(S, tensors(boxes), thresholds)
    expected = [max(iou(pixels_of(b), slow_box(S, t)) for b in boxes) for t in thresholds]
    assert overlaps.shape == (1, 5)
    assert overlaps[0].tolist() == pytest.approx(expected)


@given(a_map(), some_boxes, st.booleans(), st.floats(0, 1))
def test_ranges(S: Tensor, boxes: list[Box], correct: bool, p: float) -> None:
    true = tensors(boxes)
    overlaps = metrics.box_overlaps(S, true, [0, 0.5])
    error = metrics.localization_error(S, true)
    official = metrics.official_metric(S, true, torch.tensor([correct]))
    for values in (
        error,
        official,
        metrics.f1_score(S, true),
        metrics.energy_pointing_game(S, true),
        metrics.pointing_game(S, true),
        metrics.box_accuracy(overlaps),
        overlaps,
    ):
        assert values.dtype == torch.float64
        assert ((values >= 0) & (values <= 1)).all()
    assert (official >= error).all()
    assert -3 < float(metrics.saliency_metric(S, [p])) < 87.4


@given(a_box())
def test_a_perfect_box_scores_1(box: Box) -> None:
    S = torch.zeros(1, 1, H, W)
    x0, y0, x1, y1 = box
    S[:, :, y0:y1, x0:x1] = 1
    true = tensors([box])
    assert float(metrics.f1_score(S, true)) == 1
    assert float(metrics.energy_pointing_game(S, true)) == 1
    assert float(metrics.pointing_game(S, true)) == 1
    overlaps = metrics.box_overlaps(S, true)
    assert (overlaps == 1).all()
    assert metrics.average_box_accuracy(overlaps) == 100
    if box != (0, 0, W, H):  # a box that is the image makes a flat map
        assert metrics.predicted_boxes(S).tolist() == [list(box)]
        assert float(metrics.localization_error(S, true)) == 0
        assert float(metrics.official_metric(S, true, torch.tensor([True]))) == 0


def slow_box_accuracy(overlaps: list[list[float]]) -> float:
    """Eq. A5: average over images, maximum over η, mean over δ."""
    total = 0.0
    for delta in (0.3, 0.5, 0.7):
        shares = []
        for t in range(len(overlaps[0])):
            shares.append(sum(1 for image in overlaps if image[t] >= delta) / len(overlaps))
        total += max(shares)
    return total / 3 * 100


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**31))
def test_box_accuracy(n: int, t: int, seed: int) -> None:
    overlaps = torch.rand(n, t, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    value = metrics.average_box_accuracy(overlaps)
    assert value == pytest.approx(slow_box_accuracy(overlaps.tolist()))
    alone = metrics.box_accuracy(overlaps)
    expected = [slow_box_accuracy([row]) for row in overlaps.tolist()]
    assert (100 * alone).tolist() == pytest.approx(expected)
    assert value <= 100 * float(alone.mean()) + 1e-9
    without = torch.cat([overlaps, torch.full((1, t), torch.nan, dtype=torch.float64)])
    assert metrics.average_box_accuracy(without) == value
    assert math.isnan(metrics.box_accuracy(without)[-1])


def test_an_overlap_of_exactly_delta_counts() -> None:
    """A box of 4×4 pixels in a true one of 4×8: their IoU is 1/2."""
    S = torch.zeros(1, 1, H, W)
    S[..., 2:6, 2:6] = 1
    overlaps = metrics.box_overlaps(S, tensors([(2, 2, 10, 6)]), [0.5])
    assert overlaps.tolist() == [[0.5]]
    assert metrics.average_box_accuracy(overlaps) == pytest.approx(100 * 2 / 3)
    assert metrics.box_accuracy(overlaps).tolist() == pytest.approx([2 / 3])
    for delta, reached in ((0.5, 1), (0.5 + 1e-9, 0)):
        assert metrics.average_box_accuracy(overlaps, [delta]) == 100 * reached
        assert metrics.box_accuracy(overlaps, [delta]).tolist() == [reached]


def test_one_threshold_for_all_images() -> None:
    overlaps = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert metrics.average_box_accuracy(overlaps) == 50
    assert metrics.box_accuracy(overlaps).tolist() == [1, 1]


def test_the_usual_thresholds_are_the_hundredths() -> None:
    S = (torch.arange(H * W) / (H * W - 1)).view(1, 1, H, W)
    true = tensors([(2, 2, 10, 6)])
    overlaps = metrics.box_overlaps(S, true, np.linspace(0, 0.99, 100).tolist())
    torch.testing.assert_close(metrics.box_overlaps(S, true), overlaps)


def test_thresholds_are_of_maps_above_them() -> None:
    S = torch.zeros(1, 1, H, W)
    S[..., 2:4, 2:4], S[..., 6:10, 6:10] = 1.0, 0.5
    true = tensors([(2, 2, 4, 4)])
    assert metrics.box_overlaps(S, true, [0.0, 0.49, 0.5, 0.99, 1.0]).tolist() == [[0, 0, 1, 1, 0]]


def test_pixels_that_touch_at_a_corner_are_connected() -> None:
    S = torch.zeros(1, 1, H, W)
    S[..., [2, 3, 4], [2, 3, 4]] = 1
    S[..., 8, 8:10] = 1
    assert metrics.predicted_boxes(S).tolist() == [[2, 2, 5, 5]]


def test_the_first_in_reading_order_of_equal_components() -> None:
    S = torch.zeros(1, 1, H, W)
    S[..., 8, 2:4] = S[..., 1, 9:11] = 1
    assert metrics.predicted_boxes(S).tolist() == [[9, 1, 11, 2]]


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 1.0])
def test_flat_maps(value: float) -> None:
    # 0.1 and 0.3: the mean of many of them is not exactly the value.
    S, true = torch.full((1, 1, 224, 224), value), tensors([(0, 0, 112, 56)])
    assert metrics.predicted_boxes(S).tolist() == [[0, 0, 0, 0]]
    assert float(metrics.localization_error(S, true)) == 1
    assert float(metrics.pointing_game(S, true)) == 1 / 8  # the share of tied peaks in the box
    assert float(metrics.energy_pointing_game(S, true)) == pytest.approx(1 / 8 * (value > 0))
    expected = 2 * value / (8 * value + 1)
    assert float(metrics.f1_score(S, true)) == pytest.approx(expected)
    assert metrics.box_overlaps(S, true, [1.0]).tolist() == [[0]]
    assert float(metrics.saliency_metric(S, [1.0])) == pytest.approx(math.log(0.05))


def test_ties_are_resolved_without_favour() -> None:
    S = torch.zeros(1, 1, H, W)
    S[..., 0, 0] = S[..., H - 1, W - 1] = S[..., 0, W - 1] = S[..., H - 1, 0] = 1
    for box in [(0, 0, 1, 1), (W - 1, H - 1, W, H)]:
        assert float(metrics.pointing_game(S, tensors([box]))) == 1 / 4
    assert float(metrics.pointing_game(S, tensors([(0, 0, W, 1)]))) == 1 / 2


def test_images_without_boxes_are_not_defined() -> None:
    S = torch.rand(2, 1, H, W, generator=torch.Generator().manual_seed(0))
    boxes = [*tensors([]), *tensors([(1, 2, 5, 6)])]
    overlaps = metrics.box_overlaps(S, boxes)
    for values in (
        metrics.localization_error(S, boxes),
        metrics.official_metric(S, boxes, torch.tensor([True, True])),
        metrics.f1_score(S, boxes),
        metrics.energy_pointing_game(S, boxes),
        metrics.pointing_game(S, boxes),
        metrics.box_accuracy(overlaps),
        overlaps[:, 0],
    ):
        assert values.isnan().tolist() == [True, False]
    assert math.isfinite(metrics.average_box_accuracy(overlaps))
    assert math.isnan(metrics.average_box_accuracy(overlaps[:1]))


def test_a_box_is_counted_once_in_the_union() -> None:
    S = torch.full((1, 1, H, W), 0.5)
    once, twice = tensors([(0, 0, 4, 4)]), tensors([(0, 0, 4, 4), (0, 0, 4, 4)])
    for metric in (metrics.f1_score, metrics.energy_pointing_game, metrics.pointing_game):
        assert torch.equal(metric(S, once), metric(S, twice))


def test_saliency_metric_at_the_ends_of_p() -> None:
    S = torch.zeros(3, 1, H, W)
    S[..., :6, :8] = 1
    values = metrics.saliency_metric(S, [1.0, 0.5, 0.0])
    tiny = float(np.finfo(np.float32).tiny)
    expected = [math.log(0.25) - math.log(p) for p in (1.0, 0.5, tiny)]
    assert values.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([(0, 0, 4, H + 1)], "leaves its image of 12×16"),
        ([(0, 0, W + 1, 4)], "leaves its image"),
        ([(-1, 0, 4, 4)], "leaves its image"),
        ([(0, -1, 4, 4)], "leaves its image"),
        ([(4, 4, 4, 8)], "is empty"),
        ([(4, 4, 8, 4)], "is empty"),
        ([(4, 4, 3, 8)], "is empty"),
        ([(4, 4, 8, 3)], "is empty"),
    ],
)
def test_bad_boxes(boxes: list[Box], message: str) -> None:
    S = torch.zeros(1, 1, H, W)
    for metric in (metrics.localization_error, metrics.f1_score, metrics.box_overlaps):
        with pytest.raises(ValueError, match=message):
            metric(S, tensors(boxes))


def test_bad_input() -> None:
    S = torch.zeros(2, 1, H, W)
    with pytest.raises(ValueError, match="2 masks need boxes for each; 1 were given"):
        metrics.localization_error(S, tensors([]))
    with pytest.raises(ValueError, match="1 masks need boxes for each; 2 were given"):
        metrics.localization_error(S[:1], 2 * tensors([]))
    for shape in ((3,), (2, 3), (2, 5), (1, 4, 1)):
        with pytest.raises(ValueError, match=r"\(M, 4\) is needed"):
            metrics.f1_score(S[:1], [torch.zeros(shape)])
    with pytest.raises(ValueError, match="p must be a vector of 2 values"):
        metrics.saliency_metric(S, [0.5])
    with pytest.raises(ValueError, match="masks hold NaN"):
        metrics.predicted_boxes(S * torch.nan)


MASKS = torch.linspace(0, 1, 2 * H * W).view(2, 1, H, W)
BOXES = [torch.tensor([[0, 0, 4, 4]]), torch.tensor([[1, 2, 5, 9]])]


@pytest.mark.parametrize("metric", [metrics.f1_score, metrics.energy_pointing_game])
def test_masks_out_of_range_are_refused(metric) -> None:
    with pytest.raises(ValueError, match=r"masks hold -1; values in \[0, 1\] are needed"):
        metric(2 * MASKS - 1, BOXES)


def test_boxes_are_whole_pixels() -> None:
    with pytest.raises(ValueError, match=r"boxes are .*0\.5.*; whole pixels are needed"):
        metrics.f1_score(MASKS[:1], [torch.tensor([[0.5, 0, 4, 4]])])
    whole = metrics.f1_score(MASKS[:1], [BOXES[0].double()])
    assert torch.equal(whole, metrics.f1_score(MASKS[:1], BOXES[:1]))


@pytest.mark.parametrize(
    "correct", [torch.tensor([[True], [False]]), torch.tensor([7, 0]), torch.tensor([True])]
)
def test_correct_is_a_truth_for_each_mask(correct: Tensor) -> None:
    with pytest.raises(ValueError, match=r"correct is .*; 2 masks need bool \(2,\)"):
        metrics.official_metric(MASKS, BOXES, correct)


def test_no_images_give_no_values() -> None:
    assert metrics.saliency_metric(MASKS[:0], torch.zeros(0)).shape == (0,)
    assert metrics.box_overlaps(MASKS[:0], [], [0.2, 0.5]).shape == (0, 2)
    for metric in (metrics.localization_error, metrics.f1_score, metrics.pointing_game):
        assert metric(MASKS[:0], []).shape == (0,)
    assert metrics.official_metric(MASKS[:0], [], torch.zeros(0, dtype=torch.bool)).shape == (0,)
