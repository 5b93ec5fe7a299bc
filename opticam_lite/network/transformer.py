"""The parts of a vision transformer, described alike for the libraries that define it.

    tokens x ──norm──▶ q, k, v ──▶ P = softmax(q kᵀ/√d) ──▶ P v ──proj──▶ + x ──norm, mlp──▶ + x
                                                                    × blocks, norm, head ▶ logits

Where a block is told the tokens' positions, q and k are rotated by them (rotary embedding: EVA-02,
DINOv3) or a bias is added to q kᵀ/√d (relative positions: BEiT).

Fused kernels never compute the attention matrix P explicitly, so the attention methods run the
transformer by its own modules and weights, one operation at a time. If the head reads the class
token alone, two optimisations follow from the same parts: in the last block the other tokens are
needed as keys and values only (`Transformer.logits`), and setting one channel to 0 there changes
the attention scores by a matrix of rank one (`network.ablation`). The logits of the parts are
checked against those of the network. Nothing is hooked, patched or replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from timm.layers import apply_rot_embed_cat
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import Mlp, VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vision_transformer import EncoderBlock
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionTransformer

from .probe import logits_of

Function = Callable[[Tensor], Tensor]
Linear = tuple[Tensor, Tensor | None]  # weight, bias
Positions = Tensor | None  # what a block is told: a rotary embedding, or a bias of the scores


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
    """The parts of a transformer block, which adds an attention and an MLP to its tokens.

    Attributes:
        norm1, norm2: Before the attention and the MLP.
        heads: Number of heads of the queries.
        qkv: One projection to queries, keys and values, or one for each of them.
        q_norm, k_norm: Of queries and keys, before they are rotated.
        rotate: Queries or keys and positions → the same, rotated, or None.
        biased: Whether positions are a bias of the scores.
        norm: Of the output of the heads.
        scale1, scale2: Layer scale, or the norm after the attention and after the MLP.
    """

    norm1: Function
    heads: int
    qkv: tuple[Linear, ...]
    q_norm: Function
    k_norm: Function
    rotate: Callable[[Tensor, Tensor], Tensor] | None
    biased: bool
    norm: Function
    proj: nn.Linear
    scale1: Function
    norm2: Function
    mlp: tuple[nn.Module, ...]
    scale2: Function

    def __call__(
        self, x: Tensor, where: Positions, do: Operations = PLAIN
    ) -> tuple[Tensor, Tensor]:
        """Return the output tokens for tokens x `(N, T, D)`, and P `(N, heads, T, T)`."""
        x = do.fork(x)
        q, k, v, bias = self.q_k_v(do.apply(self.norm1, x), where, do)
        P = self._attention(q, k, bias, do)
        return self.after(x, do.matmul(P, v), do), P

    def tokens(self, x: Tensor, where: Positions, first: int | None = None) -> Tensor:
        """Return the output tokens alone, or the first few of them, by the fused kernel."""
        q, k, v, bias = self.q_k_v(self.norm1(x), where)
        q, bias = q[:, :, :first], None if bias is None else bias[..., :first, :]
        if q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu":
            # There the fused kernel's backward pass takes 3 to 6 times as long as two products.
            seen = self._attention(q, k, bias) @ v
        else:
            seen = F.scaled_dot_product_attention(q, k, v, bias)
        return self.after(x[:, :first], seen)

    def attention(self, x: Tensor, where: Positions) -> Tensor:
        """Return the attention P of tokens alone."""
        q, k, _, bias = self.q_k_v(self.norm1(x), where)
        return self._attention(q, k, bias)

    def q_k_v(
        self, x: Tensor, where: Positions, do: Operations = PLAIN
    ) -> tuple[Tensor, Tensor, Tensor, Positions]:
        """Return what normalised tokens are projected to, and the bias of the scores.

        Queries, keys and values are `(N, heads, T, d)`, the bias is added to `(N, heads, T, T)`.
        """
        projected = [do.linear(x, *linear) for linear in self.qkv]
        q, k, v = projected if len(projected) == 3 else projected[0].chunk(3, -1)
        d = q.shape[-1] // self.heads
        q, k, v = (y.unflatten(2, (-1, d)).transpose(1, 2) for y in (q, k, v))
        q, k = do.apply(self.q_norm, q), do.apply(self.k_norm, k)
        if self.rotate is not None and where is not None:
            q, k = self.rotate(q, where), self.rotate(k, where)
        shared = self.heads // k.shape[1]  # how many heads share a key and a value
        if shared > 1:
            k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        return q, k, v, where if self.biased else None

    def _attention(self, q: Tensor, k: Tensor, bias: Positions, do: Operations = PLAIN) -> Tensor:
        d = q.shape[-1]

        def softmax(scores: Tensor) -> Tensor:
            scores = scores / d**0.5
            return (scores if bias is None else scores + bias).softmax(-1)

        return do.apply(softmax, do.matmul(q, k.mT))

    def after(self, x: Tensor, seen: Tensor, do: Operations = PLAIN) -> Tensor:
        """Add the projected output of the heads, P v `(N, heads, T, d)`, and then the MLP."""
        y = seen.transpose(1, 2).flatten(2)  # (N, T, D)
        y = do.linear(do.apply(self.norm, y), self.proj.weight, self.proj.bias)
        x = do.fork(do.add(x, do.apply(self.scale1, y)))
        y = _chain(self.mlp, do.apply(self.norm2, x), do)
        return do.add(x, do.apply(self.scale2, y))


@dataclass(frozen=True)
class Transformer:
    """The parts of a vision transformer whose head reads the class token, or the mean of patches.

    Attributes:
        embed: Normalised images → tokens `(N, T, D)`: patches, class token, positions; and the
            positions that each block is told.
        blocks: In forward order.
        norm: After the last block.
        heads: What is read → logits; the first is for the class token. A distilled DeiT has another
            for its second token, and its logits are the mean of both.
        prefix: Number of tokens before those of the patches; the first is the class token.
        pooled: Whether the head reads the mean of the patches' tokens.
    """

    embed: Callable[[Tensor], tuple[Tensor, Sequence[Positions]]]
    blocks: tuple[Block, ...]
    norm: nn.Module
    heads: tuple[tuple[nn.Module, ...], ...]
    prefix: int
    pooled: bool = False

    def __call__(self, x: Tensor, do: Operations = PLAIN) -> tuple[Tensor, list[Tensor]]:
        """Return the logits `(N, classes)` of normalised images and each block's P.

        P is `(N, heads, T, T)`. Gradients end at the tokens, not at the images.
        """
        with torch.no_grad():
            x, positions = self.embed(x)
        if torch.is_grad_enabled():
            x = x.requires_grad_()
        attentions = []
        for block, where in zip(self.blocks, positions, strict=True):
            x, P = block(x, where, do)
            attentions.append(P)
        return self.classify(x, do), attentions

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of normalised images; the last block computes the used tokens only."""
        x, positions = self.embed(x)
        for block, where in zip(self.blocks[:-1], positions, strict=False):
            x = block.tokens(x, where)
        first = None if self.pooled else len(self.heads)
        return self.classify(self.blocks[-1].tokens(x, positions[-1], first))

    def classify(self, x: Tensor, do: Operations = PLAIN) -> Tensor:
        """Return the logits from the last block's tokens, at least those that the heads read."""
        x = do.apply(self.norm, x)
        x = x[:, self.prefix :].mean(1, keepdim=True) if self.pooled else x
        logits = [_chain(head, x[:, i], do) for i, head in enumerate(self.heads)]
        n = len(logits)
        return do.apply(lambda total: total / n, reduce(do.add, logits))

    def rows_read(self, matrix: Tensor) -> Tensor:
        """Return the row `(N, T)` of a matrix `(N, T, T)` for the token that the head reads.

        It is that of the class token, or the mean of the patches' rows if their mean is read.
        """
        return matrix[:, self.prefix :].mean(1) if self.pooled else matrix[:, 0]


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
        expected = logits_of(network(x))
        try:
            logits, _ = parts(x)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            network(x)  # raises where it is the network that fails, such as for want of memory
            return f"its parts, put together as those of a standard transformer, fail ({error})"
    if torch.allclose(logits, expected, rtol=1e-3, atol=1e-3):
        return parts
    return (
        "its forward pass is not that of a standard transformer: its blocks one by one give other "
        f"logits (largest difference {(logits - expected).abs().max():.2g})"
    )


def parts_of(network: nn.Module) -> Transformer | str:
    """Return the parts by the names of a network's modules, or why they are not found."""
    for kind, embedded in _EMBEDDINGS.items():
        if isinstance(network, kind):
            return _timm(network, embedded)
    if isinstance(network, TorchvisionTransformer):
        return _torchvision(network)
    return (
        f"it is a {type(network).__name__}, and attention is read from timm's VisionTransformer, "
        "Eva, Beit and VisionTransformerRelPos and from torchvision's VisionTransformer only"
    )


def _vit(network: Any, x: Tensor) -> tuple[Tensor, Sequence[Positions]]:
    x = network.norm_pre(network.patch_drop(network._pos_embed(network.patch_embed(x))))
    return x, [None] * len(network.blocks)


def _eva(network: Any, x: Tensor) -> tuple[Tensor, Sequence[Positions]]:
    x, rope = network._pos_embed(network.patch_embed(x))
    mixed = getattr(network, "rope_mixed", False)  # then each block has an embedding of its own
    return network.norm_pre(x), rope if mixed else [rope] * len(network.blocks)


def _beit(network: Any, x: Tensor) -> tuple[Tensor, Sequence[Positions]]:
    x = torch.cat([network.cls_token.expand(len(x), -1, -1), network.patch_embed(x)], 1)
    x = x if network.pos_embed is None else x + network.pos_embed
    shared = x.new_zeros(1, 1, 1, 1) if network.rel_pos_bias is None else network.rel_pos_bias()
    own = [b.attn._get_rel_pos_bias() if b.attn.window_size else 0 for b in network.blocks]
    return x, [shared + bias for bias in own]


def _relpos(network: Any, x: Tensor) -> tuple[Tensor, Sequence[Positions]]:
    x = network.patch_embed(x)
    if network.cls_token is not None:
        x = torch.cat([network.cls_token.expand(len(x), -1, -1), x], 1)
    return x, [(network.shared_rel_pos or b.attn.rel_pos).get_bias() for b in network.blocks]


_EMBEDDINGS = {VisionTransformer: _vit, Eva: _eva, Beit: _beit, VisionTransformerRelPos: _relpos}
_ATTENTIONS = ("Attention", "EvaAttention", "AttentionRope", "RelPosAttention")
_PRE_NORM = ("Block", "EvaBlock", "RelPosBlock")
_POST_NORM = ("ResPostBlock", "EvaBlockPostNorm", "ResPostRelPosBlock")


def _timm(network: Any, embedded: Callable[..., Any]) -> Transformer | str:
    pool = network.global_pool
    if pool not in ("token", "avg"):
        return f"its head pools all tokens ({pool!r}), not by the class token or a mean"
    rotary = getattr(network, "rope", None) is not None
    biased = isinstance(network, Beit | VisionTransformerRelPos)
    blocks = []
    for b in network.blocks:
        block = _timm_block(b, rotary=rotary, biased=biased)
        if isinstance(block, str):
            return f"its blocks are not standard ones ({block})"
        blocks.append(block)
    heads: list[tuple[nn.Module, ...]] = [(network.fc_norm, network.head_drop, network.head)]
    if isinstance(network, VisionTransformerDistilled):
        heads = [(network.head_drop, network.head), (network.head_drop, network.head_dist)]
    return Transformer(
        partial(embedded, network), tuple(blocks), network.norm, tuple(heads),
        network.num_prefix_tokens, pool == "avg",
    )  # fmt: skip


def _timm_block(b: Any, *, rotary: bool, biased: bool) -> Block | str:
    """Return the parts of a block, or the name of what is not known in it.

    Args:
        b: The block.
        rotary, biased: How it is told the positions.
    """
    if not _is(b, _PRE_NORM + _POST_NORM):
        return type(b).__name__
    a = b.attn
    if not _is(a, _ATTENTIONS):
        return type(a).__name__
    if getattr(a, "gate", None) is not None:
        return "gated attention"
    nothing = nn.Identity()
    if a.qkv is None:
        qkv = tuple((m.weight, m.bias) for m in (a.q_proj, a.k_proj, a.v_proj))
    else:
        apart = getattr(a, "q_bias", None) is not None
        bias = torch.cat([a.q_bias, a.k_bias, a.v_bias]) if apart else a.qkv.bias
        qkv = ((a.qkv.weight, bias),)
    half = getattr(a, "rotate_half", False)
    rotate = partial(_rotated, prefix=a.num_prefix_tokens, half=half) if rotary else None
    before, after = (b.norm1, b.norm2), (_scale(b, 1), _scale(b, 2))
    if _is(b, _POST_NORM):
        before, after = (nothing, nothing), before
    mlp = (b.mlp.fc1, b.mlp.act, b.mlp.norm, b.mlp.fc2) if isinstance(b.mlp, Mlp) else (b.mlp,)
    return Block(
        before[0], a.num_heads, qkv, getattr(a, "q_norm", nothing), getattr(a, "k_norm", nothing),
        rotate, biased, getattr(a, "norm", nothing), a.proj, after[0], before[1], mlp, after[1],
    )  # fmt: skip


def _is(module: object, names: Iterable[str]) -> bool:
    return any(kind.__name__ in names for kind in type(module).__mro__)


def _scale(b: Any, i: int) -> Function:
    gamma = getattr(b, f"gamma_{i}", None)
    return getattr(b, f"ls{i}", nn.Identity()) if gamma is None else partial(torch.mul, gamma)


def _rotated(y: Tensor, rope: Tensor, *, prefix: int, half: bool) -> Tensor:
    """Rotate the queries or keys `(N, heads, T, d)` of the patches."""
    patches = apply_rot_embed_cat(y[:, :, prefix:], rope, half=half)
    return torch.cat([y[:, :, :prefix], patches], 2).type_as(y)


def _torchvision(network: TorchvisionTransformer) -> Transformer | str:
    nothing = nn.Identity()
    blocks = []
    for b in network.encoder.layers:
        if not isinstance(b, EncoderBlock):
            return f"its blocks are not standard ones ({type(b).__name__})"
        attention = b.self_attention
        blocks.append(
            Block(
                b.ln_1, b.num_heads, ((attention.in_proj_weight, attention.in_proj_bias),),
                nothing, nothing, None, False, nothing, attention.out_proj, nothing,
                b.ln_2, tuple(b.mlp), nothing,
            )
        )  # fmt: skip

    def embed(x: Tensor) -> tuple[Tensor, list[None]]:
        patches = network._process_input(x)
        x = torch.cat([network.class_token.expand(len(x), -1, -1), patches], dim=1)
        return x + network.encoder.pos_embedding, [None] * len(blocks)

    return Transformer(embed, tuple(blocks), network.encoder.ln, (tuple(network.heads),), 1)
