"""The parts of a vision transformer, described alike for the libraries that define it.

    tokens x ──norm──▶ q, k, v ──▶ P = softmax(q kᵀ/√d) ──▶ P v ──proj──▶ + x ──norm, mlp──▶ + x
                                                                    × blocks, norm, head ▶ logits

Fused kernels never compute the attention matrix P explicitly, so the attention methods run the
transformer by its own modules and weights, one operation at a time. If the head reads the class
token alone, two optimisations follow from the same parts: in the last block the other tokens are
needed as keys and values only (`Transformer.logits`), and setting one channel to 0 there changes
the attention scores by a matrix of rank one (`network.ablation`). The logits of the parts are
checked against those of the network. Nothing is hooked, patched or replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Mlp, VisionTransformer
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vision_transformer import EncoderBlock
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionTransformer

from .probe import logits_of

Function = Callable[[Tensor], Tensor]


class Operations:
    """The operations of a transformer. TIBAV gives them another backward pass."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product x Wᵀ + b."""
        return F.linear(x, weight, bias)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """A product of two activations."""
        return a @ b

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """A sum of two activations: a skip connection."""
        return a + b

    def fork(self, x: Tensor) -> Tensor:
        """The point where a skip connection branches off."""
        return x

    def apply(self, f: Function, x: Tensor) -> Tensor:
        """An operation that keeps the shape: a norm, an activation, the softmax, a scale."""
        return f(x)


PLAIN = Operations()


@dataclass(frozen=True)
class Block:
    """The parts of a pre-norm transformer block."""

    norm1: nn.Module
    heads: int
    qkv: tuple[Tensor, Tensor | None]
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    proj: nn.Linear
    scale1: nn.Module
    norm2: nn.Module
    mlp: tuple[nn.Module, ...]
    scale2: nn.Module

    def __call__(self, x: Tensor, do: Operations = PLAIN) -> tuple[Tensor, Tensor]:
        """Return the output tokens for tokens x `(N, T, D)`, and P `(N, heads, T, T)`."""
        x = do.fork(x)
        q, k, v = self.q_k_v(do.apply(self.norm1, x), do)
        P = self._attention(q, k, do)
        return self.after(x, do.matmul(P, v), do), P

    def tokens(self, x: Tensor, first: int | None = None) -> Tensor:
        """Return the output tokens alone, or the first few of them, by the fused kernel."""
        q, k, v = self.q_k_v(self.norm1(x))
        q = q[:, :, :first]
        if q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu":
            # There the fused kernel's backward pass takes 3 to 6 times as long as two products.
            seen = self._attention(q, k) @ v
        else:
            seen = F.scaled_dot_product_attention(q, k, v)
        return self.after(x[:, :first], seen)

    def attention(self, x: Tensor) -> Tensor:
        """Return the attention P of tokens alone."""
        q, k, _ = self.q_k_v(self.norm1(x))
        return self._attention(q, k)

    def q_k_v(self, x: Tensor, do: Operations = PLAIN) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, keys and values, each `(N, heads, T, d)`, of normalised tokens."""
        qkv = do.linear(x, *self.qkv)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return do.apply(self.q_norm, q), do.apply(self.k_norm, k), v

    def _attention(self, q: Tensor, k: Tensor, do: Operations = PLAIN) -> Tensor:
        d = q.shape[-1]
        return do.apply(lambda scores: (scores / d**0.5).softmax(-1), do.matmul(q, k.mT))

    def after(self, x: Tensor, seen: Tensor, do: Operations = PLAIN) -> Tensor:
        """Add the projected output of the heads, P v `(N, heads, T, d)`, and then the MLP."""
        y = seen.transpose(1, 2).flatten(2)  # (N, T, D)
        y = do.linear(do.apply(self.norm, y), self.proj.weight, self.proj.bias)
        x = do.fork(do.add(x, do.apply(self.scale1, y)))
        y = _chain(self.mlp, do.apply(self.norm2, x), do)
        return do.add(x, do.apply(self.scale2, y))


@dataclass(frozen=True)
class Transformer:
    """The parts of a vision transformer whose head reads the class token.

    Attributes:
        embed: Normalised images → tokens `(N, T, D)`: patches, class token, positions.
        blocks: In forward order.
        norm: After the last block.
        heads: Token → logits; the first is for the class token. A distilled DeiT has another for
            its second token, and its logits are the mean of both.
        prefix: Number of tokens before those of the patches; the first is the class token.
    """

    embed: Function
    blocks: tuple[Block, ...]
    norm: nn.Module
    heads: tuple[tuple[nn.Module, ...], ...]
    prefix: int

    def __call__(self, x: Tensor, do: Operations = PLAIN) -> tuple[Tensor, list[Tensor]]:
        """Return the logits `(N, classes)` of normalised images and each block's P.

        P is `(N, heads, T, T)`. Gradients end at the tokens, not at the images.
        """
        with torch.no_grad():
            x = self.embed(x)
        if torch.is_grad_enabled():
            x = x.requires_grad_()
        attentions = []
        for block in self.blocks:
            x, P = block(x, do)
            attentions.append(P)
        return self.classify(x, do), attentions

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of normalised images; the last block computes the used tokens only."""
        x = self.embed(x)
        for block in self.blocks[:-1]:
            x = block.tokens(x)
        return self.classify(self.blocks[-1].tokens(x, len(self.heads)))

    def classify(self, x: Tensor, do: Operations = PLAIN) -> Tensor:
        """Return the logits from the last block's tokens, at least those that the heads read."""
        x = do.apply(self.norm, x)
        logits = [_chain(head, x[:, i], do) for i, head in enumerate(self.heads)]
        n = len(logits)
        return do.apply(lambda total: total / n, reduce(do.add, logits))


def _chain(modules: Iterable[nn.Module], x: Tensor, do: Operations) -> Tensor:
    """Apply modules one after the other, linear layers by `do.linear`."""
    for m in modules:
        x = do.linear(x, m.weight, m.bias) if isinstance(m, nn.Linear) else do.apply(m, x)
    return x


# ----------------------------------------------------------- names of the parts in two libraries


def describe(network: nn.Module, size: tuple[int, int]) -> Transformer | str:
    """Return the parts of a transformer, or why the network can't be described as one.

    The parts are found by their names; their logits are then checked against those of the network
    on a random image `(1, 3, *size)`.
    """
    parts = parts_of(network)
    if isinstance(parts, str):
        return parts
    generator = torch.Generator().manual_seed(0)
    weight = next(network.parameters())
    x = torch.randn(1, 3, *size, generator=generator).to(weight)
    with torch.no_grad():
        expected, logits = logits_of(network(x)), parts(x)[0]
    if torch.allclose(logits, expected, rtol=1e-3, atol=1e-3):
        return parts
    return (
        "its forward pass is not that of a standard transformer: its blocks one by one give other "
        f"logits (largest difference {(logits - expected).abs().max():.2g})"
    )


def parts_of(network: nn.Module) -> Transformer | str:
    """Return the parts by the names of a network's modules, or why they are not found."""
    if isinstance(network, VisionTransformer):
        return _timm(network)
    if isinstance(network, TorchvisionTransformer):
        return _torchvision(network)
    return f"it is a {type(network).__name__}, not a vision transformer of timm or torchvision"


def _timm(network: VisionTransformer) -> Transformer | str:
    if network.cls_token is None:
        return "it has no class token"
    if network.attn_pool is not None or network.global_pool != "token":
        pool = "map" if network.attn_pool is not None else network.global_pool
        return f"its head pools all tokens ({pool!r}) instead of reading the class token"
    blocks = []
    for b in network.blocks:
        if not isinstance(b, TimmBlock) or not isinstance(b.attn, Attention):
            inner = type(b.attn).__name__ if isinstance(b, TimmBlock) else type(b).__name__
            return f"its blocks are not standard ones ({inner})"
        mlp = b.mlp
        blocks.append(
            Block(
                b.norm1, b.attn.num_heads, (b.attn.qkv.weight, b.attn.qkv.bias),
                b.attn.q_norm, b.attn.k_norm, b.attn.norm, b.attn.proj, b.ls1, b.norm2,
                (mlp.fc1, mlp.act, mlp.norm, mlp.fc2) if isinstance(mlp, Mlp) else (mlp,), b.ls2,
            )
        )  # fmt: skip

    def embed(x: Tensor) -> Tensor:
        return network.norm_pre(network.patch_drop(network._pos_embed(network.patch_embed(x))))

    heads: list[tuple[nn.Module, ...]] = [(network.fc_norm, network.head_drop, network.head)]
    if isinstance(network, VisionTransformerDistilled):
        heads = [(network.head_drop, network.head), (network.head_drop, network.head_dist)]
    return Transformer(embed, tuple(blocks), network.norm, tuple(heads), network.num_prefix_tokens)


def _torchvision(network: TorchvisionTransformer) -> Transformer | str:
    nothing = nn.Identity()
    blocks = []
    for b in network.encoder.layers:
        if not isinstance(b, EncoderBlock):
            return f"its blocks are not standard ones ({type(b).__name__})"
        attention = b.self_attention
        blocks.append(
            Block(
                b.ln_1, b.num_heads, (attention.in_proj_weight, attention.in_proj_bias),
                nothing, nothing, nothing, attention.out_proj, nothing,
                b.ln_2, tuple(b.mlp), nothing,
            )
        )  # fmt: skip

    def embed(x: Tensor) -> Tensor:
        patches = network._process_input(x)
        x = torch.cat([network.class_token.expand(len(x), -1, -1), patches], dim=1)
        return x + network.encoder.pos_embedding

    return Transformer(embed, tuple(blocks), network.encoder.ln, (tuple(network.heads),), 1)
