"""What can't be traced is run again: the same logits, layers and masks as by a trace."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import timm
import torch
from conftest import Sized, cnn, dense_cnn, vit
from torch import Tensor, nn

import opticam_lite as ol
from opticam_lite.network import CutError
from opticam_lite.network.cut import Traced
from opticam_lite.network.rerun import Rerun

OPTIONS: dict[str, dict[str, Any]] = {
    "grad-cam": {},
    "score-cam": {},
    "ablation-cam": {},
    "opti-cam": {"iterations": 10, "precision": "float32"},
}


def hooks_of(network: nn.Module) -> list[int]:
    return [len(module._forward_hooks) for module in network.modules()]


@pytest.mark.parametrize(
    ("build", "layer", "size"),
    [(dense_cnn, "3", 32), (dense_cnn, "0", 32), (vit, "blocks.1.norm1", 32), (vit, "norm", 32)],
)
def test_masks_are_those_of_the_same_network_traced(
    build: Any, layer: str, size: int, images: Tensor, targets: Tensor
) -> None:
    """The independent reference: the network without the statement that stops the trace."""
    traced = ol.Classifier(build(), layer, size=size, device="cpu")
    rerun = ol.Classifier(Sized(build()), f"network.{layer}", size=size, device="cpu")
    assert isinstance(traced._cuttable, Traced)
    assert isinstance(rerun._cuttable, Rerun)
    assert rerun.reads_maps == traced.reads_maps
    torch.testing.assert_close(rerun.features(images), traced.features(images), rtol=0, atol=1e-6)
    for method, options in OPTIONS.items():
        if ol.methods.applicable(traced)[method] is None:
            masks, expected = (
                ol.explain(method, c, images, targets, **options) for c in (rerun, traced)
            )
            # Of a traced transformer, ablations and quick copies are computed in another way.
            torch.testing.assert_close(masks, expected, rtol=0, atol=1e-5 if build is vit else 1e-6)
        else:
            assert ol.methods.applicable(rerun)[method] is not None


NETWORKS: dict[str, Any] = {
    "cnn": cnn,
    "dense": dense_cnn,
    "vit": vit,
    "resnet": lambda: timm.models.resnet.ResNet(
        timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=5, zero_init_last=False
    ),
    "swin": lambda: timm.models.swin_transformer.SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(2, 2),
        num_classes=5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_layouts_and_the_default_are_those_of_the_trace(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    traced, rerun = Traced(network, (32, 32)), Rerun(network, (32, 32), "no reason")
    assert list(rerun.layers) == list(traced.layers)
    assert rerun.default_layer() == traced.default_layer()
    for layer in traced.layers:
        assert rerun.layers[layer][1] == traced.layers[layer][1]
        assert rerun.shape(layer) == traced.shape(layer)
        assert rerun.reads(layer) == traced.reads(layer)
    assert not any(hooks_of(network))


@pytest.mark.parametrize("name", ["cnn", "vit", "swin"])
def test_the_cut_is_exact_and_repeats(name: str, images: Tensor) -> None:
    torch.manual_seed(0)
    classifier = ol.Classifier(Sized(NETWORKS[name]()), size=32, device="cpu")
    expected = classifier.logits(images)
    for layer in classifier.layers:
        cut = classifier.at(layer)
        maps, rest = cut.split(images)
        before = maps.clone()
        torch.testing.assert_close(cut.head(maps, rest), expected, rtol=0, atol=0)
        again = cut.head(maps[1].expand(2, -1, -1, -1), rest.repeat(1, 2))
        torch.testing.assert_close(again, expected[[1, 1]], rtol=0, atol=1e-5)
        assert torch.equal(maps, before)
        maps = maps.requires_grad_()
        (g,) = torch.autograd.grad(cut.head(maps, rest).sum(), maps)
        assert bool(g.any()) == cut.reads_maps
        alone = cut.head(*cut.split(images[1:2]))
        torch.testing.assert_close(alone, expected[1:2], rtol=0, atol=1e-5)
    assert not any(hooks_of(classifier.network))


class Branching(nn.Module):
    """Can't be traced, returns several values, and runs one of its modules twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.twice = nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        self.constant, self.unread = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.silent = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, str, Tensor]:
        if len(x) == 0:
            raise ValueError
        y = self.twice(self.twice(self.conv(x)))
        self.unread(y)
        y = y + self.constant(torch.ones_like(x)) + self.silent(y).detach()
        return y, "a word", self.conv.weight.mean()


class Whole(nn.Module):
    """Most of it is within the module that can't be traced; the rest of its tuple is used."""

    def __init__(self, head: int = 4) -> None:
        super().__init__()
        self.trunk, self.fc = Branching(), nn.Linear(4, 5)
        self.wide = nn.Sequential(nn.Linear(5, head), nn.Linear(head, 5))

    def forward(self, x: Tensor) -> Tensor:
        maps, _, mean = self.trunk(x)
        return self.wide(self.fc(maps.mean((2, 3))) + mean)


def test_layers_are_run_once_depend_on_the_image_and_are_read(images: Tensor) -> None:
    torch.manual_seed(1)
    network = Whole().eval()
    classifier = ol.Classifier(network, size=32, device="cpu")
    assert classifier.layers == ["trunk.conv", "trunk.silent", "trunk"]
    assert classifier.layer == "trunk"  # the first tensor of a tuple
    for layer in classifier.layers:
        cut = classifier.at(layer)
        torch.testing.assert_close(cut.head(*cut.split(images)), network(images))
    with pytest.raises(
        CutError, match=r"'trunk\.twice' exists, but .* or it is not run exactly onc"
    ):
        classifier.at("trunk.twice")


class Attending(nn.Module):
    """A transformer of one's own, whose attention is the output of a module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.norm = nn.Conv2d(3, 8, 8, stride=8), nn.LayerNorm(8)
        self.token, self.attend = nn.Parameter(torch.randn(1, 1, 8)), nn.Softmax(-1)
        self.fc = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).mT
        x = self.norm(torch.cat([self.token.repeat(len(x), 1, 1), patches], 1))  # (N, 17, 8)
        q = x.unflatten(2, (2, 4)).transpose(1, 2)
        attention = self.attend(q @ q.mT)  # (N, 2, 17, 17)
        seen = (attention @ q).transpose(1, 2).flatten(2)[:, 0]
        return self.fc(seen[..., None, None]).flatten(1)


def test_an_attention_is_no_map() -> None:
    classifier = ol.Classifier(Attending(), size=32, device="cpu")
    assert isinstance(classifier._cuttable, Rerun)
    assert classifier.layers == ["patches", "norm"]
    assert classifier.layer == "norm"
    assert classifier.reads_maps
    assert classifier.layer_shape() == (8, 4, 4)


class Chosen(nn.Module):
    """Can't be traced: the trace of what is around takes it whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 4
        return self.conv(x).relu()


def test_a_layer_within_what_is_taken_whole(images: Tensor) -> None:
    """The trace is kept until a layer is named that lies within; the quick copy is of the trace."""
    layers = [nn.Conv2d(3, 4, 3), Chosen(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    network = nn.Sequential(*layers, nn.Linear(4, 400), nn.Linear(400, 5)).eval()
    classifier = ol.Classifier(network, size=32, device="cpu")
    assert classifier.layer == "1"
    assert isinstance(classifier._cuttable, Traced)
    inside = classifier.at("1.conv")
    assert isinstance(inside._cuttable, Rerun)
    assert isinstance(classifier._cuttable, Traced)
    assert inside.layer_shape() == classifier.layer_shape("1.conv") == (4, 28, 28)
    torch.testing.assert_close(inside.head(*inside.split(images)), network(images))
    assert inside.quick("float32")._network is classifier.quick("float32")._network
    assert ol.Classifier(network, "1.conv", size=32).layer == "1.conv"
    with pytest.raises(CutError, match=r"unknown layer '1\.nothing'"):
        classifier.at("1.nothing")


def test_what_is_kept_can_be_rebuilt(images: Tensor, targets: Tensor) -> None:
    classifier = ol.Classifier(Sized(cnn()), "network.1", size=32, device="cpu")
    again = pickle.loads(pickle.dumps(classifier))
    assert again.layer == "network.1"
    masks = [ol.explain("grad-cam", c, images, targets) for c in (classifier, again)]
    assert torch.equal(*masks)
    assert "network_1" in classifier.graph_text


def test_a_quick_copy_is_the_network_itself(images: Tensor) -> None:
    classifier = ol.Classifier(Sized(cnn()), size=32, device="cpu")
    quick = classifier.quick()
    assert quick.dtype == torch.float32
    assert torch.equal(quick.logits(images), classifier.logits(images))
    with pytest.raises(ValueError, match="fails in bfloat16, differs in it, or is not traced"):
        classifier.quick("bfloat16")
    assert "attention is read from timm's" in str(classifier.transformer)


class Fails(nn.Module):
    """Fails for three images, behind the layer: two are those of the probe."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 3:
            raise RuntimeError("too many")
        return x


def test_no_hook_outlives_an_exception(images: Tensor) -> None:
    layers = list(cnn())
    network = Sized(nn.Sequential(*layers[:5], Fails(), *layers[5:]))
    classifier = ol.Classifier(network, "network.1", size=32, device="cpu")
    maps, rest = classifier.split(images[:1])
    for run in (
        lambda: classifier.split(images),
        lambda: classifier.head(maps.expand(3, -1, -1, -1), rest.repeat(0, 3)),
        lambda: ol.explain("opti-cam", classifier, images, iterations=1),
    ):
        with pytest.raises(RuntimeError, match="too many"):
            run()
        assert not any(hooks_of(classifier.network))
    assert classifier.head(maps, rest).shape == (1, 5)


class Skips(nn.Module):
    """Runs a layer for some sizes only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.large = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return (self.large(y) if x.shape[-1] > 16 else y).mean((2, 3))


def test_a_layer_that_other_images_skip_says_so(images: Tensor) -> None:
    classifier = ol.Classifier(Skips(), "large", size=32, device="cpu")
    small = images[..., :16, :16]
    assert ol.explain("grad-cam", classifier.at("conv"), small).shape == (3, 1, 16, 16)
    with pytest.raises(ValueError, match=r"fails on images of 16×16 .*Conv2d is run 0 times"):
        ol.explain("grad-cam", classifier, small)


class Functional(nn.Module):
    """Can't be traced, and has no module that gives maps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] < 16:
            x = x.relu()
        return nn.functional.conv2d(x, self.weight).mean((2, 3))


@pytest.mark.parametrize("layer", [None, "0"])
def test_what_works_in_neither_way_says_why_and_where(layer: str | None) -> None:
    network = nn.Sequential(Functional(), nn.Linear(5, 5)).eval()
    message = (
        r"Sequential has no layer that gives feature maps \('0' \(Functional\): symbolically "
        r"traced .* control flow; none of its modules returns some\); .*Sequential\(trunk, head\)"
    )
    with pytest.raises(CutError, match=message):
        ol.Classifier(network, layer, size=32)


class _OneByOne(nn.Module):
    def __init__(self, returned: type) -> None:
        super().__init__()
        self.network, self.returned = cnn(), returned

    def forward(self, images: torch.Tensor) -> object:
        y = torch.cat([self.network(image[None]) for image in images])
        return y if self.returned is torch.Tensor else self.returned(out=y)


def test_errors_are_one_sentence() -> None:
    with pytest.raises(CutError) as info:
        ol.Classifier(_OneByOne(torch.Tensor), size=32, device="cpu")
    assert "(the forward of _OneByOne: Proxy object cannot be iterated); none of" in str(info.value)
    with pytest.raises(CutError, match=r"not a dict; wrap it in .* output\['out'\]"):
        ol.Classifier(_OneByOne(dict), size=32, device="cpu")
