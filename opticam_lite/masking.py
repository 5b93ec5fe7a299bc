"""Saliency map → mask → probability of the masked image.

saliency map (N, 1, h, w) ──upsample──▶ (N, 1, H, W) ──normalize──▶ mask in [0, 1]
image ⊙ mask ──classifier──▶ probability of the masked image
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .network import Classifier, usual
from .registry import unknown_name

NORMALIZATIONS = ("range", "max", "sigmoid")


@usual()
def upsample(saliency: Tensor, size: Sequence[int]) -> Tensor:
    """Enlarge maps `(N, C, h, w)` to `(N, C, H, W)`: bilinear, `align_corners=False` ("up")."""
    # Two matrix products, as the backward pass of `interpolate` is not deterministic on a GPU.
    sides = zip(saliency.shape[-2:], size, strict=True)
    rows, columns = (_interpolation(cells, pixels, saliency) for cells, pixels in sides)
    return rows @ saliency @ columns.mT


def _interpolation(cells: int, pixels: int, like: Tensor) -> Tensor:
    """The matrix `(pixels, cells)` of linear interpolation."""
    identity = torch.eye(cells, dtype=like.dtype, device=like.device)[None]
    return F.interpolate(identity, size=pixels, mode="linear", align_corners=False)[0].mT


def normalize(saliency: Tensor, normalization: str = "range") -> Tensor:
    """Normalise each saliency map `(N, C, H, W)` to [0, 1] (paper, eqs. 16-18).

    Args:
        saliency: Maps; each of the N·C maps is normalised separately.
        normalization: `"range"` (A − min A)/(max A − min A), eq. 16, the default;
            `"max"` A/max A, eq. 17, where values below zero become 0; `"sigmoid"`, eq. 18.

    By range a constant map becomes zeros (the paper's n(0) := 0), never NaN; a map whose range is
    below 1e-6 of its largest value counts as constant up to rounding.

    Raises:
        ValueError: If the normalization is not one of the three.
    """
    if normalization == "sigmoid":
        return saliency.sigmoid()
    values = saliency.flatten(-2)
    # `max`, not `amax`: its gradient goes to one pixel, which is faster than to all equal ones.
    high = values.max(dim=-1, keepdim=True).values[..., None]
    if normalization == "max":
        positive = high > 0
        return (saliency / high.where(positive, torch.ones_like(high))).clamp(min=0) * positive
    if normalization == "range":
        low = values.min(dim=-1, keepdim=True).values[..., None]
        span = high - low
        varied = span > 1e-6 * torch.maximum(high.abs(), low.abs())
        return (saliency - low) / span.where(varied, torch.full_like(span, torch.inf))
    raise ValueError(unknown_name("normalization", normalization, NORMALIZATIONS))


def to_masks(saliency: Tensor, size: Sequence[int], normalization: str = "range") -> Tensor:
    """Turn saliency maps `(N, 1, h, w)` into masks `(N, 1, H, W)`: n(up(S)) of eqs. 3 and 10."""
    return normalize(upsample(saliency, size), normalization)


def check_tensor(what: str, values: object) -> None:
    """Raise TypeError unless values are a tensor."""
    if not isinstance(values, Tensor):
        raise TypeError(
            f"{what} must be a torch.Tensor, not {type(values).__name__}; torch.as_tensor makes "
            "one of an array"
        )


def check_range(what: str, values: Tensor) -> None:
    """Raise ValueError unless values are in [0, 1], up to rounding, and none is NaN."""
    outside = ~((values >= -1e-6) & (values <= 1 + 1e-6))
    if outside.any():
        raise ValueError(
            f"{what} hold {float(values[outside][0]):.4g}; values in [0, 1] are needed"
        )


def masked_probabilities(
    classifier: Classifier, images: Tensor, masks: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the target's probability before and after masking, p and o of eqs. 13-15.

    Args:
        classifier: The network.
        images: `(N, 3, H, W)` in [0, 1].
        masks: `(N, 1, H, W)` in [0, 1]; the image is multiplied by it, so 0 is black.
        targets: `(N,)` class indices.

    Returns:
        p and o, each `(N,)` float32 in [0, 1].

    Raises:
        TypeError, ValueError: If types, shapes or ranges are others.
    """
    images = classifier.check_images(images)
    check_tensor("masks", masks)
    if tuple(masks.shape) != (images.shape[0], 1, *images.shape[2:]):
        raise ValueError(
            f"masks have shape {tuple(masks.shape)}; images of shape {tuple(images.shape)} need "
            f"masks of shape {(images.shape[0], 1, *images.shape[2:])}"
        )
    check_range("masks", masks)
    targets = classifier.check_targets(targets, len(images)).to(images.device)
    p = classifier.probabilities(images)
    o = classifier.probabilities(images * masks.to(images.device, images.dtype))
    chosen = targets[:, None]
    return p.gather(1, chosen)[:, 0], o.gather(1, chosen)[:, 0]
