"""From a saliency map to a mask to the probability of the masked image.

saliency map (N, 1, h, w) ──upsample──▶ (N, 1, H, W) ──normalize──▶ mask in [0, 1]
image ⊙ mask ──classifier──▶ probability of the masked image
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .registry import unknown_name

if TYPE_CHECKING:
    from .classifier import Classifier

NORMALIZATIONS = ("range", "max", "sigmoid")


def upsample(saliency: Tensor, size: Sequence[int]) -> Tensor:
    """Enlarge maps `(N, C, h, w)` to `(N, C, H, W)`: bilinear, `align_corners=False` ("up")."""
    rows, columns = _interpolations(saliency, size)
    return rows @ saliency @ columns.mT


def _interpolations(saliency: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The matrices for the rows and for the columns."""
    (h, w), (H, W) = saliency.shape[-2:], size
    rows = _interpolation(h, H, saliency)
    return rows, rows if (w, W) == (h, H) else _interpolation(w, W, saliency)


def _interpolation(cells: int, pixels: int, like: Tensor) -> Tensor:
    """The matrix `(pixels, cells)` of linear interpolation: two products go back quicker."""
    identity = torch.eye(cells, dtype=like.dtype, device=like.device)[None]
    return F.interpolate(identity, size=pixels, mode="linear", align_corners=False)[0].mT


def normalize(saliency: Tensor, normalization: str = "range") -> Tensor:
    """Map each saliency map `(N, C, H, W)` to [0, 1] on its own (paper, eqs. 16-18).

    Args:
        saliency: Maps; every one of the N·C maps is normalised by itself.
        normalization: `"range"` (A − min A)/(max A − min A), eq. 16, the default;
            `"max"` A/max A, eq. 17, where values below zero become 0; `"sigmoid"`, eq. 18.

    By range a constant map becomes zeros (the paper's n(0) := 0), never NaN; a map whose range is
    below 1e-6 of its largest value is constant but for rounding and is treated so.

    Raises:
        ValueError: If the normalization is not one of the three.
    """
    if normalization == "sigmoid":
        return saliency.sigmoid()
    values = saliency.flatten(-2)
    # `max` rather than `amax`: its gradient goes to one pixel and needs no search for equals.
    high = values.max(dim=-1, keepdim=True).values[..., None]
    if normalization == "max":
        positive = high > 0
        return (saliency / high.where(positive, torch.ones_like(high))).clamp(min=0) * positive
    if normalization == "range":
        return _by_range(saliency, values.min(dim=-1, keepdim=True).values[..., None], high)
    raise ValueError(unknown_name("normalization", normalization, NORMALIZATIONS))


def _by_range(saliency: Tensor, low: Tensor, high: Tensor) -> Tensor:
    span = high - low
    varied = span > 1e-6 * torch.maximum(high.abs(), low.abs())
    return (saliency - low) / span.where(varied, torch.full_like(span, torch.inf))


def to_masks(saliency: Tensor, size: Sequence[int], normalization: str = "range") -> Tensor:
    """Turn saliency maps `(N, 1, h, w)` into masks `(N, 1, H, W)`: n(up(S)) of eqs. 3 and 10."""
    return normalize(upsample(saliency, size), normalization)


def normalize_cells(saliency: Tensor, size: Sequence[int]) -> Tensor:
    """Return maps S' `(N, C, h, w)` that need only be enlarged: up(S') = n(up(S)), by range.

    They themselves may lie outside [0, 1]; enlarged they do not, but for rounding. Flat maps become
    zeros.

    Nothing is enlarged to find the range of up(S). Between four cells it is bilinear, so its
    extremes are at the corners of the rectangle of pixels that lie there.
    """
    rows, columns = _interpolations(saliency, size)
    corners = (_ends(rows) @ saliency @ _ends(columns).mT).flatten(-2)
    low, high = corners.amin(-1), corners.amax(-1)
    return _by_range(saliency, low[..., None, None], high[..., None, None])


def _ends(interpolation: Tensor) -> Tensor:
    """Keep the first and the last of the pixels that lie between the same two cells."""
    between = interpolation > 0
    changes = (between[1:] != between[:-1]).any(1)
    end = changes.new_ones(1)
    return interpolation[torch.cat([end, changes]) | torch.cat([changes, end])]


def under_many(image: Tensor, cells: Tensor, shift: Tensor) -> Tensor:
    """Return x ⊙ up(S) + shift `(N, C, H, W)` of one image `(1, C, H, W)`, channels last.

    A mask is made by a product of matrices, and one that interpolates can as well write each value
    C times, which is how the mask of an image with the channels last lies in memory.

    Args:
        image: Its pixels, scaled as the network wants them.
        cells: Maps `(N, 1, h, w)` of `normalize_cells`.
        shift: `(1, C, 1, 1)`.
    """
    C, H, W = image.shape[1:]
    rows, columns = _interpolations(cells, (H, W))
    masks = (rows @ cells[:, 0]) @ columns.repeat_interleave(C, 0).mT  # (N, H, W·C)
    masks.mul_(image[0].permute(1, 2, 0).reshape(H, W * C)).add_(shift.flatten().repeat(W))
    return masks.unflatten(2, (W, C)).permute(0, 3, 1, 2)


def check_tensor(what: str, values: object) -> None:
    """Raise TypeError unless values are a tensor."""
    if not isinstance(values, Tensor):
        raise TypeError(
            f"{what} must be a torch.Tensor, not {type(values).__name__}; torch.as_tensor makes "
            "one of an array"
        )


def check_range(what: str, values: Tensor) -> None:
    """Raise ValueError unless values are in [0, 1], but for rounding, and none is NaN."""
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
        TypeError, ValueError: If types, shapes or ranges are not those.
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
