"""Opti-CAM in twenty passes: other steps, the same saliency maps (ours)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..classifier import Classifier
from ..masking import to_masks
from ..registry import whole_number
from .registry import METHODS, Callback, Step
from .repeated import Found, Repeated


@METHODS.register("opti-cam-fast", title="Fast Opti-CAM", source="opticam_lite")
def opti_cam_fast(
    classifier: Classifier,
    images: Tensor,
    targets: Tensor,
    *,
    passes: int = 20,
    precision: str = "auto",
    callback: Callback | None = None,
) -> Tensor:
    """Find the combination of feature maps that wins the most probability, in few passes.

    As in Opti-CAM, a mask is a combination of feature maps that is optimised through the network.
    Four things are different:

    1. *What is sought.* Not the logit but the log-odds of the class, log p/(1 − p): what AD and AG
       measure, and unlike log p it does not fall asleep as p nears 1.
    2. *Any weights.* They may be negative, as in CAM: a channel that speaks against the class can
       be taken out of the mask. No softmax stands between them and the gradient, so that a channel
       once small is not held there. (n undoes scale and shift of S; their sum is free.)
    3. *Equal footing.* Each feature map is divided by its standard deviation, so that a step counts
       the same for a loud channel and for a quiet one.
    4. *Length.* Log-odds know no scale, so only the direction of the gradient is used: its largest
       component becomes 1, and the square root of the others lies between the gradient, where few
       channels move, and its sign, where all do (Adam's first step). Steps fall linearly to 0.

        S(w) = Σ_k w_k A_k/σ_k,      w = 1 at first
        F(w) = log p/(1 − p) of f(x ⊙ n(up(S(w))))
        d = sign(∇F) √(|∇F|/max|∇F|)
        m ← ½ m + d,        w ← w + 2 (1 − t/T) m         t = 0, 1, … T − 1

    Args:
        classifier: Any, cut at any layer.
        images: `(N, 3, H, W)` in [0, 1].
        targets: `(N,)` class indices.
        passes: How often the network is run in all: once for the feature maps, then on masked
            images, there and back; the last one only judges. At least 2.
        precision: Of the passes: `"auto"` (bfloat16 where the processor has it), else `"float32"`
            or `"bfloat16"`. Feature maps are float32 always.
        callback: Called after each pass on masked images.

    Returns:
        Masks `(N, 1, H, W)` in [0, 1]: those of the best log-odds seen.

    Raises:
        ValueError: If passes is not a whole number ≥ 2, or the precision is unknown.
    """
    passes = whole_number("passes", passes, 2)
    size = images.shape[2:]
    A = classifier.features(images).detach()  # (N, K, h, w)
    quick = classifier.at_precision(precision)
    A = A / _deviation(A)
    w, m = A.new_ones(A.shape[:2]), A.new_zeros(A.shape[:2])
    c = targets[:, None]
    T = passes - 1
    lengths = 2 * (1 - torch.arange(T, device=A.device) / T)
    t = torch.zeros(1, dtype=torch.int64, device=A.device)
    found = Found.at(A.mean(1, keepdim=True))

    def evaluate(w: Tensor) -> tuple[Tensor, Tensor]:
        """S `(N, 1, h, w)` and F `(N,)` of weights w."""
        S = torch.einsum("nk,nkhw->nhw", w, A)[:, None]
        y = quick.logits(images, to_masks(S, size))
        # log p/(1 − p) = y_c − log Σ_j≠c exp y_j
        return S, y.gather(1, c)[:, 0] - y.scatter(1, c, -math.inf).logsumexp(1)

    def step() -> None:
        with torch.enable_grad():
            leaf = w.detach().requires_grad_()
            S, F = evaluate(leaf)
            (g,) = torch.autograd.grad(F.sum(), leaf)
        found.keep(S.detach(), F.detach())
        d = g.sign() * (g.abs() / g.abs().amax(1, keepdim=True).clamp(min=1e-30)).sqrt()
        m.mul_(0.5).add_(d)
        w.add_(lengths.index_select(0, t) * m)
        t.add_(1)

    again = Repeated(step, A.device)
    for index in range(1, T + 1):
        if index < T:
            again()
        else:
            found.keep(*evaluate(w))  # the last pass needs no way back
        if callback is not None:
            S, F = found.S.clone(), found.F.clone()
            callback(Step(index, T, F, S, lambda S: to_masks(S, size)))
    return to_masks(found.S_best, size)


def _deviation(A: Tensor) -> Tensor:
    """σ_k of each map `(N, K, 1, 1)`; infinite for a flat one, which can't tell pixels apart."""
    sigma = A.std(dim=(2, 3), keepdim=True, correction=0)
    flat = sigma <= 1e-6 * sigma.amax(1, keepdim=True)
    return sigma.where(~flat, torch.full_like(sigma, math.inf))
