"""Opti-CAM: weights optimised per image (Zhang et al. 2024, section 3, eqs. 8-11)."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from ..classifier import Classifier
from ..masking import NORMALIZATIONS, to_masks
from ..registry import unknown_name, whole_number
from .registry import METHODS, Callback, Step
from .repeated import Found, Repeated

OBJECTIVES = ("mask", "diff", "io-mask", "io-diff")
SELECTORS = ("logit", "probability", "log-probability", "margin")


@METHODS.register("opti-cam", title="Opti-CAM", source="Zhang et al. 2024")
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
    """Find the convex combination of feature maps that, as a mask, serves the class best.

        S(u) = Σ_k softmax(u)_k A_k                    eq. 8, h = identity
        F(u) = g_c(f(x ⊙ s)),  s = n(up(S(u)))         eq. 10
        u*   = argmax_u F(u), by Adam                   eq. 9

    The features are computed once; each iteration is one pass of the masked images forward and
    back. The result is the mask of the best objective seen, for eq. 9 is an argmax.

    Args:
        classifier: Any, cut at any layer.
        images: `(N, 3, H, W)` in [0, 1].
        targets: `(N,)` class indices.
        iterations: Most steps of Adam (Appendix A: 100). With 0 the map is that of the
            start, by default the mean feature map.
        learning_rate: Of Adam (Appendix A: 0.1).
        objective: `"mask"` (eq. 10, default), `"diff"` (eq. 19), `"io-mask"` (eq. A1) or
            `"io-diff"` (eq. A2).
        normalization: n, `"range"` (eq. 16, default), `"max"` (eq. 17) or `"sigmoid"` (eq. 18).
        selector: g_c, `"logit"` y_c (default), `"probability"`, `"log-probability"` or `"margin"`
            (y_c − the largest other logit).
        tolerance: An image stops by itself, whatever its batch-mates do, when its objective
            changes by less than this from one iteration to the next (Appendix A: 1e-10).
        initial_u: Start, `(K,)` or `(N, K)`. Default: zeros (any constant gives the same map).
        precision: Of the search's passes: `"auto"` (bfloat16 where the processor has it), else
            `"float32"` or `"bfloat16"`. Feature maps are float32 always.
        callback: Called after each iteration; an exception that it raises ends the run.

    Returns:
        Masks `(N, 1, H, W)` in [0, 1].

    Raises:
        ValueError: If an option is not one of the values above.
    """
    iterations = whole_number("iterations", iterations, 0)
    _check(learning_rate, objective, normalization, selector, tolerance)
    size = images.shape[2:]
    A = classifier.features(images).detach()  # (N, K, h, w)
    u = _start(initial_u, A)
    quick = classifier.at_precision(precision)
    # diff and io-diff compare with the unmasked image, whose g_c is the same in every iteration.
    whole = objective.endswith("diff")
    g_x = select(quick.logits(images), targets, selector) if whole else A.new_zeros(len(A))

    def masks_of(S: Tensor) -> Tensor:
        return to_masks(S, size, normalization)

    def evaluate(b: _Batch, u: Tensor) -> tuple[Tensor, Tensor]:
        """S `(n, 1, h, w)` and F `(n,)` of a batch with weights u."""
        S = torch.einsum("nk,nkhw->nhw", u.softmax(1), b.A)[:, None]
        s = masks_of(S)
        F = select(quick.logits(b.x, s), b.c, selector)
        if whole:
            F = -(b.g_x - F).abs()
        if objective.startswith("io"):
            out = select(quick.logits(b.x, 1 - s), b.c, selector)
            F = F + (b.g_x - out).abs() if whole else F - out
        return S, F

    # What Adam divides its moments by in iteration t: 1 − βᵗ.
    t = torch.arange(1, iterations + 1, device=A.device)
    corrections = torch.stack([-torch.expm1(t * math.log(beta)) for beta in (0.9, 0.999)], 1)
    t = torch.zeros(1, dtype=torch.int64, device=A.device)

    def iterate(b: _Batch) -> None:
        with torch.enable_grad():
            u = b.u.detach().requires_grad_()
            S, F = evaluate(b, u)
            (g,) = torch.autograd.grad(F.sum(), u)
        b.running &= (F.detach() - b.F).abs() >= tolerance
        b.keep(S.detach(), F.detach())
        b.m.mul_(0.9).add_(g, alpha=0.1)
        b.v.mul_(0.999).addcmul_(g, g, value=0.001)
        of_m, of_v = corrections.index_select(0, t).unbind(1)
        step = learning_rate * (b.m / of_m) / ((b.v / of_v).sqrt() + 1e-8)
        b.u.add_(step * b.running[:, None])  # an image that has finished stays where it is
        t.add_(1)

    # Equal weights: their exact mean, which may be next to 0.
    S = A.mean(1) if initial_u is None else torch.einsum("nk,nkhw->nhw", u.softmax(1), A)
    found = Found.at(S[:, None])  # of all images
    b = _Batch(
        **{name: values.clone() for name, values in vars(found).items()},
        **{"rows": torch.arange(len(A), device=A.device), "x": images, "c": targets},
        **{"A": A, "g_x": g_x, "u": u, "m": torch.zeros_like(u), "v": torch.zeros_like(u)},
        running=torch.ones(len(A), dtype=torch.bool, device=A.device),
    )

    def store() -> None:
        for name, values in vars(found).items():
            values[b.rows] = getattr(b, name)

    again = Repeated(partial(iterate, b), A.device)
    # Asking a GPU which images have finished makes it wait; a CPU loses nothing.
    ask_every = 1 if A.device.type == "cpu" else 10
    for index in range(1, iterations + 1):
        again()
        if callback is not None:
            store()
            callback(Step(index, iterations, found.F.clone(), found.S.clone(), masks_of))
        if index % ask_every == 0 and not b.running.all():
            store()
            b = b.only(b.running)
            again = Repeated(partial(iterate, b), A.device)
        if not len(b.rows):
            break
    if iterations and len(b.rows):
        b.keep(*evaluate(b, b.u))  # the last step deserves to be judged, too
        store()
    return masks_of(found.S_best)


@dataclass
class _Batch(Found):
    """Images that are optimised together; an iteration changes in place what it changes."""

    rows: Tensor
    """Where they are among all images."""
    x: Tensor
    c: Tensor
    A: Tensor
    g_x: Tensor
    u: Tensor
    m: Tensor
    v: Tensor
    running: Tensor

    def only(self, some: Tensor) -> _Batch:
        """Return some of the images, chosen by a boolean for each."""
        return _Batch(*(getattr(self, field.name)[some] for field in fields(self)))


def select(logits: Tensor, targets: Tensor, selector: str) -> Tensor:
    """Apply the selector function g_c to logits `(N, C)`: one number an image, `(N,)`."""
    c = targets[:, None]
    if selector == "logit":
        return logits.gather(1, c)[:, 0]
    if selector == "probability":
        return logits.softmax(1).gather(1, c)[:, 0]
    if selector == "log-probability":
        return logits.log_softmax(1).gather(1, c)[:, 0]
    if selector == "margin":
        others = logits.scatter(1, c, -math.inf).amax(1)
        return logits.gather(1, c)[:, 0] - others
    raise ValueError(unknown_name("selector", selector, SELECTORS))


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


def _check(
    learning_rate: float,
    objective: str,
    normalization: str,
    selector: str,
    tolerance: float,
) -> None:
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate is {learning_rate}; a positive number is needed")
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; a number ≥ 0 is needed")
    if objective not in OBJECTIVES:
        raise ValueError(unknown_name("objective", objective, OBJECTIVES))
    if normalization not in NORMALIZATIONS:
        raise ValueError(unknown_name("normalization", normalization, NORMALIZATIONS))
    if selector not in SELECTORS:
        raise ValueError(unknown_name("selector", selector, SELECTORS))
