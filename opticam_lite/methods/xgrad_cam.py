"""XGrad-CAM: axiom-based Grad-CAM (Fu et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masking import to_masks
from ..network import Classifier
from .grad_cam import features_and_gradients, unread
from .registry import METHODS


@METHODS.register("xgrad-cam", title="XGrad-CAM", source="Fu et al. 2020", unfit=unread)
def xgrad_cam(classifier: Classifier, images: Tensor, targets: Tensor) -> Tensor:
    """Weigh the feature maps by their gradients, averaged where the map is active.

        w_k = Σ g_k A_k / Σ A_k,    S = relu(Σ_k w_k A_k)        with g = ∂y_c/∂A

    The sums are over positions. For a map whose sum is 0, up to rounding, the average is undefined;
    its weight is 0. (The output of a relu is then 0 everywhere, so the weight has no effect.)

    Args:
        classifier: Any, cut at any layer.
        images: `(N, 3, H, W)` in [0, 1].
        targets: `(N,)` class indices.

    Returns:
        Masks `(N, 1, H, W)` in [0, 1].
    """
    A, g = features_and_gradients(classifier, images, targets)  # (N, K, h, w)
    total = A.sum(dim=(2, 3))  # (N, K)
    some = total.abs() > 1e-6 * A.abs().sum(dim=(2, 3))
    w = (g * A).sum(dim=(2, 3)) / total.where(some, torch.ones_like(total)) * some
    S = torch.einsum("nk,nkhw->nhw", w, A)[:, None].relu()
    return to_masks(S, images.shape[2:])
