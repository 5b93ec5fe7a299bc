"""TIBAV: transformer interpretability beyond attention visualization (Chefer et al., CVPR 2021).

Relevance is 1 at the target's logit and is propagated backwards, layer by layer, to the inputs in
proportion to their contributions. The rules are implemented as operations whose *backward pass
propagates relevance instead of gradients*, so autograd traverses the network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from ..masking import to_masks
from ..network import Classifier, Operations, Transformer
from .attention import need_transformer, roll_out, to_map
from .registry import METHODS


def unfit(classifier: Classifier) -> str | None:
    """Return why TIBAV can't explain a classifier, or None if it can."""
    parts = classifier.transformer
    return parts if isinstance(parts, str) else _without_rule(parts)


def _without_rule(parts: Transformer) -> str | None:
    if parts.pooled:
        return "TIBAV is defined by the class token, and its head reads the mean of the patches"
    if any(block.rotate is not None for block in parts.blocks):
        return "TIBAV has no relevance rule for its rotary position embedding"
    # A module that contains linear layers is no activation or norm.
    for module in (m for block in parts.blocks for m in block.mlp):
        inner = [m for m in module.modules() if isinstance(m, nn.Linear) and m is not module]
        if inner:
            return f"TIBAV has no relevance rule for its MLP ({type(module).__name__})"
    return None


@METHODS.register(
    "tibav", title="TIBAV", source="Chefer et al. 2021", unfit=unfit, uses_layer=False
)
def tibav(classifier: Classifier, images: Tensor, targets: Tensor) -> Tensor:
    """Weigh each block's attention by its gradient and its relevance to the class.

        C_b = mean over heads of relu(∂y_c/∂P_b ⊙ R(P_b))     eq. 13 of Chefer et al.
        S   = ((C_L + I) ⋯ (C_1 + I))[class token, patches]    eq. 14

    with the relevance R by LRP from y_c (`Relevance`). The order of the product, last block first,
    and the rules are those of the authors' code. A bias of the attention scores (relative
    positions) gets no relevance, like that of a linear layer.

    Args:
        classifier: A vision transformer with a class token; where it is cut does not matter.
        images: `(N, 3, H, W)` in [0, 1].
        targets: `(N,)` class indices.

    Returns:
        Masks `(N, 1, H, W)` in [0, 1].

    Raises:
        ValueError: If the network is no vision transformer with a class token, or has parts for
            which the paper gives no rule.
    """
    parts = need_transformer("tibav", classifier)
    reason = _without_rule(parts)
    if reason is not None:
        raise ValueError(f"tibav can't explain {classifier.name}: {reason}; rollout can")
    x = classifier.normalised(images)
    one_hot = F.one_hot(targets, classifier.classes).to(x)  # ∂y_c/∂y, and the relevance of y
    with torch.enable_grad():
        y, P = parts(x)
        gradients = torch.autograd.grad(y, P, one_hot)
        y, P = parts(x, Relevance())
        relevances = torch.autograd.grad(y, P, one_hot)
    identity = torch.eye(P[0].shape[-1], device=x.device)
    C = [(g * R).relu().mean(1) + identity for g, R in zip(gradients, relevances, strict=True)]
    S = to_map(roll_out(parts, C), parts.prefix, images.shape[2:])
    return to_masks(S, images.shape[2:])


class Relevance(Operations):
    """The operations of a transformer with a backward pass that propagates relevance."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `_Linear`."""
        return _Linear.apply(x, weight, bias)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """See `_Matmul`."""
        return _Matmul.apply(a, b)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """See `_Add`."""
        return _Add.apply(a, b)

    def fork(self, x: Tensor) -> Tensor:
        """See `_Fork`."""
        return _Fork.apply(x)

    def apply(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Norms, activations, the softmax and scales pass relevance on unchanged."""
        return _Same.apply(x, f)


class _Linear(Function):
    """The αβ rule with α = 1: only positive contributions count, and the bias gets none.

    R_j = Σ_i (x_j w_ij)⁺ / (Σ_j' (x_j' w_ij')⁺) R_i. A contribution is positive where input and
    weight have the same sign.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, R: Tensor) -> tuple[Tensor, None, None]:
        x, w = ctx.saved_tensors
        signs = {"min": 0.0}, {"max": 0.0}
        x_pn = torch.cat([x.clamp(**sign) for sign in signs], -1)  # (…, 2 in): x⁺, x⁻
        w_pn = torch.cat([w.clamp(**sign) for sign in signs], -1)  # (out, 2 in): w⁺, w⁻
        S = _divide(R, x_pn @ w_pn.T)
        R_p, R_n = (x_pn * (S @ w_pn)).chunk(2, -1)
        return R_p + R_n, None, None


class _Matmul(Function):
    """Half of the relevance for either factor, distributed by contribution.

    The paper divides it between the factors as in `_Add`; the authors' code halves it.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        Z = a @ b
        ctx.save_for_backward(a, b, Z)
        return Z

    @staticmethod
    def backward(ctx: Any, R: Tensor) -> tuple[Tensor, Tensor]:
        a, b, Z = ctx.saved_tensors
        S = _divide(R, Z)
        return a * (S @ b.mT) / 2, b * (a.mT @ S) / 2


class _Add(Function):
    """Distribute relevance by contribution, then scale both parts so that the sum is conserved.

    Parts of opposite sign would be unbounded (a/(a + b) is any number), so each image's part is
    scaled to |Σa| / (|Σa| + |Σb|) of the whole, eqs. 9 and 10 of the paper. The authors' code takes
    these sums over the whole batch.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a + b

    @staticmethod
    def backward(ctx: Any, R: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        S = _divide(R, a + b)
        R_a, R_b = a * S, b * S
        a_sum, b_sum, whole = _sum(R_a), _sum(R_b), _sum(R)
        both = a_sum.abs() + b_sum.abs()
        R_a = R_a * _divide(_divide(a_sum.abs(), both) * whole, a_sum)
        R_b = R_b * _divide(_divide(b_sum.abs(), both) * whole, b_sum)
        return R_a, R_b


class _Fork(Function):
    """The relevances of both branches are summed, which autograd does before this.

    The authors' code divides by the value and multiplies by it again, which removes relevance from
    values of about 1e-9; relevance can be large there, so the effect is visible in the map.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, R: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x * _divide(R, x)


class _Same(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        return f(x).view_as(x)

    @staticmethod
    def backward(ctx: Any, R: Tensor) -> tuple[Tensor, None]:
        return R, None


def _sum(R: Tensor) -> Tensor:
    """Sum over each image, shaped to broadcast against it."""
    return R.sum(tuple(range(1, R.ndim)), keepdim=True)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a/b, and 0 where b is 0. The 1e-9 is the authors'."""
    below = b + 1e-9
    return a / below.where(below != 0, 1e-9) * (b != 0)
