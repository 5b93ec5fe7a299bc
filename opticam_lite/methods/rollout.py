"""Attention rollout: the product of the attention of all blocks (Abnar & Zuidema 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masking import to_masks
from ..network import Classifier
from .attention import attentions_of, need_transformer, roll_out, to_map, unfit
from .registry import METHODS


@METHODS.register(
    "rollout", title="Rollout", source="Abnar & Zuidema 2020", unfit=unfit, uses_layer=False
)
def rollout(classifier: Classifier, images: Tensor, targets: Tensor) -> Tensor:
    """Multiply the attention of all blocks, with the skip connections as the identity.

        A_b = rows of (mean over heads of P_b + I), each divided by its sum
        S   = (A_L ⋯ A_2 A_1)[class token, patches]

    Rows sum to 1, so S is the share of each patch in the class token if blocks did nothing but
    average tokens. It does not depend on the target class. Where the head reads the mean of the
    patches' tokens instead of the class token, S is the mean of the patches' rows.

    Args:
        classifier: A vision transformer; its layer is not used.
        images: `(N, 3, H, W)` in [0, 1].
        targets: Not used.

    Returns:
        Masks `(N, 1, H, W)` in [0, 1].

    Raises:
        ValueError: If the network is none, with the reason.
    """
    parts = need_transformer("rollout", classifier)
    A = []
    for P in attentions_of(parts, classifier.normalised(images)):  # (N, T, T)
        A_b = P + torch.eye(P.shape[-1], device=P.device)
        A.append(A_b / A_b.sum(-1, keepdim=True))
    S = to_map(roll_out(parts, A), parts.prefix, images.shape[2:])
    return to_masks(S, images.shape[2:])
