"""Logits of a network with one channel of the feature maps set to 0, for any channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .classifier import Classifier
from .cut import Rest
from .transformer import Transformer


def ablation(classifier: Classifier, maps: Tensor, rest: Rest) -> Callable[[Tensor], Tensor]:
    """Return a function from channels k `(n,)` to the logits `(n, C)` without each of them.

    Where the head begins with a sum over the channels, subtracting one channel's term is cheaper
    than computing the whole sum without it: the sum of a 1×1 convolution, Z_o = Σ_k W_ok A_k + b_o,
    and those of a transformer's last attention (`AttentionAblation`).

    Args:
        classifier: Cut at the layer of the maps.
        maps, rest: Of one image, `(1, K, h, w)`, from `classifier.split`.
    """
    parts, network = classifier.transformer, classifier.network
    if isinstance(parts, Transformer) and len(rest.values) == 1 and rest.values[0].ndim == 3:
        last = parts.blocks[-1]
        normed = not all(isinstance(m, nn.Identity) for m in (last.q_norm, last.k_norm))
        plain = not (normed or last.rotate or last.biased or parts.pooled) and len(last.qkv) == 1
        if plain and network.get_submodule(classifier.layer) is last.norm1:
            tokens = classifier.feature_layout.from_maps(maps, rest.aside)
            return AttentionAblation(parts, tokens, rest.values[0])
    if (name := classifier.pointwise_reader) is not None:
        convolution: Any = network.get_submodule(name)
        head = classifier.at(name).head
        Z, W = convolution(maps), convolution.weight.flatten(1)

        def from_sum(k: Tensor) -> Tensor:
            Z_k = torch.addcmul(Z, W.T[k, :, None, None], maps[0, k, None], value=-1)
            return head(Z_k, rest.repeat(0, len(k)))

        return from_sum
    kept = 1 - torch.eye(maps.shape[1], dtype=maps.dtype, device=maps.device)[..., None, None]
    return lambda k: classifier.head(maps * kept[k], rest.repeat(0, len(k)))


class AttentionAblation:
    """Logits of one image with one channel of the last attention's input tokens set to 0.

    Without channel k a token x_j is x_j − x_jk e_k. So the scores r·x_j of a query, r = q W_k/√d,
    decrease by r_k x_jk, a matrix of rank one, and its output Σ_j a_j x_j W_v decreases by
    (Σ_j a_j x_jk) e_k W_v: no token has to be projected again. Valid only for the queries of prefix
    tokens, whose own channels are kept.

    Args:
        parts: The transformer; queries and keys must be x W alone, neither normalised nor told
            positions, and the class token must be read.
        x: `(1, T, D)`, input of the last attention.
        skip: `(1, T, D)`, the tokens before the norm, which the skip connection adds.
    """

    def __init__(self, parts: Transformer, x: Tensor, skip: Tensor) -> None:
        self.parts, self.x = parts, x[0]
        self.block, asking = parts.blocks[-1], len(parts.heads)
        self.skip = skip[:, :asking]
        q, k, self.v = (values[0] for values in self.block.q_k_v(x, None)[:3])  # (heads, T, d)
        self.q = q[:, :asking] / q.shape[-1] ** 0.5
        self.scores = self.q @ k.mT  # (heads, asking, T)

    def __call__(self, k: Tensor) -> Tensor:
        """Return the logits `(n, C)` without each of the channels k `(n,)`, one at a time."""
        ((weight, _),) = self.block.qkv
        _, W_k, W_v = weight[:, k].unflatten(0, (3, self.block.heads, -1))  # (heads, d, n)
        x_k = self.x[:, k].T.clone()  # (n, T)
        x_k[:, : self.parts.prefix] = 0  # prefix tokens keep the channel
        r_k = torch.einsum("htd,hdn->nht", self.q, W_k)
        a = (self.scores - r_k[..., None] * x_k[:, None, None]).softmax(-1)  # (n, heads, asking, T)
        lost = torch.einsum("nhtj,nj,hdn->nhtd", a, x_k, W_v)
        skip = self.skip.expand(len(k), -1, -1)
        return self.parts.classify(self.block.after(skip, a @ self.v - lost))
