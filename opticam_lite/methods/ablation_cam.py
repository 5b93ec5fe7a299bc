"""Ablation-CAM (Desai and Ramaswamy 2020)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..classifier import Classifier
from ..cut import Rest
from ..masking import to_masks
from ..registry import whole_number
from .chunks import at_once, images_at_once
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

    Only the head is run again, once for each channel that is not 0 anyway. The size of y_c scales
    the map, which the normalisation undoes; so the sign of y_c stands for it, and y_c = 0, where
    the quotient has no value, counts as positive (the limit from above).

    Args:
        classifier: Any, cut at any layer.
        images: `(N, 3, H, W)` in [0, 1].
        targets: `(N,)` class indices.
        chunk: How many ablations pass through the head at a time; bounds the memory. Default:
            chosen by the size of the head's feature maps.
        callback: Called after each chunk of an image's channels.

    Returns:
        Masks `(N, 1, H, W)` in [0, 1].

    Raises:
        ValueError: If chunk is not positive.
    """
    chunk = None if chunk is None else whole_number("chunk", chunk, 1)
    A, rest = classifier.split(images)  # (N, K, h, w)
    if chunk is None and (attention := classifier._cut.attention) is not None:
        rows = attention.heads * attention.asking
        chunk = at_once(classifier, rows * max(A.shape[1], A[0, 0].numel()))
    elif chunk is None:
        layers = classifier.layers[classifier.layers.index(classifier.layer) :]
        chunk = images_at_once(classifier, images, layers)
    logits = classifier.head(A, rest, lean=True)  # (N, C)
    y = logits.gather(1, targets[:, None])  # (N, 1)
    logits_without = _ablation(classifier, A, rest)
    y_without = y.repeat(1, A.shape[1])  # (N, K)
    active = A.flatten(2).any(dim=2)
    parts = [(i, k) for i in range(len(A)) for k in active[i].nonzero()[:, 0].split(chunk)]
    for index, (i, k) in enumerate(parts, start=1):
        y_without[i, k] = logits_without(i, k)[:, targets[i]]
        if callback is not None:
            callback(Step(index, len(parts)))
    fall = y - y_without
    # Logits that do not depend on a channel differ by rounding, which is no weight.
    fall[fall.abs() <= 1e-6 * logits.abs().amax(1, keepdim=True)] = 0
    w = fall * torch.where(y < 0, -1.0, 1.0)
    S = torch.einsum("nk,nkhw->nhw", w, A)[:, None].relu()
    return to_masks(S, images.shape[2:])


def _ablation(classifier: Classifier, A: Tensor, rest: Rest) -> Callable[[int, Tensor], Tensor]:
    """Return the head of image i without each of the channels k: (i, `(n,)`) → logits `(n, C)`.

    Where the head begins with a sum over the channels, leaving one out of the sum is less work than
    the whole sum without it: that of a 1×1 convolution, Z_o = Σ_k W_ok A_k + b_o, and those of an
    attention (`OfFew.without`).
    """
    if classifier._cut.attention is not None:
        return lambda i, k: classifier._cut.head_without(k, A[i, None], rest.repeat(i, 1))
    if (name := pointwise_reader(classifier)) is not None:
        conv, head = classifier.network.get_submodule(name), classifier.at(name).head
        W, Z = conv.get_parameter("weight").flatten(1), conv(A)  # (O, K), (N, O, h, w)

        def from_sum(i: int, k: Tensor) -> Tensor:
            maps = torch.addcmul(Z[i], W.T[k, :, None, None], A[i, k, None], value=-1)
            return head(maps, rest.repeat(i, len(k)), lean=True)

        return from_sum
    kept = 1 - torch.eye(A.shape[1], dtype=A.dtype, device=A.device)[..., None, None]
    return lambda i, k: classifier.head(A[i] * kept[k], rest.repeat(i, len(k)), lean=True)


def pointwise_reader(classifier: Classifier) -> str | None:
    """Return the name of the 1×1 convolution with which the head begins, or None."""
    name = classifier._cut.reader
    conv = None if name is None else classifier.network.get_submodule(name)
    pointwise = (
        isinstance(conv, nn.Conv2d)
        and conv.kernel_size == conv.stride == (1, 1)
        and conv.padding in ((0, 0), "valid", "same")
        and conv.groups == 1
    )
    return name if pointwise else None
