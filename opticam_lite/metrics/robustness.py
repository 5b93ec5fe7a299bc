"""Max-sensitivity: the relative change of a map under small noise in the image (section 5.3.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..masking import check_range
from ..network import usual
from ..registry import check_seed, whole_number
from .registry import METRICS, Case, check_masks


def _max_sensitivity(metric: Callable[..., Tensor], case: Case) -> Tensor:
    return metric(case.explain, case.images, case.masks, case.targets, seed=case.seed)


@METRICS.register(
    "MS",
    title="Max-sensitivity",
    source="Yeh et al. 2019; Zhang et al. 2024, section 5.3.3",
    better="lower",
    unit="ratio",
    of_case=_max_sensitivity,
)
@usual()
def max_sensitivity(
    explain: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    masks: Tensor,
    targets: Tensor,
    *,
    copies: int = 10,
    radius: float = 0.2,
    seed: int = 0,
) -> Tensor:
    """Return the largest relative change of each map, max over x′ of ‖S(x) − S(x′)‖ / ‖S(x)‖.

    x′ = x + noise, uniform in ±radius for each value, then clamped to [0, 1], the range of images.
    The noise is drawn from the seed, the same for every image of a size.

    For S(x) = 0 the ratio is undefined: the sensitivity is 0 if all maps S(x′) are 0, too (no
    change), else NaN, which averages leave out.

    Args:
        explain: (images, targets) → masks `(N, 1, H, W)`, the method under test.
        images: `(N, 3, H, W)` in [0, 1].
        masks: `(N, 1, H, W)`, what `explain` makes of the images.
        targets: `(N,)` classes.
        copies: Number of images x′ (section 5.3.3).
        radius: Largest change of a value (section 5.3.3).
        seed: Of the noise.

    Returns:
        float64 `(N,)`, from 0, a ratio and no percentage.

    Raises:
        ValueError: If shapes or values are others.
    """
    check_range("images", images)
    check_masks(masks, images)
    copies, seed = whole_number("copies", copies, 1), check_seed(seed)
    if not radius > 0:
        raise ValueError(f"radius is {radius}; a number > 0 is needed")
    generator = torch.Generator().manual_seed(seed)
    largest = masks.new_zeros(len(masks), dtype=torch.float64)
    for _ in range(copies):
        noise = radius * (2 * torch.rand(images.shape[1:], generator=generator) - 1)
        perturbed = (images + noise.to(images.device)).clamp(0, 1)
        change = masks.double() - explain(perturbed, targets).to(masks.device).double()
        largest = torch.maximum(largest, change.flatten(1).norm(dim=1))
    norm = masks.double().flatten(1).norm(dim=1)
    ratio = largest / norm
    return ratio.where(norm > 0, torch.where(largest > 0, torch.nan, 0.0))
