"""Ablation-CAM (Desai and Ramaswamy 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masking import to_masks
from ..network import Classifier, ablation
from ..registry import whole_number
from .grad_cam import unread
from .registry import METHODS, Callback, Step


@METHODS.register(
    "ablation-cam", title="Ablation-CAM", source="Desai and Ramaswamy 2020", unfit=unread
)
def ablation_cam(
    classifier: Classifier,
    images: Tensor,
    targets: Tensor,
    *,
    chunk: int | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Weigh each feature map by how much the class logit falls when it is set to 0.

        w_k = (y_c − y_c without channel k) / y_c,    S = relu(Σ_k w_k A_k)

    Only the head is run again, once for each channel that is not 0 everywhere. Dividing by |y_c|
    only scales the map, which the normalisation undoes; so the sign of y_c is used instead, and
    y_c = 0, where the quotient is undefined, counts as positive (the limit from above).

    Args:
        classifier: Any, cut at any layer.
        images: `(N, 3, H, W)` in [0, 1].
        targets: `(N,)` class indices.
        chunk: Batch size of the ablations in the head; bounds the memory. Default:
            `classifier.images_at_once()` of the head.
        callback: Called after each chunk of an image's channels.

    Returns:
        Masks `(N, 1, H, W)` in [0, 1].

    Raises:
        ValueError: If chunk is not positive.
    """
    size = images.shape[2:]
    if chunk is None:
        chunk = classifier.images_at_once(size, layer=classifier.layer)
    chunk = whole_number("chunk", chunk, 1)
    A, rest = classifier.split(images)  # (N, K, h, w)
    logits = classifier.head(A, rest)  # (N, C)
    y = logits.gather(1, targets[:, None])  # (N, 1)
    y_without = y.repeat(1, A.shape[1])  # (N, K)
    active = A.flatten(2).any(dim=2)
    parts = [k.split(chunk) for k in (row.nonzero()[:, 0] for row in active)]
    done, total = 0, sum(map(len, parts))
    for i, of_image in enumerate(parts):
        logits_without = ablation(classifier, A[i, None], rest.repeat(i, 1))
        for k in of_image:
            y_without[i, k] = logits_without(k)[:, targets[i]]
            done += 1
            if callback is not None:
                callback(Step(done, total))
    fall = y - y_without
    # Logits that do not depend on a channel differ by rounding errors: the weight is 0.
    fall[fall.abs() <= 1e-6 * logits.abs().amax(1, keepdim=True)] = 0
    w = fall * torch.where(y < 0, -1.0, 1.0)
    S = torch.einsum("nk,nkhw->nhw", w, A)[:, None].relu()
    return to_masks(S, size)
