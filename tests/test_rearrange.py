"""A rearranged network is the same function; what it leaves out is really left out."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import timm
import torch
from conftest import make_images
from timm.layers import set_fused_attn
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

import opticam_lite as ol
from opticam_lite import precision, rearrange
from opticam_lite.cut import Traced
from opticam_lite.precision import Accelerated
from opticam_lite.rearrange import (
    SlicedMaxPool,
    _attend,
    _attend_with_tiles,
    open_attention,
    read_tokens_only,
)

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
T = 17


def timm_vit(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    return timm.create_model(name, num_classes=5, **(SMALL | options))


def torchvision_vit() -> nn.Module:
    network = VisionTransformer(32, 8, 2, 3, 24, 48, num_classes=5)
    nn.init.normal_(network.heads.head.weight)  # zeros otherwise
    return network


TRANSFORMERS = {
    "class token": (timm_vit, 1),
    "layer scale": (lambda: timm_vit(init_values=0.5), 1),
    "norm of queries": (lambda: timm_vit(qk_norm=True), 1),
    "distilled": (lambda: timm_vit("deit_tiny_distilled_patch16_224"), 2),
    "registers": (lambda: timm_vit(reg_tokens=3), 1),
    "torchvision": (torchvision_vit, 1),
    # Every token is read, so every token stays.
    "average": (lambda: timm_vit(global_pool="avg", class_token=False), None),
}


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    network = TRANSFORMERS[kind][0]().eval()
    for p in network.parameters():  # what begins as 0 or 1 would hide mistakes
        if p.ndim == 1:
            nn.init.normal_(p, 0.5, 0.2)
    return network


class Lengths(fx.Interpreter):
    """Keeps how many tokens every linear layer takes."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[str, list[int]] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        layer = self.fetch_attr(target)
        if isinstance(layer, nn.Linear | nn.MultiheadAttention) and args[0].ndim == 3:
            self.seen.setdefault(target, []).append(args[0].shape[1])
        return super().call_module(target, args, kwargs)


def lengths(module: fx.GraphModule, x: Tensor) -> dict[str, list[int]]:
    interpreter = Lengths(module)
    interpreter.run(x)
    return interpreter.seen


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_the_last_block_computes_only_tokens_that_are_read(kind: str) -> None:
    network, x = build(kind), make_images(3)
    kept = TRANSFORMERS[kind][1]
    traced = Traced(network, (32, 32))
    before = lengths(traced.module, x)
    expected = traced.module(x)
    read_tokens_only(traced.module)
    torch.testing.assert_close(traced.module(x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(expected, network(x))
    after = lengths(traced.module, x)
    if kept is None:
        assert after == before
        return
    for name, (tokens,) in after.items():  # each layer once
        last = "blocks.1." in name or "encoder_layer_1." in name
        whole = not last or "qkv" in name
        assert tokens == (before[name][0] if whole else kept), name
    # Keys and values are needed where they are normalised only.
    gone = {name.rpartition(".")[2] for name in before.keys() - after.keys()}
    assert gone == {
        "norm of queries": set(), "torchvision": {"self_attention"}
    }.get(kind, {"qkv"})  # fmt: skip


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_gradients_and_lean_heads(kind: str) -> None:
    classifier = ol.Classifier(build(kind), size=32, device="cpu")
    images = make_images(3)
    gradients = []
    for view in (classifier, classifier.at_precision("float32")):
        x = images.clone().requires_grad_()
        gradients.append(torch.autograd.grad(view.logits(x)[:, 1].sum(), x)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)
    for layer in classifier.layers:
        cut = classifier.at(layer)
        maps, rest = cut.split(images)
        torch.testing.assert_close(
            cut.head(maps, rest, lean=True), cut.head(maps, rest), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_the_head_of_maps_without_a_channel(kind: str) -> None:
    """Where the last attention reads the maps, and only tokens set aside ask: in one go."""
    network = build(kind)
    for p in network.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, 0, 0.3)  # as they begin, attention hardly changes anything
    classifier = ol.Classifier(network, size=32, device="cpu")
    cuts = {layer: classifier.at(layer)._cut for layer in classifier.layers}
    found = [layer for layer, cut in cuts.items() if cut.attention is not None]
    if kind in ("norm of queries", "average"):
        assert found == []
        return
    assert found == [classifier.layer]
    A, rest = classifier.split(make_images(3))
    k = torch.tensor([0, 5, 23, 7])
    for i in range(3):
        maps = A[i].repeat(len(k), 1, 1, 1)
        maps[torch.arange(len(k)), k] = 0
        expected = classifier.head(maps, rest.repeat(i, len(k)))
        assert (expected - classifier.head(A, rest)[i]).abs().amax(1).min() > 1e-4
        actual = classifier._cut.head_without(k, A[i, None], rest.repeat(i, 1))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    nothing = classifier._cut.head_without(k[:0], A[:1], rest.repeat(0, 1))
    assert nothing.shape == (0, 5)


@pytest.mark.parametrize("case", ["so", "tokens go elsewhere, too", "a token of the maps asks"])
def test_where_the_head_begins_with_an_attention(case: str) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.norm = nn.Conv2d(3, 8, 8, 8), nn.LayerNorm(8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            if case != "a token of the maps asks":
                x = torch.cat([x.mean(1, keepdim=True), x], 1)
            x = self.norm(x)
            y = self.attention(x, x, x, need_weights=False)[0]
            return self.head((y + x if case == "tokens go elsewhere, too" else y)[:, 0])

    torch.manual_seed(0)
    classifier = ol.Classifier(Network(), "norm", size=32, device="cpu")
    assert (classifier._cut.attention is not None) is (case == "so")


def test_a_token_that_is_needed_whole_elsewhere_is_not_computed_twice() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 8, 8)
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(self.patches(x).flatten(2).transpose(1, 2))
            y = self.second(x)
            return self.head(y[:, 0] + x.mean(1))

    torch.manual_seed(0)
    network, x = Network().eval(), make_images(2)
    module = Traced(network, (32, 32)).module
    read_tokens_only(module)
    assert lengths(module, x) == {"first": [16], "second": [1]}
    torch.testing.assert_close(module(x), network(x))


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_open_attention_is_attention(kind: str, tiles: bool) -> None:
    network, x = build(kind), make_images(3).requires_grad_()
    module = Traced(network, (32, 32)).module
    expected = module(x)
    (g,) = torch.autograd.grad(expected[:, 2].sum(), x)
    open_attention(module, tiles=tiles)
    y = module(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(y[:, 2].sum(), x)[0], g, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-6)
    fused = [n for n in module.graph.nodes if n.target is F.scaled_dot_product_attention]
    opened = [n for n in module.graph.nodes if n.target in (_attend, _attend_with_tiles)]
    whole = [m for m in module.modules() if type(m).__name__ == "_OpenAttention"]
    assert not fused
    assert len(opened) + len(whole) == 2


def test_masked_attention_stays_as_it_is() -> None:
    class Network(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x.flatten(2)[:, None]  # (N, 1, 3, 1024)
            y = F.scaled_dot_product_attention(q, q, q, is_causal=True)
            return y.mean(3)[:, 0]

    network, x = Network(), make_images(2)
    module = Traced(network, (32, 32)).module
    open_attention(module)
    assert any(n.target is F.scaled_dot_product_attention for n in module.graph.nodes)
    assert torch.equal(module(x), network(x))


def test_a_mask_of_a_whole_layer_is_heeded() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 8, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 5)
            self.register_buffer("mask", torch.arange(16).expand(16, 16) > 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            y = self.attention(x, x, x, need_weights=False, attn_mask=self.mask)[0]
            return self.head(y[:, 0])

    torch.manual_seed(0)
    network, x = Network().eval(), make_images(2)
    module = Traced(network, (32, 32)).module
    read_tokens_only(module)
    torch.testing.assert_close(module(x), network(x))


@pytest.mark.parametrize(
    ("flags", "there", "back"),
    [
        ({"avx512_bf16"}, "open", "open"),
        ({"avx512_bf16", "amx_bf16"}, "fused", "open"),
    ],
)
def test_attention_is_opened_where_the_fused_kernel_is_slow(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], there: str, back: str
) -> None:
    kernels: list[str] = []

    def seen(name: str, attention: Any) -> Any:
        def attend(*qkv: Tensor) -> Tensor:
            kernels.append(name)
            return attention(*qkv)

        return attend

    monkeypatch.setattr(precision, "_cpu_abilities", lambda: flags)
    monkeypatch.setattr(rearrange, "_attend", seen("open", _attend))
    fused = F.scaled_dot_product_attention
    classifier = ol.Classifier(build("class token"), size=32, device="cpu")
    module = classifier.at_precision("float32")._accelerated[torch.float32].module
    assert any(n.target is fused for n in module.graph.nodes)
    quick, x = classifier.at_precision("bfloat16"), make_images(2)
    quick.logits(x)  # tries it out
    monkeypatch.setattr(F, "scaled_dot_product_attention", seen("fused", fused))
    with torch.no_grad():
        kernels.clear()
        quick.logits(x)
        assert set(kernels) == {there}
    kernels.clear()
    quick.logits(x.requires_grad_())
    assert set(kernels) == {back}


def test_attention_that_is_not_fused_is_left_alone() -> None:
    set_fused_attn(False)
    try:
        network, x = build("class token"), make_images(2)
        module = Traced(network, (32, 32)).module
        read_tokens_only(module)
        torch.testing.assert_close(module(x), network(x), rtol=1e-5, atol=1e-6)
        matmul = [n for n in module.graph.nodes if n.target is operator.matmul]
        assert len(matmul) == 4
        assert lengths(module, x)["blocks.1.mlp.fc1"] == [1]
    finally:
        set_fused_attn(True)


class NormOfAllTokens(nn.Module):
    """One layer norm over tokens and channels together: no token can be left out before it."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 16, 8, 8), nn.LayerNorm((16, 16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.patches(x).flatten(2).transpose(1, 2))[:, 0])


def test_a_norm_of_all_tokens_keeps_them() -> None:
    torch.manual_seed(0)
    classifier = ol.Classifier(NormOfAllTokens(), "patches", size=32, device="cpu")
    images = make_images(2)
    expected = classifier.logits(images)
    torch.testing.assert_close(classifier.at_precision("float32").logits(images), expected)
    maps, rest = classifier.split(images)
    torch.testing.assert_close(classifier.head(maps, rest, lean=True), expected)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 1, 1), (3, 2, 0), (5, 3, 2)]
)
@pytest.mark.parametrize("size", [(12, 15), (13, 10)])
def test_a_pooling_by_slices_is_the_pooling(
    kernel: int, stride: int, padding: int, size: tuple[int, int]
) -> None:
    pool = nn.MaxPool2d(kernel, stride, padding)
    x = torch.randn(2, 5, *size, generator=torch.Generator().manual_seed(0)) - 5  # no 0 from beyond
    before = x.clone()
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=layout)
        pooled = SlicedMaxPool(pool, kernel, stride, padding)(x)
        assert torch.equal(pooled, pool(x))
        assert pooled.is_contiguous(memory_format=layout)
        assert torch.equal(x, before)
    turned = SlicedMaxPool(pool, kernel, stride, padding)(x.transpose(2, 3))
    assert turned.stride() == pool(x.transpose(2, 3)).stride()
    tiny = torch.rand(1, 5, 1, 9).contiguous(memory_format=torch.channels_last)
    if kernel > 1 + 2 * padding:
        with pytest.raises(RuntimeError, match="too small"):
            SlicedMaxPool(pool, kernel, stride, padding)(tiny)


def test_poolings_are_sliced_that_leave_channels_over_and_ask_for_nothing_special() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(24, 32, 3), nn.MaxPool2d(2),
        nn.Conv2d(32, 20, 3), nn.MaxPool2d(2, ceil_mode=True),
        nn.Conv2d(20, 20, 1), nn.MaxPool2d((2, 1)),
        nn.Conv2d(20, 20, 1), nn.MaxPool2d(1, 2),
        nn.Conv2d(20, 20, 1), nn.MaxPool2d(2, 1, 1),
        nn.Conv2d(20, 20, 1), nn.MaxPool2d(2, 1, dilation=2),
        nn.Flatten(), nn.LazyLinear(5),
    )  # fmt: skip
    network(make_images(1, 64, 64))
    quick = Accelerated(Traced(network.eval(), (64, 64)).module, torch.bfloat16)
    sliced = [n for n, m in quick.module.named_modules() if isinstance(m, SlicedMaxPool)]
    assert sliced == ["1"]
    # Where a gradient is asked for PyTorch pools.
    asked = []
    quick.module.get_submodule("1.pool").register_forward_hook(lambda *_: asked.append(1))
    x = make_images(1, 64, 64)
    with torch.no_grad():
        expected = quick(x)
        assert torch.equal(quick(x.requires_grad_()), expected)  # no gradient is kept here
    assert not asked
    assert torch.equal(quick(x), expected)
    assert asked
