"""ADCC: average drop, coherency and complexity in one number (Poppi et al. 2021; section 5.3.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..masking import check_range, masked_probabilities
from .faithfulness import Probabilities, drop
from .registry import METRICS, Case, check_masks


def _of_masked(case: Case) -> Tensor:
    return case.explain(case.images * case.masks, case.targets)


def _of_targets(metric: Callable[..., Tensor], case: Case) -> Tensor:
    return 100 * metric(case.p, case.o, case.masks, case.share(_of_masked))


def _of_predicted(metric: Callable[..., Tensor], case: Case) -> Tensor:
    masks = case.masks_of_predicted
    if masks is case.masks:  # all are predicted rightly
        return _of_targets(metric, case)
    p, o = masked_probabilities(case.classifier, case.images, masks, case.predicted)
    return 100 * metric(p, o, masks, case.explain(case.images * masks, case.predicted))


@METRICS.register(
    "ADCC-target",
    title="ADCC of the class explained",
    source="Poppi et al. 2021, for another class",
    better="higher",
    of_case=_of_targets,
)
@METRICS.register(
    "ADCC",
    title="Average drop, coherency, complexity",
    source="Poppi et al. 2021; Zhang et al. 2024, section 5.3.3",
    better="higher",
    of_case=_of_predicted,
)
def adcc(p: Probabilities, o: Probabilities, masks: Tensor, again: Tensor) -> Tensor:
    """Return ADCC of each image: 3 / (1/coherency + 1/(1 − complexity) + 1/(1 − drop)).

    It is the harmonic mean, whose limit is 0 where one of the three is 0. Higher is better, as in
    Poppi et al.; the arrow of the paper's Table 4 points the wrong way. The metric ADCC is that of
    the predicted class and its map, as in the authors' code; ADCC-target that of the class
    explained, to which AD, AG and AI refer. They differ on misclassified images only.

    Args:
        p, o: `(N,)`, the target's probability before and after masking.
        masks: S(x), `(N, 1, H, W)` in [0, 1].
        again: S(x ⊙ S(x)), `(N, 1, H, W)`: the same method's masks of the masked images.

    Returns:
        float64 `(N,)` in [0, 1].

    Raises:
        ValueError: If shapes or values are others.
    """
    good = torch.stack(
        [coherency(masks, again), 1 - complexity(masks), 1 - drop(p, o).to(masks.device)]
    )
    # In floating point 1/0 = ∞ and 3/∞ = 0, which is the limit.
    return 3 / (1 / good).sum(0)


def coherency(masks: Tensor, again: Tensor) -> Tensor:
    """Return (r + 1)/2 of each image, r Pearson's correlation of S(x) and S(x ⊙ S(x)).

    For a constant map, whose correlation is undefined, r is 0.

    Args:
        masks, again: `(N, 1, H, W)`.

    Returns:
        float64 `(N,)` in [0, 1].
    """
    check_masks(again, masks)
    check_masks(masks)
    a, b = (m.double().flatten(1) for m in (masks, again.to(masks.device)))
    flat = (a.amin(1) == a.amax(1)) | (b.amin(1) == b.amax(1))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    r = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return (r.where(~flat, 0.0).clamp(-1, 1) + 1) / 2


def complexity(masks: Tensor) -> Tensor:
    """Return the mean of each mask `(N, 1, H, W)` in [0, 1]; float64 `(N,)` in [0, 1]."""
    check_masks(masks)
    check_range("masks", masks)
    return masks.double().mean((1, 2, 3)).clamp(0, 1)  # masks may be off by rounding
