"""Score-CAM (Wang et al. 2020; eq. 3 of the paper)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..classifier import Classifier
from ..masking import to_masks
from .registry import METHODS, Callback, Step


@METHODS.register("score-cam", title="Score-CAM", source="Wang et al. 2020")
def score_cam(
    classifier: Classifier,
    images: Tensor,
    targets: Tensor,
    *,
    chunk: int = 32,
    callback: Callback | None = None,
) -> Tensor:
    """Weigh each feature map by the logit that it gives as a mask.

        u_k = f(x ⊙ n(up(A_k)))_c − f(0)_c,    w = softmax(u),    S = relu(Σ_k w_k A_k)

    One forward pass per channel. The baseline f(0)_c is the same for all channels and cancels in
    the softmax, so it is not computed.

    Args:
        classifier: Any, cut at any layer.
        images: `(N, 3, H, W)` in [0, 1].
        targets: `(N,)` class indices.
        chunk: How many masked images pass through the network at a time; bounds the memory.
        callback: Called after each chunk of channels.

    Returns:
        Masks `(N, 1, H, W)` in [0, 1].

    Raises:
        ValueError: If chunk is not positive.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    A = classifier.features(images)  # (N, K, h, w)
    n, k = A.shape[:2]
    u = A.new_empty(n * k)
    total = -(-n * k // chunk)
    for index, pairs in enumerate(torch.arange(n * k, device=A.device).split(chunk), start=1):
        image, channel = pairs // k, pairs % k
        masks = to_masks(A[image, channel][:, None], images.shape[2:])  # (chunk, 1, H, W)
        y = classifier.logits(images[image] * masks)
        u[pairs] = y.gather(1, targets[image][:, None])[:, 0]
        if callback is not None:
            callback(Step(index, total))
    w = u.view(n, k).softmax(dim=1)
    S = torch.einsum("nk,nkhw->nhw", w, A)[:, None].relu()
    return to_masks(S, images.shape[2:])
