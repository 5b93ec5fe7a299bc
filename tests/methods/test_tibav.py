"""TIBAV against a slow reference: relevance layer by layer, and what must hold of it."""

from __future__ import annotations

import pytest
import torch
from conftest import make_images
from slow_transformer import KINDS, Slow, assert_equals_reference, build, classifier_of
from timm.layers import SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import opticam_lite as ol
from opticam_lite.methods.tibav import Relevance
from opticam_lite.network.transformer import parts_of

BY_CLASS_TOKEN = [kind for kind in KINDS if kind != "mean of the patches"]


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


def reference_tibav(slow: Slow, c: int) -> Tensor:
    relevances, _ = relevance_by_hand(slow, c)
    product = torch.eye(17, dtype=torch.float64)
    for s, R in zip(slow.seen, relevances, strict=True):
        gradients = torch.autograd.grad(slow.logits[c], s["parts"], retain_graph=True)
        C = sum((g * r).clamp(min=0) for g, r in zip(gradients, R, strict=True)) / slow.heads
        product = (C + torch.eye(17)) @ product
    return slow.row(product)


@pytest.mark.parametrize("kind", BY_CLASS_TOKEN)
def test_equals_its_slow_reference(kind: str, images: Tensor, targets: Tensor) -> None:
    assert_equals_reference("tibav", reference_tibav, kind, images, targets)


@pytest.mark.parametrize("kind", BY_CLASS_TOKEN)
def test_relevance_of_every_block_by_hand(kind: str, images: Tensor) -> None:
    """In float64 nothing hides behind rounding but the 1e-9 of the authors' divisions."""
    network = build(**KINDS[kind]).double().requires_grad_(False)
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


def test_many_images(images: Tensor) -> None:
    classifier = classifier_of(build())
    many = make_images(11)
    targets = torch.arange(11) % 5
    masks = ol.explain("tibav", classifier, many, targets)
    for i in (0, 7, 8, 10):
        alone = ol.explain("tibav", classifier, many[i : i + 1], targets[i : i + 1])
        torch.testing.assert_close(alone, masks[i : i + 1], rtol=0, atol=1e-4)


def test_a_gated_mlp_has_no_relevance_rule(images: Tensor) -> None:
    classifier = classifier_of(build(mlp_layer=SwiGLUPacked))
    applicable = ol.methods.applicable(classifier)
    assert "no relevance rule for its MLP (GluMlp)" in str(applicable.pop("tibav"))
    for method in ("raw-attention", "rollout"):
        assert applicable[method] is None
        assert ol.explain(method, classifier, images, 0).any()
    with pytest.raises(ValueError, match="no relevance rule for its MLP"):
        ol.methods.METHODS["tibav"].function(classifier, images, torch.zeros(3).long())
