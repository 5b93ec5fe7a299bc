"""Score-CAM (Wang et al. 2020; eq. 3 of the paper)."""

from __future__ import annotations

import math
from contextlib import closing

import torch
from torch import Tensor

from ..classifier import Classifier
from ..masking import normalize_cells, to_masks, under_many
from ..parallel import in_parallel, threads_for
from ..registry import whole_number
from .chunks import images_at_once
from .registry import METHODS, Callback, Step

EXACT = 0.9  # share of the weights that is computed in float32, too,
FEW = 1 / 8  # if no larger share of the channels has it


@METHODS.register("score-cam", title="Score-CAM", source="Wang et al. 2020")
def score_cam(
    classifier: Classifier,
    images: Tensor,
    targets: Tensor,
    *,
    precision: str = "auto",
    chunk: int | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Weigh each feature map by the logit that it gives as a mask.

        u_k = f(x ⊙ n(up(A_k)))_c − f(0)_c,    w = softmax(u),    S = relu(Σ_k w_k A_k)

    One forward pass per channel that is not flat: a flat one gives a black image, whose u_k is 0.

    Args:
        classifier: Any, cut at any layer.
        images: `(N, 3, H, W)` in [0, 1].
        targets: `(N,)` class indices.
        precision: Of the masked images' passes: `"auto"` (bfloat16 where the processor has it),
            else `"float32"` or `"bfloat16"`. The softmax over raw logits magnifies the error of
            bfloat16. So where few channels have nearly all of the weight, as in networks for
            ImageNet, these are computed in float32, too: masks to 0.005 (8 photographs,
            SqueezeNet). Where many share it single maps may differ visibly, AD and AG hardly.
        chunk: How many masked images pass through the network at a time; bounds the memory. On a
            CPU its threads share them. Default: chosen by the size of the network's feature maps.
        callback: Called after each chunk of an image's channels.

    Returns:
        Masks `(N, 1, H, W)` in [0, 1].

    Raises:
        ValueError: If chunk is not positive, or for an unknown precision.
    """
    quick = classifier.at_precision(precision)
    if chunk is None:
        dtype = quick.precision or torch.float32
        chunk = images_at_once(classifier, images, classifier.layers, dtype)
    chunk = whole_number("chunk", chunk, 1)
    A = torch.cat([classifier.features(x) for x in images.split(chunk)])  # (N, K, h, w)
    K = A.shape[1]
    threads = threads_for(quick, chunk)
    chunk //= threads
    chunk = math.ceil(K / math.ceil(K / chunk))  # of equal size: a small rest takes long an image
    f_0 = classifier.logits(torch.zeros_like(images[:1]))[0, targets]  # (N,)

    def increase(view: Classifier, i: int, k: Tensor) -> Tensor:
        masked = under_many(images[i, None] * scale, cells[i, k, None], shift)
        return view._run(masked)[:, targets[i]] - f_0[i]

    cells = normalize_cells(A, images.shape[2:])
    scale, shift = classifier._affine()
    u = A.new_zeros(A.shape[:2])
    varied = A.amax(dim=(2, 3)) > A.amin(dim=(2, 3))
    parts = [(i, k) for i in range(len(A)) for k in varied[i].nonzero()[:, 0].split(chunk)]
    with closing(in_parallel(lambda part: increase(quick, *part), parts, threads)) as increases:
        for index, ((i, k), u_k) in enumerate(zip(parts, increases, strict=True), start=1):
            u[i, k] = u_k
            if callback is not None:
                callback(Step(index, len(parts)))
    if quick.precision == torch.bfloat16:
        for i, w_i in enumerate(u.softmax(dim=1)):
            w_k, k = w_i.sort(descending=True)
            k = k[: 1 + int((w_k.cumsum(0) < EXACT).sum())]
            k = k[varied[i, k]]
            if 0 < len(k) <= K * FEW:
                exact = torch.cat([increase(classifier, i, some) for some in k.split(chunk)])
                u[i] += (exact - u[i, k]).mean()  # so far the others are off, too
                u[i, k] = exact
    w = u.softmax(dim=1)
    S = torch.einsum("nk,nkhw->nhw", w, A)[:, None].relu()
    return to_masks(S, images.shape[2:])
