"""Insertion, deletion and AOPC: the probability while pixels are replaced, most salient first.

All three go from an image `start` to an image `end`: pixels are replaced in decreasing order of
saliency, and the probability of a class is measured after every step.

| name | start | end | a step |
|---|---|---|---|
| insertion I ↑ | the blurred image | the image | a row's worth of pixels, until all are changed |
| deletion D ↓ | the image | black | a row's worth of pixels, until all are changed |
| AOPC ↑ | the image | black | a patch, for the ten most salient |

Only the order of the saliency matters: a strictly increasing transform changes nothing. Pixels of
equal saliency (regions where a CAM is 0, all but one pixel of Fake-CAM) are ordered at random, by
the seed and alike for every image. Ordered by position, they would be replaced row by row from the
top, which favours what is there and makes a compact region of pixels that have no order.

Insertion and deletion run the network's quick copy in float32 (`Classifier.quick`).

The curves of one image are drawn by `ol.plots.curves`:

    inserted = ol.metrics.insertion(classifier, image, mask)
    deleted = ol.metrics.deletion(classifier, image, mask)
    ol.plots.curves({"insertion": inserted.values[0], "deletion": deleted.values[0]})
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

from ..network import Classifier, usual
from ..registry import check_seed, whole_number
from .registry import METRICS, Case, check_masks

Targets = Tensor | Sequence[int] | int


class Curves(NamedTuple):
    """The probability curve of each image and the metric computed from it.

    Attributes:
        areas: float64 `(N,)`: the metric, as a fraction.
        values: float64 `(N, 1 + steps)`: the class's probability at the start and after each step.
    """

    areas: Tensor
    values: Tensor


def _of_predicted(metric: Callable[..., Curves], case: Case) -> Tensor:
    """Measure masks of the predicted classes (section 5.3.2), in percent."""
    masks, targets = case.masks_of_predicted, case.predicted
    return 100 * metric(case.classifier, case.images, masks, targets, seed=case.seed).areas


def _of_targets(metric: Callable[..., Curves], case: Case) -> Tensor:
    return (
        100 * metric(case.classifier, case.images, case.masks, case.targets, seed=case.seed).areas
    )


@METRICS.register(
    "I",
    title="Insertion",
    source="Petsiuk et al. 2018; Zhang et al. 2024, section 5.3.2",
    better="higher",
    of_case=_of_predicted,
)
@usual()
def insertion(
    classifier: Classifier,
    images: Tensor,
    masks: Tensor,
    targets: Targets | None = None,
    *,
    seed: int = 0,
    batch_size: int | None = None,
) -> Curves:
    """Return the area under the probability while the blurred image's pixels become the image's.

    The blur is a Gaussian, 11×11 with σ = 5 (RISE), with mirrored padding. RISE's own code reflects
    the truncated tails into the window, which makes it nearly a box filter, and pads with zeros.

    Args:
        classifier: The network.
        images: `(N, 3, H, W)` in [0, 1].
        masks: Saliency `(N, 1, H, W)`, of any range. A step is W pixels: 224 for 224×224.
        targets: `(N,)` classes, or one for all. Default: the predicted ones (section 5.3.2).
        seed: Of the order among pixels of equal saliency.
        batch_size: Number of steps in a batch; bounds the memory. Default:
            `classifier.images_at_once()`.

    Returns:
        Areas `(N,)` in [0, 1] by the trapezoid rule, and values `(N, H + 1)`.

    Raises:
        ValueError: If shapes or values are others.
    """
    images = classifier.check_images(images)
    blurred = transforms.gaussian_blur(images, [11, 11], [5.0, 5.0]).clamp(0, 1)
    targets = classifier.predict(images) if targets is None else targets
    return replacement(
        classifier, blurred, images, masks, targets, seed=seed, batch_size=batch_size
    )


@METRICS.register(
    "D",
    title="Deletion",
    source="Petsiuk et al. 2018; Zhang et al. 2024, section 5.3.2",
    better="lower",
    of_case=_of_predicted,
)
def deletion(
    classifier: Classifier,
    images: Tensor,
    masks: Tensor,
    targets: Targets | None = None,
    *,
    seed: int = 0,
    batch_size: int | None = None,
) -> Curves:
    """Return the area under the probability while the image's pixels become black.

    Arguments, result and errors are those of `insertion`.
    """
    images = classifier.check_images(images)
    black = torch.zeros_like(images)
    targets = classifier.predict(images) if targets is None else targets
    return replacement(classifier, images, black, masks, targets, seed=seed, batch_size=batch_size)


def replacement(
    classifier: Classifier,
    start: Tensor,
    end: Tensor,
    masks: Tensor,
    targets: Targets,
    *,
    seed: int = 0,
    batch_size: int | None = None,
) -> Curves:
    """Return the area under the probability while pixels of `start` become those of `end`.

    Insertion and deletion are special cases. From `end` to `start` by −S gives the reversed curve
    of S, if no two pixels are equally salient.

    Args:
        classifier: The network.
        start, end: Images `(N, 3, H, W)` in [0, 1].
        masks: Saliency `(N, 1, H, W)`: pixels change in its decreasing order, W at a step.
        targets: `(N,)` classes, or one for all.
        seed, batch_size: As in `insertion`.

    Returns:
        Areas `(N,)` in [0, 1] by the trapezoid rule, and values `(N, H + 1)`.
    """
    start, end = classifier.check_images(start), classifier.check_images(end)
    if start.shape != end.shape:
        raise ValueError(
            f"start has shape {tuple(start.shape)} and end {tuple(end.shape)}; the same is needed"
        )
    check_masks(masks, start)
    H, W = masks.shape[2:]
    steps = _ranks(masks.flatten(1), seed).view_as(masks) // W + 1
    targets = classifier.check_targets(targets, len(start))
    values = _probabilities(classifier, start, end, steps, targets, H, batch_size)
    return Curves(torch.trapezoid(values, dx=1 / H), values)


@METRICS.register(
    "AOPC",
    title="Area over the perturbation curve",
    source="Samek et al. 2017; Zhang et al. 2024, section 5.3.3",
    better="higher",
    of_case=_of_targets,
)
def aopc(
    classifier: Classifier,
    images: Tensor,
    masks: Tensor,
    targets: Targets | None = None,
    *,
    patch: int = 14,
    regions: int = 10,
    seed: int = 0,
    batch_size: int | None = None,
) -> Curves:
    """Return how far the probability falls while the most salient patches become black (MoRF).

    AOPC = mean of p − p_k over k = 1 … L. Samek et al. count the step k = 0, too, whose difference
    is 0, and so divide by L + 1; the paper's figures, by Quantus, don't.

    Args:
        classifier: The network.
        images: `(N, 3, H, W)` in [0, 1].
        masks: Saliency `(N, 1, H, W)`; that of a patch is the sum over its pixels.
        targets: `(N,)` classes, or one for all. Default: the predicted ones.
        patch: Side of the patches, from the top left corner on; the last ones may be cut
            (section 5.3.3).
        regions: L, the number of patches; all of them where there are fewer (section 5.3.3).
        seed: Of the order among patches of equal saliency.
        batch_size: As in `insertion`.

    Returns:
        Areas: AOPC `(N,)` in [−1, 1]; values `(N, 1 + L)`: p, p_1, … p_L.

    Raises:
        ValueError: If shapes or values are others.
    """
    images = classifier.check_images(images)
    check_masks(masks, images)
    patch, regions = whole_number("patch", patch, 1), whole_number("regions", regions, 1)
    # In float64, so that patches of equal pixels have equal sums.
    sums = F.avg_pool2d(masks.double(), patch, ceil_mode=True, divisor_override=1)
    steps = _ranks(sums.flatten(1), seed).view_as(sums) + 1
    steps = steps.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    steps = steps[..., : images.shape[2], : images.shape[3]]
    regions = min(regions, math.prod(sums.shape[1:]))
    black = torch.zeros_like(images)
    targets = classifier.predict(images) if targets is None else targets
    targets = classifier.check_targets(targets, len(images))
    values = _probabilities(classifier, images, black, steps, targets, regions, batch_size)
    return Curves((values[:, :1] - values[:, 1:]).mean(1), values)


@usual()
def _ranks(saliency: Tensor, seed: int) -> Tensor:
    """Return each value's rank in decreasing order, `(N, P)` from 0; ties in random order."""
    seed = check_seed(seed)
    drawn = torch.randperm(saliency.shape[1], generator=torch.Generator().manual_seed(seed))
    drawn = drawn.to(saliency.device)
    order = drawn[saliency[:, drawn].argsort(dim=1, descending=True, stable=True)]
    return order.argsort(1)


@torch.no_grad()
def _probabilities(
    classifier: Classifier,
    start: Tensor,
    end: Tensor,
    steps: Tensor,
    targets: Tensor,
    last: int,
    batch_size: int | None,
) -> Tensor:
    """Return the target's probability after the steps 0 to `last`, float64 `(N, 1 + last)`.

    Args:
        steps: `(N, 1, H, W)`, from 1: the step at which a pixel of `start` becomes that of `end`.
    """
    if batch_size is None:
        batch_size = classifier.images_at_once(start.shape[2:])
    batch_size = whole_number("batch_size", batch_size, 1)
    quick = classifier.quick("float32")
    home = start.device
    start, end, steps = (values.to(classifier.device) for values in (start, end, steps))
    values = torch.zeros(len(start), last + 1, dtype=torch.float64, device=start.device)
    for i, c in enumerate(targets.tolist()):
        for k in torch.arange(last + 1, device=start.device).split(batch_size):
            mixed = torch.where(steps[i] <= k.view(-1, 1, 1, 1), end[i], start[i])  # (K, 3, H, W)
            values[i, k] = classifier.to_probabilities(quick.logits(mixed).double())[:, c]
    return values.to(home)
