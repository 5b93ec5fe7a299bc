"""HiRes-CAM (Draelos and Carin 2020)."""

from __future__ import annotations

from torch import Tensor

from ..masking import to_masks
from ..network import Classifier
from .grad_cam import features_and_gradients, unread
from .registry import METHODS


@METHODS.register("hires-cam", title="HiRes-CAM", source="Draelos and Carin 2020", unfit=unread)
def hires_cam(classifier: Classifier, images: Tensor, targets: Tensor) -> Tensor:
    """Multiply the feature maps by their gradients, position by position.

        S = relu(Σ_k g_k ⊙ A_k)        with g = ∂y_c/∂A

    Grad-CAM averages g over positions first; before global average pooling and a linear layer g is
    the same at every position, so both methods are equal there.

    Args:
        classifier: Any, cut at any layer.
        images: `(N, 3, H, W)` in [0, 1].
        targets: `(N,)` class indices.

    Returns:
        Masks `(N, 1, H, W)` in [0, 1].
    """
    A, g = features_and_gradients(classifier, images, targets)  # (N, K, h, w)
    S = (g * A).sum(dim=1, keepdim=True).relu()
    return to_masks(S, images.shape[2:])
