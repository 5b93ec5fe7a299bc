"""Score-CAM (Wang et al. 2020; eq. 3 of the paper)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masking import to_masks
from ..network import Classifier
from ..registry import whole_number
from .registry import METHODS, Callback, Step


@METHODS.register("score-cam", title="Score-CAM", source="Wang et al. 2020")
def score_cam(
    classifier: Classifier,
    images: Tensor,
    targets: Tensor,
    *,
    precision: str = "float32",
    chunk: int | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Weigh each feature map by the class logit of the image masked by it.

        u_k = f(x ⊙ n(up(A_k)))_c − f(0)_c,    w = softmax(u),    S = relu(Σ_k w_k A_k)

    One forward pass per channel that is not constant: a constant one gives a black image, u_k = 0.

    Args:
        classifier: Any, cut at any layer.
        images: `(N, 3, H, W)` in [0, 1].
        targets: `(N,)` class indices.
        precision: Of the masked images' passes: `"float32"`, or `"bfloat16"` or `"auto"` to be
            faster on some processors. The softmax over raw logits amplifies the error of bfloat16:
            single maps may differ visibly, AD and AG hardly.
        chunk: Batch size of the masked images; bounds the memory. Default:
            `classifier.images_at_once()`.
        callback: Called after each chunk of an image's channels.

    Returns:
        Masks `(N, 1, H, W)` in [0, 1].

    Raises:
        ValueError: If chunk is not positive, or for an unknown precision.
    """
    quick = classifier.quick(precision)
    size = images.shape[2:]
    chunk = classifier.images_at_once(size) if chunk is None else chunk
    chunk = whole_number("chunk", chunk, 1)
    A = classifier.features(images)  # (N, K, h, w)
    f_0 = quick.logits(torch.zeros_like(images[:1]))[0, targets]  # (N,)
    u = A.new_zeros(A.shape[:2])
    varied = A.amax(dim=(2, 3)) > A.amin(dim=(2, 3))
    parts = [(i, k) for i in range(len(A)) for k in varied[i].nonzero()[:, 0].split(chunk)]
    for index, (i, k) in enumerate(parts, start=1):
        masks = to_masks(A[i, k, None], size)
        u[i, k] = quick.logits(images[i] * masks)[:, targets[i]] - f_0[i]
        if callback is not None:
            callback(Step(index, len(parts)))
    w = u.softmax(dim=1)
    S = torch.einsum("nk,nkhw->nhw", w, A)[:, None].relu()
    return to_masks(S, size)
