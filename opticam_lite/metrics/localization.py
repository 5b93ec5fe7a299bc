"""Localisation: saliency against the boxes of the objects (paper, Appendix B.1, eqs. A1-A7).

`masks` S are `(N, 1, H, W)` in [0, 1]; `boxes` hold one int64 tensor `(M, 4)` for each image: x0,
y0, x1, y1 in pixels, right and bottom exclusive. Functions return float64 `(N,)`, NaN for an image
without boxes (M = 0), and raise ValueError for other shapes or values.

The predicted box B_p is that of the largest connected component above the mean of the map. Pixels
that touch at a corner are connected, as in the code of [66]; of equally large components the first
in reading order is taken. A flat map has nothing above its mean: B_p is empty and overlaps nothing.
U is the union of the true boxes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from ..masking import check_range
from ..network import usual
from .faithfulness import Probabilities, check_probabilities
from .registry import METRICS, Case, check_masks

Boxes = Sequence[Tensor]

THRESHOLDS = tuple(i / 100 for i in range(100))
DELTAS = (0.3, 0.5, 0.7)


def _of_boxes(metric: Callable[..., Tensor], case: Case) -> Tensor:
    return 100 * metric(case.masks, case.boxes)


def _official_metric(metric: Callable[..., Tensor], case: Case) -> Tensor:
    values = 100 * metric(case.masks, case.boxes, case.predicted == case.targets)
    # Without a true class it is not known whether the predicted one is right.
    return values if case.known is None else values.where(case.known.to(values.device), torch.nan)


@METRICS.register(
    "OM",
    title="Official metric",
    source="Zhang et al. 2024, eq. A1",
    better="lower",
    needs="boxes",
    of_case=_official_metric,
)
@usual()
def official_metric(masks: Tensor, boxes: Boxes, correct: Tensor) -> Tensor:
    """Return OM = 1 − max_B IoU(B, B_p) · 1[c_p = c], in [0, 1]; lower is better (eq. A1).

    Args:
        masks, boxes: See the module.
        correct: bool `(N,)`: whether the predicted class is the true one, c_p = c.
    """
    correct = torch.as_tensor(correct)
    if correct.dtype != torch.bool or correct.shape != (len(masks),):
        raise ValueError(
            f"correct is {correct.dtype} of shape {tuple(correct.shape)}; {len(masks)} masks need "
            f"bool ({len(masks)},)"
        )
    overlap = 1 - localization_error(masks, boxes)
    return 1 - overlap * correct.to(overlap.device)


@METRICS.register(
    "LE",
    title="Localization error",
    source="Zhang et al. 2024, eq. A2",
    better="lower",
    needs="boxes",
    of_case=_of_boxes,
)
def localization_error(masks: Tensor, boxes: Boxes) -> Tensor:
    """Return LE = 1 − max_B IoU(B, B_p), in [0, 1]; lower is better (eq. A2)."""
    boxes = _check_boxes(masks, boxes)
    overlaps = masks.new_zeros(len(masks), dtype=torch.float64)
    for i, predicted in enumerate(predicted_boxes(masks)):
        overlaps[i] = _overlap(predicted[None], boxes[i])
    return 1 - overlaps


@METRICS.register(
    "F1",
    title="Pixel-wise F1 score",
    source="Zhang et al. 2024, Appendix B.1",
    better="higher",
    needs="boxes",
    of_case=_of_boxes,
)
def f1_score(masks: Tensor, boxes: Boxes) -> Tensor:
    """Return F₁ = 2PR/(P + R), in [0, 1]; higher is better (eqs. A3, A4).

    With the mass m inside U and T of all pixels, P = m/T and R = m/|U|, so F₁ = 2m/(T + |U|),
    which is 0 for a map of zeros.
    """
    U, S = _unions(masks, boxes), masks.double()
    return 2 * _sum(S * U) / (_sum(S) + _sum(U)) * _defined(U)


def _overlaps_of_case(case: Case) -> Tensor:
    return box_overlaps(case.masks, case.boxes)


def _average_of_overlaps(values: Tensor, overlaps: Tensor) -> float:
    return average_box_accuracy(overlaps)


@METRICS.register(
    "BA",
    title="Box accuracy",
    source="Choe et al. 2020; Zhang et al. 2024, eq. A5",
    better="higher",
    needs="boxes",
    of_case=lambda _, case: 100 * box_accuracy(case.share(_overlaps_of_case)),
    detail=lambda case: case.share(_overlaps_of_case),
    average=_average_of_overlaps,
)
def average_box_accuracy(overlaps: Tensor, deltas: Sequence[float] = DELTAS) -> float:
    """Return BA in percent; higher is better (eq. A5).

    For each δ, the share of images whose box overlaps a true one by δ, at the threshold η that is
    best for all of them; then the mean over δ.

    Args:
        overlaps: `(N, T)`, from `box_overlaps`. Images without boxes are left out.
        deltas: δ, overlaps that count as found; MaxBoxAccV2 of [66].

    Returns:
        Percent; NaN if no image has boxes.
    """
    overlaps = overlaps[~overlaps.isnan().any(1)]
    accuracies = [(overlaps >= d).double().mean(0).amax() for d in deltas]
    return 100 * float(torch.stack(accuracies).mean())


def box_accuracy(overlaps: Tensor, deltas: Sequence[float] = DELTAS) -> Tensor:
    """Return the BA of each image alone, the share of δ reached at its own best threshold.

    BA takes one threshold for all images, so it is at most the mean of these.
    """
    best = overlaps.amax(1)
    accuracy = torch.stack([(best >= d).double() for d in deltas]).mean(0)
    return accuracy.where(~best.isnan(), torch.nan)


def box_overlaps(masks: Tensor, boxes: Boxes, thresholds: Sequence[float] = THRESHOLDS) -> Tensor:
    """Return max_B IoU(B, B_p^η), `(N, T)`: B_p^η is B_p with η in place of the mean (eq. A5).

    Args:
        masks, boxes: See the module.
        thresholds: η. The paper says "a set of values"; here 0, 0.01, …, 0.99.
    """
    boxes = _check_boxes(masks, boxes)
    overlaps = masks.new_zeros(len(masks), len(thresholds), dtype=torch.float64)
    for i, S in enumerate(masks[:, 0].detach().cpu().numpy()):
        predicted = [_largest_box(eta < S) for eta in thresholds]
        overlaps[i] = _overlap(torch.tensor(predicted, device=masks.device), boxes[i])
    return overlaps


@METRICS.register(
    "SP",
    title="Standard pointing game",
    source="Zhang et al. 2018; Zhang et al. 2024, eq. A6",
    better="higher",
    needs="boxes",
    of_case=_of_boxes,
)
def pointing_game(masks: Tensor, boxes: Boxes) -> Tensor:
    """Return SP = 1[p* ∈ U], p* the most salient pixel; higher is better (eq. A6).

    If several pixels have the largest saliency, SP is the share of them that is in U.
    """
    U = _unions(masks, boxes)
    top = (masks == masks.amax((2, 3), keepdim=True)).double()
    return _sum(top * U) / _sum(top) * _defined(U)


@METRICS.register(
    "EP",
    title="Energy pointing game",
    source="Wang et al. 2020; Zhang et al. 2024, eq. A3",
    better="higher",
    needs="boxes",
    of_case=_of_boxes,
)
def energy_pointing_game(masks: Tensor, boxes: Boxes) -> Tensor:
    """Return EP = P, the share of the map's mass that is in U; higher is better (eq. A3).

    For a map of zeros EP is defined as 0.
    """
    U, S = _unions(masks, boxes), masks.double()
    T = _sum(S)
    return _sum(S * U) / T.where(T > 0, 1) * _defined(U)


@METRICS.register(
    "SM",
    title="Saliency metric",
    source="Dabkowski and Gal 2017; Zhang et al. 2024, eq. A7",
    better="lower",
    unit="logarithm",
    of_case=lambda metric, case: metric(case.masks, case.p),
)
def saliency_metric(masks: Tensor, p: Probabilities) -> Tensor:
    """Return SM = log max(0.05, |B_p|/hw) − log p^c; lower is better, needs no boxes (eq. A7).

    Args:
        masks: `(N, 1, H, W)`.
        p: `(N,)`, the target's probability. One that float32 rounds to 0 counts as the smallest
            number that float32 holds with full precision, 1.2e-38, so that SM is finite.

    Returns:
        float64 `(N,)`, from −3.0 to 87.4.
    """
    p = check_probabilities("p", p, len(masks)).clamp(min=torch.finfo(torch.float32).tiny)
    p = p.to(masks.device)
    x0, y0, x1, y1 = predicted_boxes(masks).double().T
    share = (x1 - x0) * (y1 - y0) / math.prod(masks.shape[2:])
    return share.clamp(min=0.05).log() - p.log()


def predicted_boxes(masks: Tensor) -> Tensor:
    """Return B_p of each map, int64 `(N, 4)`; (0, 0, 0, 0) where nothing is above the mean."""
    check_masks(masks)
    S = masks[:, 0].double()
    # The mean of a constant map may be below its values by a rounding error.
    above = S.mean((1, 2), keepdim=True).maximum(S.amin((1, 2), keepdim=True)) < S
    boxes = [_largest_box(pixels) for pixels in above.cpu().numpy()]
    return torch.tensor(boxes, dtype=torch.int64, device=masks.device).view(-1, 4)


def _largest_box(pixels: np.ndarray) -> tuple[int, int, int, int]:
    """Return the box around the largest connected component of bool `(H, W)`."""
    from scipy import ndimage  # slow to import, and needed for boxes only

    components, n = ndimage.label(pixels, structure=np.ones((3, 3)))
    if n == 0:
        return 0, 0, 0, 0
    largest = np.bincount(components.ravel())[1:].argmax()
    rows, columns = ndimage.find_objects(components)[largest]
    return columns.start, rows.start, columns.stop, rows.stop


def _overlap(predicted: Tensor, boxes: Tensor) -> Tensor:
    """Return for each predicted box `(T, 4)` the largest IoU with a true one, NaN without any."""
    if not len(boxes):
        return predicted.new_full((len(predicted),), torch.nan, dtype=torch.float64)
    return box_iou(boxes.double(), predicted.double()).amax(0)


def _unions(masks: Tensor, boxes: Boxes) -> Tensor:
    """Return U of each image, float64 `(N, 1, H, W)`: 1 inside a box, else 0."""
    unions = masks.new_zeros(masks.shape, dtype=torch.float64)
    for U, true in zip(unions, _check_boxes(masks, boxes), strict=True):
        for x0, y0, x1, y1 in true.tolist():
            U[:, y0:y1, x0:x1] = 1
    return unions


def _sum(maps: Tensor) -> Tensor:
    return maps.sum((1, 2, 3))


def _defined(U: Tensor) -> Tensor:
    """Return 1 where an image has boxes, NaN where it has none."""
    return torch.where(U.amax((1, 2, 3)) > 0, 1.0, torch.nan)


def check_boxes(boxes: Tensor, height: int, width: int) -> None:
    """Raise ValueError unless boxes are `(M, 4)`, whole pixels of an image of this size."""
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"an image's boxes have shape {tuple(boxes.shape)}; (M, 4) is needed")
    for x0, y0, x1, y1 in boxes.tolist():
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise ValueError(
                f"the box {(x0, y0, x1, y1)} is empty or leaves its image of {height}×{width}; "
                "boxes are x0, y0, x1, y1 in pixels, right and bottom exclusive"
            )
    if (boxes != boxes.long()).any():
        raise ValueError(f"boxes are {boxes.tolist()}; whole pixels are needed")


def _check_boxes(masks: Tensor, boxes: Boxes) -> list[Tensor]:
    check_masks(masks)
    check_range("masks", masks)
    H, W = masks.shape[2:]
    if len(boxes) != len(masks):
        raise ValueError(f"{len(masks)} masks need boxes for each; {len(boxes)} were given")
    boxes = [torch.as_tensor(b, device=masks.device) for b in boxes]
    for true in boxes:
        check_boxes(true, H, W)
    return [true.long() for true in boxes]
