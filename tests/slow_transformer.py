"""Small transformers, and the simplest of them once more, slowly, for the methods of attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models import VisionTransformer as TorchvisionTransformer

import opticam_lite as ol

TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
TORCHVISION = {
    "image_size": 32, "patch_size": 8, "hidden_dim": 16, "num_layers": 2, "num_heads": 2,
    "mlp_dim": 64,
}  # fmt: skip

KINDS = {
    "biased": {"qkv_bias": True},
    "without bias": {"qkv_bias": False},
    "mean of the patches": {"global_pool": "avg", "fc_norm": False},
    "relative positions": {
        "kind": Beit, "global_pool": "token", "qkv_bias": False, "use_rel_pos_bias": True,
    },
}  # fmt: skip


def build(kind: Callable[..., nn.Module] = VisionTransformer, **options: object) -> nn.Module:
    """A small transformer whose weights are large enough for the classes to differ."""
    torch.manual_seed(0)
    network = kind(
        **{**(TORCHVISION if kind is TorchvisionTransformer else TIMM), "num_classes": 5, **options}
    )
    for parameter in network.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def classifier_of(network: nn.Module, **options: object) -> ol.Classifier:
    half = (0.5, 0.5, 0.5)
    return ol.Classifier(network, mean=half, std=half, **{"size": 32, "device": "cpu", **options})


class Slow:
    """A timm ViT of the simplest kind, one float64 image at a time, from its weights alone.

    Its attention may have a bias of relative positions, and its head may read the patches' mean.
    """

    def __init__(self, network: nn.Module, x: Tensor) -> None:
        self.w = {k: v.double() for k, v in network.state_dict().items()}
        self.depth, self.heads = len(network.blocks), network.blocks[0].attn.num_heads
        self.pooled = network.global_pool == "avg"
        self.biases = [
            attn._get_rel_pos_bias()[0].double() if hasattr(attn, "window_size") else None
            for attn in (b.attn for b in network.blocks)
        ]
        w = self.w
        patches = nn.functional.conv2d(
            x[None].double(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8
        )
        x = torch.cat([w["cls_token"][0], patches[0].flatten(1).T]) + w["pos_embed"][0]  # (T, D)
        self.seen: list[dict[str, Tensor]] = []
        for b in range(self.depth):
            x = self.block(f"blocks.{b}.", x.requires_grad_(), self.biases[b])
        self.last = self.norm("norm.", x)
        self.logits = self.linear("head.", self.last[1:].mean(0) if self.pooled else self.last[0])

    def row(self, matrix: Tensor) -> Tensor:
        """What the class token's row, or the mean of the patches' rows, has for the patches."""
        return matrix[1:, 1:].mean(0) if self.pooled else matrix[0, 1:]

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * self.w[name + "weight"] + self.w[name + "bias"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        bias = self.w.get(name + "bias")
        return x @ self.w[name + "weight"].T + (0 if bias is None else bias)

    def block(self, name: str, x: Tensor, bias: Tensor | None) -> Tensor:
        s = {"x": x, "n1": self.norm(name + "norm1.", x)}
        s["q"], s["k"], s["v"] = self.linear(name + "attn.qkv.", s["n1"]).chunk(3, -1)
        T, D = x.shape
        d = D // self.heads
        P, context = [], []
        for head in range(self.heads):
            q, k, v = (s[letter][:, head * d : (head + 1) * d] for letter in "qkv")
            rows = []
            for i in range(T):
                scores = torch.stack([(q[i] * k[j]).sum() / d**0.5 for j in range(T)])
                scores = scores if bias is None else scores + bias[head, i]
                rows.append(scores.exp() / scores.exp().sum())
            P.append(torch.stack(rows))
            context.append(P[-1] @ v)
        s["P"], s["context"] = torch.stack(P), torch.cat(context, 1)
        # Of the loop's P the gradient is asked, so it has to be what the context is made of.
        s["parts"] = P
        s["attended"] = self.linear(name + "attn.proj.", s["context"])
        s["middle"] = x + s["attended"]
        s["n2"] = self.norm(name + "norm2.", s["middle"])
        h = self.linear(name + "mlp.fc1.", s["n2"])
        s["h"] = h * (1 + torch.erf(h / 2**0.5)) / 2
        s["m"] = self.linear(name + "mlp.fc2.", s["h"])
        self.seen.append(s)
        return s["middle"] + s["m"]


def assert_equals_reference(
    method: str,
    reference: Callable[[Slow, int], Tensor],
    kind: str,
    images: Tensor,
    targets: Tensor,
) -> None:
    """The method's masks are those of the reference's 4×4 maps, image by image."""
    network = build(**KINDS[kind])
    masks = ol.explain(method, classifier_of(network), images, targets)
    for x, c, mask in zip(images, targets.tolist(), masks, strict=True):
        S = reference(Slow(network, (x - 0.5) / 0.5), c).detach().view(1, 1, 4, 4)
        S = (S - S.min()).float()  # in float64: the differences may be small
        torch.testing.assert_close(mask[None], ol.to_masks(S, (32, 32)), rtol=0, atol=1e-3)
