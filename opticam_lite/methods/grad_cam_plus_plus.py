"""Grad-CAM++ (Chattopadhyay et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masking import to_masks
from ..network import Classifier
from .grad_cam import features_and_gradients, unread
from .registry import METHODS


@METHODS.register(
    "grad-cam++", title="Grad-CAM++", source="Chattopadhyay et al. 2018", unfit=unread
)
def grad_cam_plus_plus(classifier: Classifier, images: Tensor, targets: Tensor) -> Tensor:
    """Weigh the feature maps by their positive gradients, each position with a coefficient α.

        α_k = g_k² / (2 g_k² + (Σ A_k) g_k³)        at each position; the sum is over positions
        w_k = Σ α_k relu(g_k),    S = relu(Σ_k w_k A_k)        with g = ∂y_c/∂A

    Gradients are often so small that their cubes underflow in float32; a constant added to the
    denominator, as in other implementations, then determines the weights. Dividing both by g² is
    equivalent and needs no constant: α = 1 / (2 + (Σ A) g), and α = 0 where the denominator is 0.

    Args:
        classifier: Any, cut at any layer.
        images: `(N, 3, H, W)` in [0, 1].
        targets: `(N,)` class indices.

    Returns:
        Masks `(N, 1, H, W)` in [0, 1].
    """
    A, g = features_and_gradients(classifier, images, targets)  # (N, K, h, w)
    d = 2 + A.sum(dim=(2, 3), keepdim=True) * g
    alpha = (d != 0) / d.where(d != 0, torch.ones_like(d))  # where g = 0, it has no effect
    w = (alpha * g.relu()).sum(dim=(2, 3))  # (N, K)
    S = torch.einsum("nk,nkhw->nhw", w, A)[:, None].relu()
    return to_masks(S, images.shape[2:])
