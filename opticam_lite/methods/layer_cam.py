"""Layer-CAM (Jiang et al. 2021)."""

from __future__ import annotations

from torch import Tensor

from ..masking import to_masks
from ..network import Classifier
from .grad_cam import features_and_gradients, unread
from .registry import METHODS


@METHODS.register("layer-cam", title="Layer-CAM", source="Jiang et al. 2021", unfit=unread)
def layer_cam(classifier: Classifier, images: Tensor, targets: Tensor) -> Tensor:
    """Weigh each position of the feature maps by its own positive gradient.

        S = relu(Σ_k relu(g_k) ⊙ A_k)        with g = ∂y_c/∂A

    Unlike Grad-CAM's, the weights depend on the position, which makes early layers usable, too.

    Args:
        classifier: Any, cut at any layer.
        images: `(N, 3, H, W)` in [0, 1].
        targets: `(N,)` class indices.

    Returns:
        Masks `(N, 1, H, W)` in [0, 1].
    """
    A, g = features_and_gradients(classifier, images, targets)  # (N, K, h, w)
    S = (g.relu() * A).sum(dim=1, keepdim=True).relu()
    return to_masks(S, images.shape[2:])
