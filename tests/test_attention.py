"""Raw attention, rollout and TIBAV against slow references, and what must hold of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from conftest import make_classifier, make_images
from timm.layers import SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn
from torchvision.models import VisionTransformer as TorchvisionTransformer

import opticam_lite as ol
from opticam_lite.methods.attention import need_transformer, roll_out, to_map
from opticam_lite.methods.tibav import Relevance
from opticam_lite.network.transformer import parts_of

METHODS = ("raw-attention", "rollout", "tibav")
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
TORCHVISION = {
    "image_size": 32, "patch_size": 8, "hidden_dim": 16, "num_layers": 2, "num_heads": 2,
    "mlp_dim": 64,
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


# --------------------------------------------------------------------- the papers once more, slowly


class Slow:
    """A timm ViT of the simplest kind, one float64 image at a time, from its weights alone."""

    def __init__(self, network: nn.Module, x: Tensor) -> None:
        self.w = {k: v.double() for k, v in network.state_dict().items()}
        self.depth, self.heads = len(network.blocks), network.blocks[0].attn.num_heads
        w = self.w
        patches = nn.functional.conv2d(
            x[None].double(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8
        )
        x = torch.cat([w["cls_token"][0], patches[0].flatten(1).T]) + w["pos_embed"][0]  # (T, D)
        self.seen: list[dict[str, Tensor]] = []
        for b in range(self.depth):
            x = self.block(f"blocks.{b}.", x.requires_grad_())
        self.last = self.norm("norm.", x)
        self.logits = self.linear("head.", self.last[0])

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * self.w[name + "weight"] + self.w[name + "bias"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        bias = self.w.get(name + "bias")
        return x @ self.w[name + "weight"].T + (0 if bias is None else bias)

    def block(self, name: str, x: Tensor) -> Tensor:
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


def linear_rule(x: Tensor, w: Tensor, R: Tensor) -> Tensor:
    """R_j = Σ_i (x_j w_ij)⁺ / Σ_j (x_j w_ij)⁺ R_i for each token."""
    out = torch.zeros_like(x)
    for t in range(len(x)):
        z = (x[t][None] * w).clamp(min=0)  # (out, in)
        out[t] = (z / z.sum(1, keepdim=True) * R[t][:, None]).sum(0)
    return out


def matmul_rule(a: Tensor, b: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """Of a product (I, J) @ (J, K): what a_ij b_jk gives to output ik goes half to either."""
    z = a[:, :, None] * b[None]
    share = z / z.sum(1, keepdim=True) * R[:, None]
    return share.sum(2) / 2, share.sum(0) / 2


def add_rule(a: Tensor, b: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    R_a, R_b = a / (a + b) * R, b / (a + b) * R
    both = abs(R_a.sum()) + abs(R_b.sum())
    return (
        R_a / R_a.sum() * abs(R_a.sum()) / both * R.sum(),
        R_b / R_b.sum() * abs(R_b.sum()) / both * R.sum(),
    )


def relevance_by_hand(slow: Slow, c: int) -> tuple[list[Tensor], Tensor]:
    """The relevance of each block's P `(heads, T, T)` and of the first block's tokens."""
    w = slow.w
    R = torch.zeros_like(slow.last)
    one_hot = torch.eye(len(slow.logits), dtype=torch.float64)[c][None]
    R[0] = linear_rule(slow.last[:1], w["head.weight"], one_hot)[0]
    relevances: list[Tensor] = []
    for b in reversed(range(slow.depth)):
        s, name = slow.seen[b], f"blocks.{b}."
        R_skip, R_m = add_rule(s["middle"], s["m"], R)
        R_h = linear_rule(s["h"], w[name + "mlp.fc2.weight"], R_m)
        R = R_skip + linear_rule(s["n2"], w[name + "mlp.fc1.weight"], R_h)
        R_skip, R_attended = add_rule(s["x"], s["attended"], R)
        R_context = linear_rule(s["context"], w[name + "attn.proj.weight"], R_attended)
        d = s["q"].shape[1] // slow.heads
        R_P, R_q, R_k, R_v = [], [], [], []
        for head in range(slow.heads):
            cut = slice(head * d, (head + 1) * d)
            r_P, r_v = matmul_rule(s["P"][head], s["v"][:, cut], R_context[:, cut])
            r_q, r_k = matmul_rule(s["q"][:, cut], s["k"][:, cut].T, r_P)
            for results, r in zip((R_P, R_q, R_k, R_v), (r_P, r_q, r_k.T, r_v), strict=True):
                results.append(r)
        relevances.insert(0, torch.stack(R_P))
        R_qkv = torch.cat([torch.cat(r, 1) for r in (R_q, R_k, R_v)], 1)
        R = R_skip + linear_rule(s["n1"], w[name + "attn.qkv.weight"], R_qkv)
    return relevances, R


def reference_raw_attention(slow: Slow, c: int) -> Tensor:
    return sum(slow.seen[-1]["P"][head][0, 1:] for head in range(slow.heads)) / slow.heads


def reference_rollout(slow: Slow, c: int) -> Tensor:
    product = torch.eye(17, dtype=torch.float64)
    for s in slow.seen:
        A = sum(s["P"]) / slow.heads + torch.eye(17)
        for i in range(17):
            A[i] = A[i] / A[i].sum()
        product = A @ product
    return product[0, 1:]


def reference_tibav(slow: Slow, c: int) -> Tensor:
    relevances, _ = relevance_by_hand(slow, c)
    product = torch.eye(17, dtype=torch.float64)
    for s, R in zip(slow.seen, relevances, strict=True):
        gradients = torch.autograd.grad(slow.logits[c], s["parts"], retain_graph=True)
        C = sum((g * r).clamp(min=0) for g, r in zip(gradients, R, strict=True)) / slow.heads
        product = (C + torch.eye(17)) @ product
    return product[0, 1:]


REFERENCES = {
    "raw-attention": reference_raw_attention,
    "rollout": reference_rollout,
    "tibav": reference_tibav,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_method_equals_its_slow_reference(
    method: str, qkv_bias: bool, images: Tensor, targets: Tensor
) -> None:
    network = build(qkv_bias=qkv_bias)
    masks = ol.explain(method, classifier_of(network), images, targets)
    for x, c, mask in zip(images, targets.tolist(), masks, strict=True):
        slow = Slow(network, (x - 0.5) / 0.5)
        S = REFERENCES[method](slow, c).detach().view(1, 1, 4, 4).float()
        torch.testing.assert_close(mask[None], ol.to_masks(S, (32, 32)), rtol=0, atol=1e-3)


def test_relevance_of_every_block_by_hand(images: Tensor) -> None:
    """In float64 nothing hides behind rounding but the 1e-9 of the authors' divisions."""
    network = build().double().requires_grad_(False)
    x = images[:1].double()
    y, P = parts_of(network)(x, Relevance())
    slow = Slow(network, x[0])
    torch.testing.assert_close(y[0], slow.logits)
    for c in range(5):
        one_hot = torch.eye(5, dtype=torch.float64)[c][None]
        relevances = torch.autograd.grad(y, P, one_hot, retain_graph=True)
        expected, _ = relevance_by_hand(slow, c)
        for R, R_hand in zip(relevances, expected, strict=True):
            torch.testing.assert_close(R[0], R_hand.detach(), rtol=1e-5, atol=1e-7)


# -------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("distilled", [False, True])
def test_relevance_is_conserved(distilled: bool, images: Tensor) -> None:
    """From the logit to the tokens in front of the first block: nothing is lost or made."""
    network = build(VisionTransformerDistilled if distilled else VisionTransformer)
    parts = parts_of(network.double().requires_grad_(False))
    tokens: list[Tensor] = []

    class Keep(Relevance):
        def fork(self, x: Tensor) -> Tensor:
            tokens.append(x)
            return super().fork(x)

    y, _ = parts(images.double(), Keep())
    assert len(tokens) == 4  # before the attention and the MLP of two blocks
    for c in range(5):
        one_hot = torch.eye(5, dtype=torch.float64)[[c, c, c]]
        for R in torch.autograd.grad(y, tokens, one_hot, retain_graph=True):
            torch.testing.assert_close(
                R.sum((1, 2)), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-4
            )


def test_a_linear_layer_by_hand() -> None:
    """Contributions 1·2, −1·−1 and 3·−4 to one output: only the first two get relevance, 2 to 1."""
    x = torch.tensor([[1.0, -1.0, 3.0]], requires_grad=True)
    y = Relevance().linear(x, torch.tensor([[2.0, -1.0, -4.0]]), torch.tensor([7.0]))
    assert y.item() == -2
    (R,) = torch.autograd.grad(y, x, torch.tensor([[6.0]]))
    torch.testing.assert_close(R, torch.tensor([[4.0, 2.0, 0.0]]))


def test_a_sum_by_hand() -> None:
    """3 and 1, then 4 and −2: shares 3/4, 1/4, 2, −1, so Σa = 2.75, Σb = −0.75 of 2."""
    a = torch.tensor([[3.0, 4.0]], requires_grad=True)
    b = torch.tensor([[1.0, -2.0]], requires_grad=True)
    R_a, R_b = torch.autograd.grad(Relevance().add(a, b), (a, b), torch.ones(1, 2))
    torch.testing.assert_close(R_a, torch.tensor([[0.75, 2.0]]) / 2.75 * 2 * 2.75 / 3.5)
    torch.testing.assert_close(R_b, torch.tensor([[0.25, -1.0]]) / -0.75 * 2 * 0.75 / 3.5)


def test_division_by_nothing_gives_nothing() -> None:
    for zero in (torch.zeros(1, 3), torch.full((1, 3), -1e-9)):
        x = zero.clone().requires_grad_()
        for y in (
            Relevance().linear(x, torch.ones(2, 3), None),
            Relevance().matmul(x, torch.zeros(3, 2)),
            Relevance().add(x, -x),
            Relevance().fork(x),
        ):
            (R,) = torch.autograd.grad(y, x, torch.ones_like(y))
            assert torch.isfinite(R).all()


def test_rolling_out_is_the_row_of_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.rand(2, 6, 6, generator=generator).softmax(-1) for _ in range(3)]
    row = roll_out(matrices)
    torch.testing.assert_close(row, (matrices[2] @ matrices[1] @ matrices[0])[:, 0])
    torch.testing.assert_close(row.sum(1), torch.ones(2))  # a mixture of the tokens


def test_with_one_block_rollout_is_raw_attention(images: Tensor) -> None:
    """(P + I)/2 has the patches' attention, halved; and the mask has no scale."""
    one = classifier_of(build(depth=1))
    torch.testing.assert_close(
        ol.explain("rollout", one, images, 0), ol.explain("raw-attention", one, images, 0)
    )
    two = classifier_of(build(depth=2))
    rollout, raw = (ol.explain(m, two, images, 0) for m in ("rollout", "raw-attention"))
    assert (rollout - raw).abs().max() > 0.05


def test_only_tibav_knows_the_class(images: Tensor) -> None:
    classifier = classifier_of(build())
    for method in METHODS:
        first, second = (ol.explain(method, classifier, images, c) for c in (0, 1))
        assert ((first - second).abs().max() < 1e-6) == (method != "tibav")


@pytest.mark.parametrize("method", METHODS)
def test_where_the_network_is_cut_does_not_matter(method: str, images: Tensor) -> None:
    classifier = classifier_of(build())
    here, there = (
        ol.explain(method, classifier.at(layer), images, 1)
        for layer in ("blocks.0.mlp.fc1", "blocks.1.norm1")
    )
    assert torch.equal(here, there)


@pytest.mark.parametrize("method", METHODS)
def test_fused_attention_or_not(method: str, images: Tensor) -> None:
    network = build()
    masks = []
    for fused in (True, False):
        for block in network.blocks:
            block.attn.fused_attn = fused
        masks.append(ol.explain(method, classifier_of(network), images, 1))
    assert torch.equal(*masks)


def test_uniform_patches_give_zeros() -> None:
    """A flat image without positions: every patch is like any other, and no mask comes of it."""
    network = build()
    network.pos_embed.data.zero_()
    flat = torch.full((1, 3, 32, 32), 0.3)
    for method in METHODS:
        assert not ol.explain(method, classifier_of(network), flat, 1).any()


def test_many_images(images: Tensor) -> None:
    classifier = classifier_of(build())
    many = make_images(11)
    targets = torch.arange(11) % 5
    masks = ol.explain("tibav", classifier, many, targets)
    for i in (0, 7, 8, 10):
        alone = ol.explain("tibav", classifier, many[i : i + 1], targets[i : i + 1])
        torch.testing.assert_close(alone, masks[i : i + 1], rtol=0, atol=1e-4)


# ----------------------------------------------------------------------------------- many networks


def torchvision_twin(network: nn.Module) -> nn.Module:
    """A torchvision transformer with the weights of a timm one."""
    twin = build(TorchvisionTransformer)
    names = {
        "cls_token": "class_token",
        "pos_embed": "encoder.pos_embedding",
        "patch_embed.proj": "conv_proj",
        "attn.qkv.": "self_attention.in_proj_",
        "attn.proj": "self_attention.out_proj",
        "norm1": "ln_1",
        "norm2": "ln_2",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.3",
        "blocks.": "encoder.layers.encoder_layer_",
    }
    state = {}
    for k, v in network.state_dict().items():
        for ours, theirs in names.items():
            k = k.replace(ours, theirs)
        k = "encoder.ln" + k.removeprefix("norm") if k.startswith("norm") else k
        state["heads." + k if k.startswith("head.") else k] = v
    twin.load_state_dict(state)
    return twin.eval()


@pytest.mark.parametrize("method", METHODS)
def test_torchvision_and_timm_agree(method: str, images: Tensor, targets: Tensor) -> None:
    network = build(norm_layer=partial(nn.LayerNorm, eps=1e-6))
    ours, twin = classifier_of(network), classifier_of(torchvision_twin(network))
    torch.testing.assert_close(ours.logits(images), twin.logits(images))
    torch.testing.assert_close(
        ol.explain(method, twin, images, targets),
        ol.explain(method, ours, images, targets),
        rtol=0,
        atol=1e-4,
    )


VARIANTS = {
    "distilled": lambda: build(VisionTransformerDistilled),
    "registers": lambda: build(reg_tokens=3),
    "positions without class token": lambda: build(no_embed_class=True, init_values=0.1),
    "norms of queries and keys": lambda: build(qk_norm=True),
    "norms inside": lambda: build(scale_attn_norm=True, scale_mlp_norm=True),
    "norm in front": lambda: build(pre_norm=True, fc_norm=True),
    "any image size": lambda: build(dynamic_img_size=True),
    "torchvision's hidden head": lambda: build(TorchvisionTransformer, representation_size=7),
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_kinds_of_transformers(kind: str, images: Tensor, targets: Tensor) -> None:
    """The walk gives the network's logits, and the maps are alive and of the grid's shape."""
    classifier = classifier_of(VARIANTS[kind]())
    logits, P = need_transformer("", classifier)((images - 0.5) / 0.5)
    torch.testing.assert_close(logits, classifier.logits(images))
    tokens = {"distilled": 18, "registers": 20}.get(kind, 17)
    for P_b in P:
        assert P_b.shape == (3, 2, tokens, tokens)
        torch.testing.assert_close(P_b.sum(-1), torch.ones(3, 2, tokens))
    for method in METHODS:
        assert ol.methods.applicable(classifier)[method] is None
        masks = ol.explain(method, classifier, images, targets)
        assert (masks.amax((1, 2, 3)) == 1).all()
        S = nn.functional.interpolate(masks, (4, 4), mode="area")
        assert (S.flatten(1).std(1) > 0.01).all()


def test_the_distilled_tokens_are_set_aside(images: Tensor) -> None:
    """The map begins at the third token; the class token's row is the first."""
    classifier = classifier_of(build(VisionTransformerDistilled))
    parts = need_transformer("", classifier)
    P = parts((images - 0.5) / 0.5)[1][-1].mean(1)
    expected = ol.to_masks(P[:, 0, 2:].view(3, 1, 4, 4), (32, 32))
    torch.testing.assert_close(ol.explain("raw-attention", classifier, images, 0), expected)


def test_embedded_transformer(images: Tensor) -> None:
    """Its patches come from a stem of convolutions."""
    classifier = ol.load_model("scenes_vit", device="cpu")
    scenes, targets = ol.load_dataset("scenes").batch(range(2))
    for method in METHODS:
        masks = ol.explain(method, classifier, scenes, targets)
        assert masks.shape == (2, 1, 224, 224)
        assert (masks.amax((1, 2, 3)) == 1).all()


# ------------------------------------------------------------------------------------------ errors


class Doubled(VisionTransformer):
    """Looks like a standard transformer and is none."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


UNFIT = {
    "it is a Sequential, not a vision transformer": lambda: make_classifier("cnn").network,
    "it has no class token": lambda: build(class_token=False, global_pool="avg"),
    r"its head pools all tokens \('avg'\)": lambda: build(global_pool="avg"),
    r"its head pools all tokens \('map'\)": lambda: build(global_pool="map"),
    r"not standard ones \(ParallelScalingBlock\)": lambda: build(block_fn=ParallelScalingBlock),
    r"not standard ones \(DiffAttention\)": lambda: build(attn_layer="diff"),
    "its blocks one by one give other logits": lambda: build(Doubled),
    "it is a SwinTransformer": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224",
        embed_dim=12,
        depths=(1, 1),
        num_heads=(1, 1),
        img_size=32,
        window_size=2,
        num_classes=5,
    ),
}


@pytest.mark.parametrize("reason", UNFIT)
def test_networks_that_do_not_fit(reason: str, images: Tensor) -> None:
    classifier = classifier_of(UNFIT[reason]())
    for method in METHODS:
        assert ol.methods.applicable(classifier)[method] is not None
        message = rf"^{method} needs a vision transformer .*{reason}.*grad-cam and opti-cam"
        with pytest.raises(ValueError, match=message):
            ol.methods.METHODS[method].function(classifier, images, torch.zeros(3).long())


def test_a_gated_mlp_has_no_relevance_rule(images: Tensor) -> None:
    classifier = classifier_of(build(mlp_layer=SwiGLUPacked))
    applicable = ol.methods.applicable(classifier)
    assert "no relevance rule for its MLP (GluMlp)" in str(applicable.pop("tibav"))
    for method in ("raw-attention", "rollout"):
        assert applicable[method] is None
        assert ol.explain(method, classifier, images, 0).any()
    with pytest.raises(ValueError, match="no relevance rule for its MLP"):
        ol.methods.METHODS["tibav"].function(classifier, images, torch.zeros(3).long())


def test_patches_without_a_grid() -> None:
    with pytest.raises(ValueError, match="7 patches do not form a grid"):
        to_map(torch.rand(2, 8), 1, (32, 32))
