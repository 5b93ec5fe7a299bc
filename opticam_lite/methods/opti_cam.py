"""Opti-CAM: weights optimised per image (Zhang et al. 2024, section 3, eqs. 8-11)."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ..masking import NORMALIZATIONS, to_masks
from ..network import Classifier
from ..registry import check_name, whole_number
from .registry import METHODS, Callback
from .search import SELECTORS, check_numbers, search, select

OBJECTIVES = ("mask", "diff", "io-mask", "io-diff")


@METHODS.register("opti-cam", title="Opti-CAM", source="Zhang et al. 2024", anytime="iterations")
def opti_cam(
    classifier: Classifier,
    images: Tensor,
    targets: Tensor,
    *,
    iterations: int = 100,
    learning_rate: float = 0.1,
    objective: str = "mask",
    normalization: str = "range",
    selector: str = "logit",
    tolerance: float = 1e-10,
    initial_u: Tensor | None = None,
    precision: str = "auto",
    callback: Callback | None = None,
) -> Tensor:
    """Find the convex combination of feature maps that maximises the class logit as a mask.

        S(u) = Σ_k softmax(u)_k A_k                    eq. 8, h = identity
        F(u) = g_c(f(x ⊙ s)),  s = n(up(S(u)))         eq. 10
        u*   = argmax_u F(u), by Adam                   eq. 9

    The features are computed once; each iteration is one forward and one backward pass of the
    masked images. The result is the mask of the largest objective seen, as eq. 9 is an argmax.

    Args:
        classifier: Any, cut at any layer.
        images: `(N, 3, H, W)` in [0, 1].
        targets: `(N,)` class indices.
        iterations: Largest number of steps of Adam (Appendix A: 100). With 0 the map is that of
            `initial_u`, by default the mean feature map.
        learning_rate: Of Adam (Appendix A: 0.1).
        objective: `"mask"` (eq. 10, default), `"diff"` (eq. 19), `"io-mask"` (eq. A1) or
            `"io-diff"` (eq. A2).
        normalization: n, `"range"` (eq. 16, default), `"max"` (eq. 17) or `"sigmoid"` (eq. 18).
        selector: g_c, `"logit"` y_c (default), `"probability"`, `"log-probability"` or `"margin"`
            (y_c − the largest other logit).
        tolerance: The search stops for an image, independently of the others, when its objective
            changes by less than this from one iteration to the next (Appendix A: 1e-10).
        initial_u: Start, `(K,)` or `(N, K)`. Default: zeros (any constant gives the same map).
        precision: Of the search's passes: `"auto"` (bfloat16 where the processor has it), else
            `"float32"` or `"bfloat16"`. Feature maps are always float32.
        callback: Called after each iteration; an exception that it raises ends the run.

    Returns:
        Masks `(N, 1, H, W)` in [0, 1].

    Raises:
        ValueError: If an option is not one of the values above.
    """
    iterations = whole_number("iterations", iterations, 0)
    check_numbers("a positive number", lambda v: 0 < v < math.inf, learning_rate=learning_rate)
    check_numbers("a number ≥ 0", lambda v: v >= 0, tolerance=tolerance)
    check_name("objective", objective, OBJECTIVES)
    check_name("normalization", normalization, NORMALIZATIONS)
    check_name("selector", selector, SELECTORS)
    A = classifier.features(images).detach()  # (N, K, h, w)
    u = _start(initial_u, A)
    # For equal weights take the mean, which may be near 0: softmax would add rounding errors.
    S = A.mean(1, keepdim=True) if initial_u is None else _combination(u, A)
    n = partial(to_masks, size=images.shape[2:], normalization=normalization)
    quick = classifier.quick(precision)
    if not iterations:
        return n(S)

    def g_c(x: Tensor) -> Tensor:
        return select(classifier, quick.logits(x), targets, selector)

    diff, both = objective.endswith("diff"), objective.startswith("io")
    g_x = g_c(images) if diff else None

    def evaluate(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        S = _combination(u, A)
        s = n(S)
        inside = g_c(images * s)
        F = inside if g_x is None else -(g_x - inside).abs()
        if both:
            outside = g_c(images * (1 - s))
            F = F - outside if g_x is None else F + (g_x - outside).abs()
        return S, F, F

    adam = torch.optim.Adam([u], learning_rate, maximize=True, capturable=u.is_cuda)

    def update(g: Tensor) -> None:
        u.grad = g
        adam.step()

    return n(
        search(
            u, evaluate, update,
            start=S, steps=iterations, to_masks=n, tolerance=tolerance, callback=callback,
        )
    )  # fmt: skip


def _combination(u: Tensor, A: Tensor) -> Tensor:
    """S(u) `(N, 1, h, w)` of eq. 8."""
    return torch.einsum("nk,nkhw->nhw", u.softmax(1), A)[:, None]


def _start(initial_u: Tensor | None, A: Tensor) -> Tensor:
    n, k = A.shape[:2]
    if initial_u is None:
        return A.new_zeros(n, k)
    u = torch.as_tensor(initial_u).detach().to(A)
    if u.shape not in ((k,), (n, k)):
        raise ValueError(
            f"initial_u has shape {tuple(u.shape)}; {n} images with {k} feature maps need "
            f"({k},) or ({n}, {k})"
        )
    return u.expand(n, k).clone()
