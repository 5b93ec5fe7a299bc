"""The cut is exact: head(trunk(x)) equals the untouched network, at any layer."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from conftest import Sized, cnn, make_classifier, make_images
from timm.layers import AttentionPool2d
from timm.models import coat, vision_transformer
from timm.models.mlp_mixer import MlpMixer
from torch import nn
from torchvision.transforms import v2

import opticam_lite as ol
from opticam_lite.methods.grad_cam import features_and_gradients
from opticam_lite.network import CutError, token_grid
from opticam_lite.network.cut import Traced
from opticam_lite.network.quick_copy import QuickCopy

# The first layer of each is the default one; the paper's networks have it from Appendix A.
VIT_BLOCKS = ["blocks.11.norm1", "blocks.5", "blocks.3.attn.proj", "blocks.8.mlp.fc1"]
PAPER = {
    "resnet50": ["layer4.2", "layer4", "layer4.2.conv3", "layer3.1.bn2", "layer1"],
    "vgg16_bn": ["features.42", "features.40", "features.6"],
    "densenet121": [
        "features",
        "features.denseblock4",
        "features.norm5",
        "features.transition2.conv",
    ],
    "vit_b_16": ["encoder.layers.encoder_layer_11.ln_1", "encoder.layers.encoder_layer_4"],
    "timm/efficientnet_b0": ["bn2", "blocks.6", "blocks.4.1.conv_dw"],
    "timm/convnext_tiny": ["stages.3", "stages.2.blocks.4.mlp.fc1"],
    "timm/swin_tiny_patch4_window7_224": ["norm", "layers.3", "layers.2.blocks.3.norm1"],
    "timm/vit_base_patch16_224": VIT_BLOCKS,
    "timm/deit_base_patch16_224": VIT_BLOCKS,
    "squeezenet1_0": ["features.12", "features.3"],
}

QUICK = ("resnet50", "timm/efficientnet_b0", "squeezenet1_0")


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("timm/"):
        return timm.create_model(name.removeprefix("timm/")).eval()
    return torchvision.models.get_model(name, weights=None).eval()


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PAPER],
)
@torch.no_grad()
def test_head_of_trunk_is_the_network(name: str) -> None:
    network = build(name)
    traced = Traced(network, (224, 224))
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    expected = network(x)
    assert traced.default_layer() == PAPER[name][0]
    for layer in PAPER[name]:
        cut = traced.cut(layer)
        maps, rest = cut.split(x)
        assert maps.ndim == 4
        assert maps.shape[1:] == traced.shape(layer)
        torch.testing.assert_close(cut.head(maps, rest), expected, rtol=0, atol=0)
        # and the maps may be used again: the head did not work on them in place
        torch.testing.assert_close(cut.head(maps, rest), expected, rtol=0, atol=0)


def test_the_maps_decide_the_logits(images: torch.Tensor, classifier: ol.Classifier) -> None:
    maps, rest = classifier.split(images)
    assert not torch.allclose(classifier.head(2 * maps, rest), classifier.head(maps, rest))


@pytest.mark.parametrize("name", ["vit", "resnet", "swin"])
def test_the_rest_can_be_taken_for_other_images(name: str) -> None:
    """In another number, repeatedly, at every layer: also inside residual branches and windows."""
    torch.manual_seed(0)
    network, size = {
        "vit": lambda: (make_classifier("vit").network, 32),
        "resnet": lambda: (
            timm.models.resnet.ResNet(
                timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=5, zero_init_last=False
            ),
            64,
        ),
        "swin": lambda: (
            timm.models.swin_transformer.SwinTransformer(
                img_size=64, patch_size=2, window_size=4, embed_dim=8, depths=(2, 2),
                num_heads=(2, 2), num_classes=5,
            ),
            64,
        ),
    }[name]()  # fmt: skip
    traced = Traced(network.eval(), (size, size))
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network(x)
        for layer in traced.layers:
            cut = traced.cut(layer)
            maps, rest = cut.split(x)
            for i in range(3):
                logits = cut.head(maps[i].expand(2, -1, -1, -1), rest.repeat(i, 2))
                torch.testing.assert_close(logits, expected[[i, i]], rtol=0, atol=1e-5)


def test_every_layer_of_a_network_can_be_cut(
    images: torch.Tensor, classifier: ol.Classifier
) -> None:
    expected = classifier.logits(images)
    for layer in classifier.layers:
        other = classifier.at(layer)
        torch.testing.assert_close(other.head(*other.split(images)), expected, rtol=0, atol=0)


def test_gradients_reach_the_maps_and_stop_there(
    images: torch.Tensor, classifier: ol.Classifier
) -> None:
    maps, rest = classifier.split(images)
    maps = maps.detach().requires_grad_()
    (g,) = torch.autograd.grad(classifier.head(maps, rest).sum(), maps)
    assert g.shape == maps.shape
    assert g.abs().sum() > 0
    assert all(p.grad is None for p in classifier.network.parameters())


def test_non_square_images_and_token_grids() -> None:
    assert token_grid(196, (224, 224)) == (14, 14)
    assert token_grid(98, (112, 224)) == (7, 14)
    assert token_grid(197, (224, 224)) is None
    own = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), Head())
    network = ol.Classifier(own, "1", size=(40, 64))
    assert network.features(make_images(2, 40, 64)).shape == (2, 4, 19, 31)


class Head(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3))


class Residual(nn.Module):
    """Works in place on a value that a later operation reads again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        y = self.second(self.act(x))
        y += x
        return self.pool(y).flatten(1)


def test_operations_in_place_behind_the_cut_change_nothing(images: torch.Tensor) -> None:
    classifier = ol.Classifier(Residual(), "first", size=32)
    maps, rest = classifier.split(images)
    before = maps.clone()
    expected = Residual().eval()(images)
    for _ in range(2):
        torch.testing.assert_close(classifier.head(maps, rest), expected)
    torch.testing.assert_close(maps, before, rtol=0, atol=0)


class Branching(nn.Module):
    """Can't be traced: what it does depends on the values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.mean() > 0:
            x = 2 * x
        return x.mean(dim=(2, 3)) if x.ndim == 4 else x


def test_what_cannot_be_traced_is_taken_whole(images: torch.Tensor) -> None:
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    classifier = ol.Classifier(nn.Sequential(trunk, Branching()), "0", size=32)
    assert classifier.features(images).shape == (3, 4, 30, 30)


class Drifting(nn.Module):
    """Its trace differs from itself, and it from itself: it counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.conv(x).mean(dim=(2, 3)) * self.calls


def test_a_network_that_counts_its_calls_is_refused() -> None:
    with pytest.raises(CutError, match="answers differently each time, as does the forward of Dri"):
        ol.Classifier(Drifting(), size=32)


class Beginner(nn.Module):
    """The commonest network of one's own: its maps are flattened by view."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn = nn.Conv2d(3, 6, 5), nn.BatchNorm2d(6)
        self.pool, self.conv2 = nn.MaxPool2d(2, 2), nn.Conv2d(6, 16, 5)
        self.mix, self.fc = nn.Conv2d(16, 16, 1), nn.Linear(16 * 5 * 5, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.bn(self.conv1(x)).relu())
        x = self.mix(self.pool(self.conv2(x).relu()))
        return self.fc(x.view(x.size(0), -1))


@pytest.mark.parametrize("way", [lambda network: network, Sized])
def test_view_of_maps(images: torch.Tensor, way: Any) -> None:
    """In the memory format with the channels last, view fails: the format is kept as it is."""
    network = way(Beginner().eval())
    network.to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        network(images.contiguous(memory_format=torch.channels_last))
    classifier = ol.Classifier(network, size=32, device="cpu")
    prefix = "network." if way is Sized else ""
    assert classifier.layer == f"{prefix}mix"
    expected = classifier.logits(images)
    torch.testing.assert_close(Beginner().eval()(images), expected)
    for layer in classifier.layers:
        cut = classifier.at(layer)
        torch.testing.assert_close(cut.head(*cut.split(images)), expected, rtol=0, atol=0)
    quick = classifier.quick("float32")
    assert isinstance(quick._network, QuickCopy) == (way is not Sized)
    torch.testing.assert_close(quick.logits(images), expected, rtol=1e-4, atol=1e-5)
    options = {"opti-cam": {"iterations": 3}, "ablation-cam": {}, "grad-cam": {}, "score-cam": {}}
    for layer in (f"{prefix}pool", f"{prefix}mix", f"{prefix}bn"):
        if layer in classifier.layers:  # the pooling is run twice
            for masks in ol.explain(options, classifier.at(layer), images).values():
                assert masks.any()


class Named(nn.Module):
    """Its only layer has a name of one's choice."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name = name
        self.add_module(name, nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
        self.register_buffer(f"{name}_scale", torch.tensor(2.0))
        self.fc = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.get_submodule(self.name)(x) * self.get_buffer(f"{self.name}_scale")
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("name", ["meta", "graph", "code", "network"])
def test_layers_may_have_any_name(name: str, images: torch.Tensor) -> None:
    classifier = ol.Classifier(Named(name), name, size=32, device="cpu")
    logits = classifier.head(*classifier.split(images))
    torch.testing.assert_close(logits, classifier.logits(images), rtol=0, atol=0)
    torch.testing.assert_close(logits, Named(name)(images))


class MadeWithin(nn.Module):
    """Makes a module in forward, and expands a buffer to the number of images."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.register_buffer("bias", torch.randn(1, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.MaxPool2d(2)(nn.ReLU()(self.conv1(x)))
        x = self.conv2(x) + self.bias.expand(x.shape[0], -1)[..., None, None]
        return x.mean((2, 3)) + self.bias


@pytest.mark.parametrize("inside", [False, True])
def test_modules_made_within_and_buffers_are_traced(inside: bool, images: torch.Tensor) -> None:
    network = nn.Sequential(MadeWithin()) if inside else MadeWithin()
    classifier = ol.Classifier(network, size=32, device="cpu")
    assert isinstance(classifier._cuttable, Traced)
    assert not classifier._cuttable.taken_whole
    names = ["0.conv1", "0.conv2"] if inside else ["conv1", "conv2"]
    assert [name for name in names if name in classifier.layers] == names
    for layer in classifier.layers:
        cut = classifier.at(layer)
        torch.testing.assert_close(cut.head(*cut.split(images)), network(images))


def test_transforms_are_layers(images: torch.Tensor) -> None:
    """Traced, they would pass on the images as they are."""

    class Resized(v2.Resize):
        pass

    torch.manual_seed(0)
    layers = [v2.Normalize([0.5] * 3, [0.2] * 3), Resized((16, 16)), nn.Conv2d(3, 4, 3), Head()]
    network = nn.Sequential(*layers)
    classifier = ol.Classifier(network, "2", size=32, device="cpu")
    assert classifier.layer_shape() == (4, 14, 14)
    torch.testing.assert_close(classifier.head(*classifier.split(images)), network(images))


class Output:
    """What other libraries return: values by name."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


class Nested(nn.Module):
    """Can't be traced, and returns its maps in an object."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> Output:
        assert x.shape[1] == 3
        return Output(maps=self.conv(self.stem(x).relu()))


class Trunk(nn.Module):
    """Ends in an attribute of the output of a module that can't be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Nested()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).maps


@pytest.mark.parametrize("trunk", [Trunk, lambda: Sized(nn.Conv2d(3, 4, 3))])
def test_a_trunk_and_a_head_always_work(trunk: Any, images: torch.Tensor) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(trunk(), Head()).eval()
    classifier = ol.Classifier(network, "0", size=32, device="cpu")
    assert isinstance(classifier._cuttable, Traced)  # so a head does not run the trunk
    logits = classifier.head(*classifier.split(images))
    torch.testing.assert_close(logits, network(images))
    assert ol.explain("ablation-cam", classifier, images).any()


@pytest.mark.parametrize("way", [lambda network: network, Sized])
@pytest.mark.parametrize("output", [dict, Output])
def test_logits_by_name(way: Any, output: Any, images: torch.Tensor) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = cnn().eval()

        def forward(self, x: torch.Tensor) -> Any:
            return output(logits=self.inner(x), images=x)

    classifier = ol.Classifier(way(Named()), size=32, device="cpu")
    assert classifier.layer.endswith("inner.4")
    expected = ol.Classifier(cnn(), "4", size=32, device="cpu")
    torch.testing.assert_close(classifier.logits(images), expected.logits(images))
    for method, options in {"grad-cam": {}, "opti-cam": {"iterations": 3}}.items():
        masks, others = (ol.explain(method, c, images, **options) for c in (classifier, expected))
        torch.testing.assert_close(masks, others, rtol=0, atol=1e-4)


def test_wrong_layers_get_close_matches(classifier: ol.Classifier) -> None:
    name = classifier.layer
    with pytest.raises(CutError, match=f"unknown layer .*did you mean '?{name[:-1]}"):
        classifier.at(name + "0")


def test_a_layer_without_maps_says_so() -> None:
    classifier = ol.load_model("resnet18", weights="random", device="cpu")
    with pytest.raises(CutError, match="'fc' exists, but its output is not a set of feature maps"):
        classifier.at("fc")
    with pytest.raises(CutError, match="did you mean 'layer4"):
        classifier.at("layer44")
    with pytest.raises(CutError, match="unknown layer"):
        classifier.layer_shape("nowhere")


class LogOf(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(min=1e-30).log()


def test_a_network_that_ends_in_a_softmax_is_refused_and_its_logarithm_taken() -> None:
    network, x = nn.Sequential(cnn(), nn.Softmax(1)), make_images(2)
    with pytest.raises(CutError, match=r"returns probabilities .*leave out its last softmax, or"):
        ol.Classifier(network, "0.4", size=32)
    classifier = ol.Classifier(nn.Sequential(network, LogOf()), "0.0.4", size=32, device="cpu")
    expected = ol.Classifier(cnn(), "4", size=32, device="cpu").probabilities(x)
    torch.testing.assert_close(classifier.probabilities(x), expected)


def test_networks_that_are_no_classifiers_are_refused() -> None:
    with pytest.raises(CutError, match=r"must return logits .*; wrap it in a module"):
        ol.Classifier(nn.Conv2d(3, 4, 3), size=32)
    broken = nn.Sequential(nn.Conv2d(3, 4, 3), Head())
    nn.init.constant_(broken[0].weight, torch.nan)
    with pytest.raises(CutError, match=r"logits that are not finite .*; look for NaN in its w"):
        ol.Classifier(broken, size=32)
    with pytest.raises(CutError, match="fails on a batch of 32×32"):
        ol.Classifier(nn.Sequential(nn.Flatten(), nn.Linear(7, 2)), size=32)
    with pytest.raises(CutError, match="no layer that gives feature maps"):
        ol.Classifier(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2)), size=32)


def test_no_gradient_at_the_layer_says_so(images: torch.Tensor) -> None:
    class Detached(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.detach()

    network = nn.Sequential(nn.Conv2d(3, 4, 3), Detached(), Head()).eval()
    with pytest.raises(ValueError, match="have no gradient at '0': something behind it detaches"):
        ol.explain("grad-cam", ol.Classifier(network, "0", size=32), images)


def vit(**settings: Any) -> nn.Module:
    """A small transformer, trained enough to have a head that is not 0."""
    torch.manual_seed(0)
    shape = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "num_heads": 2, "depth": 2}
    network = vision_transformer.VisionTransformer(**shape, num_classes=5, **settings).eval()
    nn.init.normal_(network.head.weight)
    return network


@pytest.mark.parametrize(
    ("block", "layer"),
    [
        ("Block", "blocks.1.norm1"),
        ("ParallelScalingBlock", "blocks.1.in_norm"),
        ("ParallelThingsBlock", "blocks.1.attns.1.norm"),
        ("ResPostBlock", "blocks.0.norm1"),
    ],
)
def test_the_default_layer_is_read_by_the_logits(block: str, layer: str) -> None:
    """The class token alone reaches the logits from behind the last attention."""
    network = vit(block_fn=getattr(vision_transformer, block))
    classifier = ol.Classifier(network, size=64, device="cpu")
    assert classifier.layer == classifier.default_layer == layer
    images, targets = make_images(2, 64, 64), torch.tensor([0, 1])
    for name in classifier.layers:
        other = classifier.at(name)
        _, g = features_and_gradients(other, images, targets)
        assert other.reads_maps == bool(g.any()), name
        reasons = ol.methods.applicable(other)
        for method in ("grad-cam", "grad-cam++", "xgrad-cam", "layer-cam", "hires-cam"):
            assert (reasons[method] is None) == other.reads_maps
        assert (reasons["ablation-cam"] is None) == other.reads_maps
    with pytest.raises(ValueError, match=f"class token of 'norm' only, .* cut at '{layer}' or ear"):
        ol.explain("grad-cam", classifier.at("norm"), images)
    assert ol.explain("opti-cam", classifier.at("norm"), images, iterations=2).any()


class InPlace(vision_transformer.ResPostBlock):
    """Adds to its input, which the attention before has read."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.add_(self.norm1(self.attn(x)))  # += would be traced as a sum that is new
        return x.add_(self.norm2(self.mlp(x)))


class InPlaceBehindANorm(vision_transformer.Block):
    """Adds to what a norm needs for its gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(self.attn(self.norm1(x)))


def test_blocks_that_work_in_place() -> None:
    classifier = ol.Classifier(vit(block_fn=InPlace), size=64, device="cpu")
    assert classifier.at("blocks.0").reads_maps
    assert not classifier.at("blocks.1").reads_maps
    hidden = ol.Classifier(vit(block_fn=InPlaceBehindANorm), size=64, device="cpu")
    assert hidden.layer == "blocks.1.norm1"
    assert hidden.reads_maps


def test_a_head_of_zeros_hides_nothing() -> None:
    network = vit()
    nn.init.zeros_(network.head.weight)
    classifier = ol.Classifier(network, size=64, device="cpu")
    assert classifier.layer == "blocks.1.norm1"
    assert classifier.reads_maps
    assert not classifier.at("norm").reads_maps


@pytest.mark.parametrize("classes", [11, 12])
def test_as_many_classes_as_channels(classes: int) -> None:
    """Maps are those of the classes only if nothing but pooling follows."""
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU())
    pooling = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = nn.Sequential(*convolutions, *pooling, nn.Linear(12, classes))
    assert ol.Classifier(network, size=32).layer == "3"
    assert ol.Classifier(nn.Sequential(*convolutions, *pooling), size=32).layer == "1"
    alone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *pooling)
    assert ol.Classifier(alone, size=32).layer == "1"


def test_tokens_out_of_order_are_no_maps() -> None:
    """Hiera keeps the tokens of a window together, until its last stage."""
    network = timm.create_model("hiera_tiny_224", num_classes=5, stages=(1, 1, 1, 1)).eval()
    classifier = ol.Classifier(network, size=224, device="cpu")
    assert classifier.layer == "blocks.3"
    blocks = {name.split(".")[1] for name in classifier.layers if name.startswith("blocks.")}
    assert blocks == {"3"}
    grey = torch.full((1, 3, 224, 224), 0.5)
    spot = grey.clone()
    spot[..., 64:96, 128:160] = 1
    for name in ("patch_embed", "blocks.3"):
        other = classifier.at(name)
        change = (other.features(spot) - other.features(grey)).abs().sum((0, 1))
        h, w = change.shape
        y, x = divmod(int(change.argmax()), w)
        assert 32 <= y * 224 / h <= 96, name
        assert 96 <= x * 224 / w <= 160, name


def test_channels_are_no_positions() -> None:
    """A mixer's layers across the tokens hold channels × tokens; 100 of them make a grid, too."""
    shape = {"img_size": 64, "patch_size": 8, "num_blocks": 1, "num_classes": 5}
    for channels in (96, 100):
        network = MlpMixer(embed_dim=channels, **shape).eval()
        layers = ol.Classifier(network, size=64, device="cpu").layers
        assert "blocks.0.mlp_channels" in layers
        assert not any("mlp_tokens" in name for name in layers)
    square = vision_transformer.VisionTransformer(
        img_size=64, patch_size=8, embed_dim=64, num_heads=2, depth=1, num_classes=5
    )  # as many channels as patches
    assert "blocks.0.norm1" in ol.Classifier(square.eval(), size=64, device="cpu").layers


def layouts(network: nn.Module, size: int | tuple[int, int]) -> dict[str, str]:
    found = ol.Classifier(network, size=size, device="cpu")._cuttable.layers
    return {layer: layout.kind for layer, (_, layout) in found.items()}


def test_a_layout_does_not_depend_on_the_size() -> None:
    """24 channels of 24×24 or of 12×24 cells may be read in two ways, and are by their shape."""
    small: dict[str, Any] = {"pretrained": False, "num_classes": 4}
    sides = {"depths": (1, 1, 1, 1), "dims": (24, 32, 40, 48)}
    convnext = timm.create_model("convnext_tiny", **sides, **small)
    for size in (96, (96, 192)):
        assert layouts(convnext, size) == layouts(convnext, 128)
    sides = {"depths": (1, 1), "num_heads": (2, 2)}
    swin = {"embed_dim": 24, "window_size": 4, **sides, **small}
    clear, deceiving = (
        layouts(timm.create_model("swin_tiny_patch4_window7_224", img_size=size, **swin), size)
        for size in ((64, 64), (48, 96))
    )
    assert clear["patch_embed.proj"] == "NCHW"
    assert clear["layers.0"] == "NHWC"
    assert clear == deceiving


def test_windows_that_are_padded_beyond_the_image_are_no_maps() -> None:
    davit = timm.create_model(
        "davit_tiny",
        pretrained=False,
        num_classes=4,
        depths=(1, 1),
        embed_dims=(16, 32),
        num_heads=(1, 2),
        window_size=14,
    )
    classifier = ol.Classifier(davit, size=64, device="cpu")  # 8×8 cells in a window of 14×14
    assert classifier.layer_shape("stages.1.blocks.0.0") == (32, 8, 8)
    assert "stages.1.blocks.0.0.attn" not in classifier.layers
    assert {classifier.layer_shape(layer)[1:] for layer in classifier.layers} == {(16, 16), (8, 8)}


class TalkingHeads(nn.Module):
    """Attention whose heads are mixed, of maps with as many cells as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 4, stride=4)
        self.talk, self.mix, self.fc = nn.Conv2d(2, 2, 1), nn.Linear(2, 2), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(self.stem(x).relu())  # (N, 8, 4, 4) of (N, 8, 16, 16)
        q = x.flatten(2).unflatten(1, (2, 4))  # (N, 2, 4, 16)
        attention = self.talk(q.mT @ q)  # (N, 2, 16, 16)
        attention = self.mix(attention.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(3)
        x = (q @ attention.mT).flatten(1, 2).unflatten(2, (4, 4))
        return self.fc(x.mean((2, 3)))


def test_an_attention_between_tokens_is_no_map() -> None:
    classifier = ol.Classifier(TalkingHeads(), size=16, device="cpu")
    assert classifier.layers == ["stem", "down"]
    assert classifier.layer_shape("stem") == (8, 16, 16)


def test_maps_are_no_windows_of_an_attention() -> None:
    """64 windows of 4 tokens with 64 channels, of which the former two are swapped."""
    network = torchvision.models.MaxVit(
        input_size=(64, 64), stem_channels=16, partition_size=2, block_channels=[64],
        block_layers=[1], head_dim=32, stochastic_depth_prob=0.0, num_classes=5,
    ).eval()  # fmt: skip
    classifier = ol.Classifier(network, size=64, device="cpu")
    inside = {name: classifier.layer_shape(name) for name in classifier.layers if "grid" in name}
    assert set(inside.values()) == {(64, 16, 16)}, inside


class Positions(nn.Module):
    """Adds an encoding of positions, and a branch that is 0 before training."""

    def __init__(self) -> None:
        super().__init__()
        self.encoding, self.norm = Grid(), nn.BatchNorm2d(8)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.encoding(x) + self.norm(x)


class Grid(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(x.shape[2]).view(1, 1, -1, 1)
        return rows.expand(x.shape[0], 8, x.shape[2], x.shape[3]) / 10


def test_what_does_not_depend_on_the_image_is_no_layer() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), Positions(), nn.ReLU(), Head())
    layers = ol.Classifier(network, size=32, device="cpu").layers
    assert layers == ["0", "1.norm", "1", "2"]


class Stacked(nn.Module):
    """Stacks two values in a first dimension of 2, as TNT does with q and k."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(3, 5, 3) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q_k = torch.stack([self.q(x), self.k(x)])
        v = self.v(x)
        return (q_k[0] * q_k[1] + v).mean((2, 3))


def test_keys_and_queries_are_no_images() -> None:
    classifier = ol.Classifier(Stacked(), "v", size=16, device="cpu")
    images = make_images(2, 16, 16)
    maps, rest = classifier.split(images)
    y = classifier.head(maps[1:].expand(3, -1, -1, -1), rest.repeat(1, 3))
    torch.testing.assert_close(y, classifier.logits(images)[1:].expand(3, -1))


def test_the_default_layer_is_not_far_before_the_end() -> None:
    """The norms of CoaT's parallel blocks have names of their own: norm12, norm13, norm14."""
    network = coat.CoaT(
        img_size=64, patch_size=4, embed_dims=(16,) * 4, num_heads=2, serial_depths=(1,) * 4,
        parallel_depth=3, crpe_window={3: 1, 5: 1}, num_classes=5,
    ).eval()  # fmt: skip
    classifier = ol.Classifier(network, size=64, device="cpu")
    assert classifier.layer == "parallel_blocks.2.norm14"
    assert classifier.reads_maps
    convolutions = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(6)]
    named = nn.Sequential()
    named.add_module("stem", nn.Conv2d(3, 8, 3))
    named.add_module("pooled_trunk", nn.Sequential(*convolutions))
    named.add_module("head", Head())
    assert ol.Classifier(named, size=32, device="cpu").layer == "pooled_trunk.5"


def test_the_default_layer_is_not_within_an_attention_that_pools() -> None:
    trunk = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU())
    pool = AttentionPool2d(8, out_features=5, feat_size=8, head_dim=4, qkv_separate=True)
    network = nn.Sequential(trunk, pool).eval()
    classifier = ol.Classifier(network, size=32, device="cpu")
    assert "1.v" in classifier.layers
    assert classifier.layer == "0"


class Mlp(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


def test_the_default_layer_is_not_within_a_branch() -> None:
    """Embeddings look like one map per class; only within the block are there more channels."""
    block = Mlp(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1))
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = nn.Sequential(nn.Conv2d(3, 8, 3), block, pool)
    assert ol.Classifier(network, size=32, device="cpu").layer == "1"
