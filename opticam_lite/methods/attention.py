"""The attention of a vision transformer, in the open: what the attention methods share.

Fused kernels never form the attention probabilities, so the transformer is walked through once
more with its own modules and weights, one operation at a time:

    tokens x ──norm──▶ q, k, v ──▶ P = softmax(q kᵀ/√d) ──▶ P v ──proj──▶ + x ──norm, mlp──▶ + x
                                                                    × blocks, norm, head ▶ logits

That the walk gives the network's own logits is checked. Nothing is hooked, patched or replaced.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
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

from ..classifier import Classifier
from ..layout import token_grid

Function = Callable[[Tensor], Tensor]


class Operations:
    """What a transformer is made of. TIBAV gives these operations another backward pass."""

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
        """The place where a skip connection leaves."""
        return x

    def apply(self, f: Function, x: Tensor) -> Tensor:
        """Whatever keeps the shape: a norm, an activation, the softmax, a scale."""
        return f(x)


PLAIN = Operations()


@dataclass(frozen=True)
class Block:
    """The parts of a pre-norm transformer block, whichever library it comes from."""

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

    def __call__(self, x: Tensor, do: Operations) -> tuple[Tensor, Tensor]:
        """Take tokens x `(N, T, D)` to the next x and the attention P `(N, heads, T, T)`."""
        x = do.fork(x)
        q, k, v = self._q_k_v(x, do)
        P = self._attention(q, k, do)
        return self._after(x, do.matmul(P, v), do), P

    def tokens(self, x: Tensor) -> Tensor:
        """Take tokens to the next alone, by the fused kernel, which is quicker."""
        return self._after(x, F.scaled_dot_product_attention(*self._q_k_v(x, PLAIN)), PLAIN)

    def attention(self, x: Tensor) -> Tensor:
        """Take tokens to the attention alone."""
        q, k, _ = self._q_k_v(x, PLAIN)
        return self._attention(q, k, PLAIN)

    def _q_k_v(self, x: Tensor, do: Operations) -> tuple[Tensor, Tensor, Tensor]:
        qkv = do.linear(do.apply(self.norm1, x), *self.qkv)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (N, heads, T, d)
        return do.apply(self.q_norm, q), do.apply(self.k_norm, k), v

    def _attention(self, q: Tensor, k: Tensor, do: Operations) -> Tensor:
        d = q.shape[-1]
        return do.apply(lambda scores: (scores / d**0.5).softmax(-1), do.matmul(q, k.mT))

    def _after(self, x: Tensor, seen: Tensor, do: Operations) -> Tensor:
        y = seen.transpose(1, 2).flatten(2)  # (N, T, D)
        y = do.linear(do.apply(self.norm, y), self.proj.weight, self.proj.bias)
        x = do.fork(do.add(x, do.apply(self.scale1, y)))
        y = chain(self.mlp, do.apply(self.norm2, x), do)
        return do.add(x, do.apply(self.scale2, y))


@dataclass(frozen=True)
class Transformer:
    """The parts of a vision transformer whose head reads the class token.

    Attributes:
        embed: Normalised images → tokens `(N, T, D)`: patches, class token, positions.
        blocks: One after the other.
        norm: After the last block.
        heads: What turns a token into logits; the first for the class token. A distilled DeiT has
            another for its second token, and its logits are the mean of both.
        prefix: How many tokens, the class token first, come before those of the patches.
    """

    embed: Function
    blocks: tuple[Block, ...]
    norm: nn.Module
    heads: tuple[tuple[nn.Module, ...], ...]
    prefix: int

    def __call__(self, x: Tensor, do: Operations = PLAIN) -> tuple[Tensor, list[Tensor]]:
        """Take normalised images to logits `(N, classes)` and each block's P `(N, heads, T, T)`.

        The images enter without gradients: whatever is differentiated begins at the tokens.
        """
        with torch.no_grad():
            x = self.embed(x)
        if torch.is_grad_enabled():
            x = x.requires_grad_()
        attentions = []
        for block in self.blocks:
            x, P = block(x, do)
            attentions.append(P)
        x = do.apply(self.norm, x)
        logits = [chain(head, x[:, i], do) for i, head in enumerate(self.heads)]
        n = len(logits)
        return do.apply(lambda total: total / n, reduce(do.add, logits)), attentions


def chain(modules: Iterable[nn.Module], x: Tensor, do: Operations) -> Tensor:
    """Apply modules one after the other, the linear layers as such."""
    for m in modules:
        x = do.linear(x, m.weight, m.bias) if isinstance(m, nn.Linear) else do.apply(m, x)
    return x


def transformer_of(classifier: Classifier) -> Transformer | str:
    """Return the parts of a classifier's transformer, or why it is none that can be walked.

    The structure names the parts; that they are put together rightly is checked once for each
    network, on a random image, against its own logits.
    """
    network = classifier.network
    if isinstance(network, VisionTransformer):
        parts = _timm(network)
    elif isinstance(network, TorchvisionTransformer):
        parts = _torchvision(network)
    else:
        return f"it is a {type(network).__name__}, not a vision transformer of timm or torchvision"
    if isinstance(parts, Transformer) and network not in _checked:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 3, *classifier.size, generator=generator).to(classifier.device)
        with torch.no_grad():
            expected, (logits, _) = network(x), parts(x)
        if not torch.allclose(logits, expected, rtol=1e-3, atol=1e-3):
            return (
                "its forward pass is not that of a standard transformer: its blocks one by one "
                f"give other logits (largest difference {(logits - expected).abs().max():.2g})"
            )
        _checked.add(network)
    return parts


_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def unfit(classifier: Classifier) -> str | None:
    """Say why there is no class token's attention to look at, or None if there is."""
    parts = transformer_of(classifier)
    return parts if isinstance(parts, str) else None


def need_transformer(method: str, classifier: Classifier) -> Transformer:
    """Return the parts of a classifier's transformer.

    Raises:
        ValueError: If it is none, with the reason.
    """
    parts = transformer_of(classifier)
    if isinstance(parts, str):
        raise ValueError(
            f"{method} needs a vision transformer that classifies by its class token, and "
            f"{classifier.name} can't be explained so: {parts}; grad-cam and opti-cam explain any "
            "network"
        )
    return parts


@torch.no_grad()
def attentions_of(
    parts: Transformer, classifier: Classifier, images: Tensor, *, last_only: bool = False
) -> list[Tensor]:
    """Return the mean attention over heads `(N, T, T)` of each block, or of the last one.

    Rows sum to 1. What comes after the last attention is not computed.
    """
    # Four at a time stay near a CPU's caches; a GPU takes what it is given.
    at_once = 4 if classifier.device.type == "cpu" else len(images)
    batches = []
    for batch in images.split(at_once):
        x, found = parts.embed(classifier._input(batch)), []
        for block in parts.blocks[:-1]:
            if last_only:
                x = block.tokens(x)
            else:
                x, P = block(x, PLAIN)
                found.append(P.mean(1))
        batches.append([*found, parts.blocks[-1].attention(x).mean(1)])
    return [torch.cat(P) for P in zip(*batches, strict=True)]


def roll_out(matrices: Sequence[Tensor]) -> Tensor:
    """Return the class token's row `(N, T)` of the product of matrices `(N, T, T)`, last first.

    Only a row is asked for, so no product of two matrices is needed.
    """
    row = torch.zeros_like(matrices[0][:, :1])  # (N, 1, T)
    row[:, :, 0] = 1
    for A in reversed(matrices):
        row = row @ A
    return row[:, 0]


def to_map(row: Tensor, prefix: int, size: Sequence[int]) -> Tensor:
    """Set the class token and its like aside and lay a row `(N, T)` out as `(N, 1, h, w)`.

    Raises:
        ValueError: If the patches form no grid of the shape of the images.
    """
    patches = row[:, prefix:]
    grid = token_grid(patches.shape[1], (size[0], size[1]))
    if grid is None:
        raise ValueError(
            f"{patches.shape[1]} patches do not form a grid of the shape of a "
            f"{size[0]}×{size[1]} image; use a network whose patches are square"
        )
    return patches.unflatten(1, grid)[:, None]


# ----------------------------------------------------------------- how two libraries name the parts


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
        blocks.append(
            Block(
                b.norm1, b.attn.num_heads, (b.attn.qkv.weight, b.attn.qkv.bias),
                b.attn.q_norm, b.attn.k_norm, b.attn.norm, b.attn.proj, b.ls1,
                b.norm2, _mlp(b.mlp), b.ls2,
            )
        )  # fmt: skip

    def embed(x: Tensor) -> Tensor:
        return network.norm_pre(network.patch_drop(network._pos_embed(network.patch_embed(x))))

    heads: list[tuple[nn.Module, ...]] = [(network.fc_norm, network.head_drop, network.head)]
    if isinstance(network, VisionTransformerDistilled):
        heads = [(network.head_drop, network.head), (network.head_drop, network.head_dist)]
    return Transformer(embed, tuple(blocks), network.norm, tuple(heads), network.num_prefix_tokens)


def _mlp(mlp: nn.Module) -> tuple[nn.Module, ...]:
    """Take an MLP apart if its layers follow each other, else leave it whole."""
    return (mlp.fc1, mlp.act, mlp.norm, mlp.fc2) if isinstance(mlp, Mlp) else (mlp,)


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
