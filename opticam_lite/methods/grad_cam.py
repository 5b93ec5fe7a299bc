"""Grad-CAM (Selvaraju et al. 2017; eq. 2 of the paper)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masking import to_masks
from ..network import Classifier
from .registry import METHODS


def unread(classifier: Classifier) -> str | None:
    """Return why the gradient at the layer's maps is 0 everywhere, or None if it is not."""
    if classifier.reads_maps:
        return None
    return (
        f"the logits depend on the class token of {classifier.layer!r} only, not on its maps; cut "
        f"at {classifier.default_layer!r} or earlier"
    )


@METHODS.register("grad-cam", title="Grad-CAM", source="Selvaraju et al. 2017", unfit=unread)
def grad_cam(classifier: Classifier, images: Tensor, targets: Tensor) -> Tensor:
    """Weigh the feature maps by the mean gradient of the class logit.

        w_k = mean over positions of ∂y_c/∂A_k,    S = relu(Σ_k w_k A_k)

    Args:
        classifier: Any, cut at any layer.
        images: `(N, 3, H, W)` in [0, 1].
        targets: `(N,)` class indices.

    Returns:
        Masks `(N, 1, H, W)` in [0, 1].
    """
    A, g = features_and_gradients(classifier, images, targets)
    w = g.mean(dim=(2, 3))  # (N, K)
    S = torch.einsum("nk,nkhw->nhw", w, A)[:, None].relu()
    return to_masks(S, images.shape[2:])


def features_and_gradients(
    classifier: Classifier, images: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the feature maps A and g = ∂y_c/∂A, both `(N, K, h, w)`.

    Only the head is differentiated. An image's logit does not depend on the other images, so the
    gradient of the sum of all logits contains the gradient of each.
    """
    with torch.no_grad():
        A, rest = classifier.split(images)
    with torch.enable_grad():
        A = A.detach().requires_grad_()
        y = classifier.head(A, rest).gather(1, targets[:, None])  # (N, 1)
        if not y.requires_grad:
            raise ValueError(
                f"the logits of {classifier.name} have no gradient at {classifier.layer!r}: "
                "something behind it detaches them or rounds them"
            )
        (g,) = torch.autograd.grad(y.sum(), A)
    return A.detach(), g
