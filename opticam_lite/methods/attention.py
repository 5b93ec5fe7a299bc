"""Functions of the attention methods, which use the attention matrices P of a transformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..network import Classifier, Transformer, token_grid


def unfit(classifier: Classifier) -> str | None:
    """Return why a classifier has no attention that its head reads, or None if it has."""
    parts = classifier.transformer
    return parts if isinstance(parts, str) else None


def need_transformer(method: str, classifier: Classifier) -> Transformer:
    """Return the parts of a classifier's transformer.

    Raises:
        ValueError: If it is none, with the reason.
    """
    parts = classifier.transformer
    if isinstance(parts, str):
        raise ValueError(
            f"{method} needs a vision transformer that classifies by its class token or the mean "
            f"of its patches, and {classifier.name} can't be explained so: {parts}; grad-cam and "
            "opti-cam explain any network"
        )
    return parts


@torch.no_grad()
def attentions_of(parts: Transformer, x: Tensor, *, last_only: bool = False) -> list[Tensor]:
    """Return the mean attention over heads `(N, T, T)` of each block, or of the last one.

    Rows sum to 1. Nothing after the last attention is computed.

    Args:
        parts: The transformer.
        x: Normalised images `(N, 3, H, W)`.
        last_only: Leave out the blocks before the last.
    """
    (x, positions), found = parts.embed(x), []
    for block, where in zip(parts.blocks[:-1], positions, strict=False):
        if last_only:
            x = block.tokens(x, where)
        else:
            x, P = block(x, where)
            found.append(P.mean(1))
    return [*found, parts.blocks[-1].attention(x, positions[-1]).mean(1)]


def roll_out(parts: Transformer, matrices: Sequence[Tensor]) -> Tensor:
    """Return the row `(N, T)` that the head reads in the product of matrices, last first.

    Only one row is needed, so vectors are multiplied by matrices, not matrices by matrices.
    """
    row = parts.rows_read(matrices[-1])[:, None]  # (N, 1, T)
    for A in reversed(matrices[:-1]):
        row = row @ A
    return row[:, 0]


def to_map(row: Tensor, prefix: int, size: Sequence[int]) -> Tensor:
    """Drop the prefix tokens (class token, …) of a row `(N, T)` and reshape it to `(N, 1, h, w)`.

    Raises:
        ValueError: If the patches form no grid of the shape of the images.
    """
    patches = row[:, prefix:]
    grid = token_grid(patches.shape[1], (size[0], size[1]))
    if grid is None:
        raise ValueError(
            f"{patches.shape[1]} patches do not form a grid of the shape of a "
            f"{size[0]}×{size[1]} image; use a network whose patches are square"
        )
    return patches.unflatten(1, grid)[:, None]
