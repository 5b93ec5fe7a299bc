"""The CAM family: slow references from the papers, oracles, the `grad-cam` package, chunks."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import make_classifier, make_images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import opticam_lite as ol
from opticam_lite.methods import METHODS

with warnings.catch_warnings():  # what the peer warns of on import is its own
    warnings.simplefilter("ignore")
    import pytorch_grad_cam as peers
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

# ---------------------------------------------------------------- the letters of the papers, slowly


def mask(S: Tensor, size: torch.Size) -> Tensor:
    """n(up(S)) of one map `(h, w)`."""
    A = nn.functional.interpolate(S[None, None].float(), tuple(size[-2:]), mode="bilinear")[0, 0]
    return (A - A.min()) / (A.max() - A.min()) if A.max() > A.min() else torch.zeros_like(A)


def maps_and_gradients(classifier: ol.Classifier, x: Tensor, c: int) -> tuple[Tensor, Tensor]:
    """A and g = ∂y_c/∂A of one image, each `(K, h, w)`, float64."""
    A, rest = classifier.split(x[None])
    A = A.detach().requires_grad_()
    classifier.head(A, rest)[0, c].backward()
    return A.detach()[0].double(), A.grad[0].double()


def reference_grad_cam_plus_plus(A: Tensor, g: Tensor) -> Tensor:
    K, h, w = A.shape
    S = torch.zeros(h, w, dtype=A.dtype)
    for k in range(K):
        w_k, total = 0.0, float(A[k].sum())
        for i in range(h):
            for j in range(w):
                g_ij = float(g[k, i, j])
                denominator = 2 * g_ij**2 + total * g_ij**3
                alpha = g_ij**2 / denominator if denominator else 0.0
                w_k += alpha * max(g_ij, 0.0)
        S += w_k * A[k]
    return S.relu()


def reference_xgrad_cam(A: Tensor, g: Tensor) -> Tensor:
    S = torch.zeros(A.shape[1:], dtype=A.dtype)
    for A_k, g_k in zip(A, g, strict=True):
        if abs(A_k.sum()) > 1e-6 * A_k.abs().sum():
            S += (g_k * A_k).sum() / A_k.sum() * A_k
    return S.relu()


def reference_layer_cam(A: Tensor, g: Tensor) -> Tensor:
    S = torch.zeros(A.shape[1:], dtype=A.dtype)
    for A_k, g_k in zip(A, g, strict=True):
        for i, j in np.ndindex(*A_k.shape):
            S[i, j] += max(g_k[i, j], 0) * A_k[i, j]
    return S.relu()


def reference_hires_cam(A: Tensor, g: Tensor) -> Tensor:
    S = torch.zeros(A.shape[1:], dtype=A.dtype)
    for A_k, g_k in zip(A, g, strict=True):
        S += g_k * A_k
    return S.relu()


def logit_without(classifier: ol.Classifier, x: Tensor, c: int, k: int | None) -> Tensor:
    """y_c of the whole network, run from the image on, with channel k of the layer set to 0."""
    layout = classifier.feature_layout

    def remove(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        output = output.clone()
        if layout.kind == "NCHW":
            output[:, k] = 0
        else:  # the class token is set aside: only the tokens of the grid make a map
            output[:, layout.prefix if layout.kind == "tokens" else 0 :, ..., k] = 0
        return output

    module = classifier.network.get_submodule(classifier.layer)
    hook = module.register_forward_hook(remove) if k is not None else None
    try:
        return classifier.logits(x[None])[0, c]
    finally:
        if hook is not None:
            hook.remove()


def reference_ablation_cam(classifier: ol.Classifier, x: Tensor, c: int) -> Tensor:
    A = classifier.features(x[None])[0]
    y = logit_without(classifier, x, c, None)
    S = torch.zeros(A.shape[1:])
    for k in range(len(A)):
        S += (y - logit_without(classifier, x, c, k)) / y * A[k]
    return S.relu()


def reference_score_cam(classifier: ol.Classifier, x: Tensor, c: int) -> Tensor:
    A = classifier.features(x[None])[0]
    f_0 = classifier.logits(torch.zeros_like(x)[None])[0, c]
    u = [classifier.logits(x[None] * mask(A_k, x.shape))[0, c] - f_0 for A_k in A]
    w = torch.stack(u).softmax(0)
    S = torch.zeros(A.shape[1:])
    for w_k, A_k in zip(w, A, strict=True):
        S += w_k * A_k
    return S.relu()


def of_gradients(
    saliency: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[ol.Classifier, Tensor, int], Tensor]:
    return lambda classifier, x, c: saliency(*maps_and_gradients(classifier, x, c))


REFERENCES = {
    "grad-cam++": of_gradients(reference_grad_cam_plus_plus),
    "xgrad-cam": of_gradients(reference_xgrad_cam),
    "layer-cam": of_gradients(reference_layer_cam),
    "hires-cam": of_gradients(reference_hires_cam),
    "ablation-cam": reference_ablation_cam,
}


def assert_equals_reference(
    method: str, classifier: ol.Classifier, images: Tensor, targets: Tensor, **options: object
) -> None:
    masks = ol.explain(method, classifier, images, targets, **options)
    for x, c, actual in zip(images, targets.tolist(), masks, strict=True):
        with torch.set_grad_enabled(method != "ablation-cam"):
            expected = mask(REFERENCES[method](classifier, x, c), x.shape)
        torch.testing.assert_close(actual[0], expected, rtol=0, atol=2e-3)
    assert masks.any()


@pytest.mark.parametrize("method", REFERENCES)
def test_method_equals_its_slow_reference(
    method: str, classifier: ol.Classifier, images: Tensor, targets: Tensor
) -> None:
    assert_equals_reference(method, classifier, images, targets)


def resnet() -> nn.Module:
    torch.manual_seed(3)
    return timm.models.resnet.ResNet(
        timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=5, channels=(8, 8, 12, 12),
        zero_init_last=False,
    )  # fmt: skip


def swin() -> nn.Module:
    torch.manual_seed(4)
    return timm.models.swin_transformer.SwinTransformer(
        img_size=64, patch_size=2, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(1, 2),
        num_classes=5,
    )  # fmt: skip


def squeezenet() -> nn.Module:
    torch.manual_seed(5)
    return torchvision.models.squeezenet1_1(num_classes=5)


def pointwise(**options: int) -> nn.Module:
    """Ends like SqueezeNet: a 1×1 convolution to the classes, relu, pooling."""
    torch.manual_seed(6)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4),
        nn.ReLU(),
        nn.Dropout(),
        nn.Conv2d(8, 5, **{"kernel_size": 1, **options}),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 5),
    )


WHERE = {
    "inside a residual block": (resnet, "layer2.0.act1"),
    "before a residual sum": (resnet, "layer2.0.bn2"),
    "tokens in four dimensions": (swin, "layers.0.blocks.0.norm1"),
    "a window's shift": (swin, "layers.0.blocks.1.norm1"),
    "before a 1×1 convolution": (pointwise, "1"),
    "before two convolutions": (squeezenet, "features.3.squeeze_activation"),
}


@pytest.mark.parametrize("where", WHERE)
def test_ablation_cam_on_other_networks(where: str, targets: Tensor) -> None:
    """The rest of each image (residual branch, class token) goes with it into the head's chunks."""
    build, layer = WHERE[where]
    classifier = ol.Classifier(build(), layer, size=64, device="cpu")
    images = make_images(3, 64, 64)
    assert_equals_reference("ablation-cam", classifier, images, targets, chunk=7)


@pytest.mark.parametrize("method", sorted(set(REFERENCES) - {"ablation-cam"}))
def test_gradient_methods_on_other_networks(method: str, targets: Tensor) -> None:
    for build, layer in (WHERE["inside a residual block"], WHERE["a window's shift"]):
        classifier = ol.Classifier(build(), layer, size=64, device="cpu")
        assert_equals_reference(method, classifier, make_images(3, 64, 64), targets)


def test_ablation_cam_where_the_head_begins_with_an_attention(targets: Tensor) -> None:
    classifier = ol.load_model("scenes_vit", device="cpu")
    images, targets = ol.load_dataset("scenes").batch(range(2))
    assert_equals_reference("ablation-cam", classifier, images, targets)
    steps: list[ol.methods.Step] = []
    for chunk, n in ((128, 2), (50, 6)):  # 128 channels
        steps.clear()
        ol.explain("ablation-cam", classifier, images, targets, chunk=chunk, callback=steps.append)
        assert len(steps) == n


def test_where_the_head_begins_with_a_pointwise_convolution() -> None:
    def reader(network: nn.Module, layer: str) -> str | None:
        return ol.Classifier(network, layer, size=64).pointwise_reader

    assert reader(squeezenet(), "features.12") == "classifier.1"
    assert reader(squeezenet(), "features.3.squeeze_activation") is None  # two layers read it
    assert reader(resnet(), "layer2.0.act1") is None  # 3×3
    assert reader(pointwise(), "1") == "3"  # behind a dropout
    for options in ({"kernel_size": 3}, {"stride": 2}, {"padding": 1}):
        assert reader(pointwise(**options), "1") is None
    assert make_classifier("cnn").pointwise_reader is None


# ----------------------------------------------------------------------------------------- oracles


@pytest.mark.parametrize("name", ["cnn", "scenes_resnet"])
def test_all_are_cam_behind_pooling_and_a_linear_layer(
    name: str, images: Tensor, targets: Tensor
) -> None:
    """There ∂y_c/∂A_k = w_ck / (h·w) everywhere, and channel k adds w_ck · mean(A_k) to y_c."""
    if name == "cnn":
        classifier = make_classifier("cnn")
    else:
        classifier = ol.load_model(name, device="cpu")
        images, targets = ol.load_dataset("scenes").batch(range(3))
    linear = [m for m in classifier.network.modules() if isinstance(m, nn.Linear)][-1]
    w, A = linear.weight[targets], classifier.features(images)
    size = images.shape[2:]
    cam = ol.to_masks(torch.einsum("nk,nkhw->nhw", w, A)[:, None].relu(), size)
    for method in ("grad-cam", "xgrad-cam", "hires-cam"):
        masks = ol.explain(method, classifier, images, targets)
        torch.testing.assert_close(masks, cam, rtol=0, atol=1e-3)
    y = classifier.logits(images).gather(1, targets[:, None])
    lowered = w * A.mean((2, 3))
    S = torch.einsum("nk,nkhw->nhw", lowered / y, A)[:, None].relu()
    masks = ol.explain("ablation-cam", classifier, images, targets)
    torch.testing.assert_close(masks, ol.to_masks(S, size), rtol=0, atol=2e-3)
    assert cam.any()
    assert masks.any()


@settings(max_examples=15, deadline=None)
@given(st.floats(-20, 3))
def test_grad_cam_plus_plus_of_gradients_of_any_size(exponent: float) -> None:
    """The squares of small gradients are 0 in float32; float64 holds them."""
    classifier = make_classifier("cnn")
    classifier.network[-1].weight.mul_(10**exponent)
    assert_equals_reference("grad-cam++", classifier, make_images(1), torch.tensor([1]))


def two_halves() -> tuple[Tensor, Tensor]:
    """An image that is bright on the left in red, on the right in green, all over in blue."""
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    return torch.stack([left, 1 - left, torch.full((8, 8), 0.5)])[None], left


def linear_network(to_maps: list[list[float]], to_logits: Tensor, grid: int) -> ol.Classifier:
    """Maps that are mixtures of the colours, pooling to a grid, one linear layer."""
    conv = nn.Conv2d(3, len(to_maps), 1, bias=False)
    linear = nn.Linear(len(to_maps) * grid**2, len(to_logits), bias=False)
    network = nn.Sequential(conv, nn.AdaptiveAvgPool2d(grid), nn.Flatten(), linear)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor(to_maps)[:, :, None, None])
        linear.weight.copy_(to_logits)
    return ol.Classifier(network, "0", size=8, device="cpu")


def test_xgrad_cam_gives_a_map_whose_sum_is_zero_no_weight() -> None:
    image, left = two_halves()
    # maps: red − green, whose sum is 0 and whose Σ gA is not, and blue + red / 10
    to_logits = torch.tensor([[-1.0, 1, -1, 1, 1, 1, 1, 1], [0] * 8])
    classifier = linear_network([[1, -1, 0], [0.1, 0, 1]], to_logits, grid=2)
    masks = ol.explain("xgrad-cam", classifier, image, 0)
    torch.testing.assert_close(masks[0, 0], left)


def test_ablation_cam_of_a_negative_and_of_no_logit() -> None:
    image, left = two_halves()
    weights = torch.tensor([[1.0, -1], [-1, -2], [1, 2]])  # logits 0, −1.5, 1.5
    classifier = linear_network([[1, 0, 0], [0, 1, 0]], weights, grid=1)
    assert classifier.logits(image).tolist() == [[0, -1.5, 1.5]]
    zero, negative, positive = ol.explain(
        "ablation-cam", classifier, image.expand(3, -1, -1, -1), [0, 1, 2]
    )
    torch.testing.assert_close(zero[0], left)  # (0 − −½) A_0 + (0 − ½) A_1: where A_0 is
    # A quotient of negative numbers is positive: what makes a logit more negative counts.
    torch.testing.assert_close(negative[0], 1 - left)
    torch.testing.assert_close(positive[0], 1 - left)


def test_score_cam_gives_a_flat_map_the_score_of_a_black_image() -> None:
    """Its u is 0 whatever the logit of black is; here that map lowers what the relu cuts off."""
    image = torch.stack([torch.linspace(0, 1, 8).expand(8, 8), *torch.full((2, 8, 8), 0.5)])
    classifier = linear_network([[1, 0, 0], [0, -1, 0]], torch.eye(2), grid=1)
    linear = classifier.network[-1]
    linear.bias = nn.Parameter(torch.tensor([3.0, 0.0]), requires_grad=False)
    expected = mask(reference_score_cam(classifier, image, 0), image.shape)
    masks = ol.explain("score-cam", classifier, image[None], 0)
    torch.testing.assert_close(masks[0, 0], expected)
    assert (expected == 0).float().mean() > 0.2


def test_score_cam_without_a_normalisation(images: Tensor, targets: Tensor) -> None:
    network = make_classifier("cnn").network
    settings = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.1), "size": 32, "device": "cpu"}
    classifier = ol.Classifier(network, "4", **settings, normalize=False)
    masks = ol.explain("score-cam", classifier, images, targets)
    for x, c, found in zip(images, targets.tolist(), masks, strict=True):
        expected = mask(reference_score_cam(classifier, x, c), x.shape)
        torch.testing.assert_close(found, expected.view_as(found), rtol=0, atol=1e-4)


def test_score_cam_in_another_precision(images: Tensor, targets: Tensor) -> None:
    classifier = make_classifier("cnn")
    exact = ol.explain("score-cam", classifier, images, targets)
    quick = ol.explain("score-cam", classifier, images, targets, precision="bfloat16")
    assert not torch.equal(quick, exact)
    torch.testing.assert_close(quick, exact, rtol=0, atol=0.02)
    with pytest.raises(ValueError, match="float16"):
        ol.explain("score-cam", classifier, images, targets, precision="float16")


# --------------------------------------------------------------------------- the `grad-cam` package


def peer_masks(
    peer: type, classifier: ol.Classifier, images: Tensor, targets: Tensor, **options: object
) -> Tensor:
    """The package's own output, from beginning to end."""
    layer = classifier.network.get_submodule(classifier.layer)
    chosen = [ClassifierOutputTarget(c) for c in targets.tolist()]
    with peer(classifier.network, [layer], **options) as cam, torch.enable_grad():
        masks = cam(((images - 0.5) / 0.25).requires_grad_(), chosen)
    return torch.from_numpy(masks)[:, None]


PEERS = {
    "xgrad-cam": peers.XGradCAM,
    "layer-cam": peers.LayerCAM,
    "hires-cam": peers.HiResCAM,
    "ablation-cam": peers.AblationCAM,
}


@pytest.mark.parametrize("kind", ["cnn", "dense"])
@pytest.mark.parametrize("method", PEERS)
def test_parity_with_the_package(method: str, kind: str, images: Tensor, targets: Tensor) -> None:
    """It too takes the relu of the sum; its constants of 1e-7 play no part in maps of this size."""
    classifier = make_classifier(kind)
    masks = ol.explain(method, classifier, images, targets)
    expected = peer_masks(PEERS[method], classifier, images, targets)
    torch.testing.assert_close(masks, expected, rtol=0, atol=1e-3)
    assert masks.any()


def test_the_package_s_grad_cam_plus_plus_needs_large_gradients(
    images: Tensor, targets: Tensor
) -> None:
    """It adds 1e-6 to a denominator of the order g²: at g = 1e-3 that is half of it."""
    classifier = make_classifier("dense")
    linear = classifier.network[-1]
    for scale, agree in ((1e3, True), (1e-3, False)):
        linear.weight.mul_(scale)
        masks = ol.explain("grad-cam++", classifier, images, targets)
        theirs = peer_masks(peers.GradCAMPlusPlus, classifier, images, targets)
        assert torch.allclose(masks, theirs, atol=1e-3) is agree
        assert_equals_reference("grad-cam++", classifier, images, targets)
        linear.weight.div_(scale)


def test_the_package_s_ablation_is_another_where_maps_have_no_zero(
    images: Tensor, targets: Tensor
) -> None:
    """It then fills with the least value − 1e7, which moves down from channel to channel."""
    classifier = make_classifier("cnn").at("3")  # before the relu
    A = classifier.features(images)
    assert A.min() < 0
    masks = ol.explain("ablation-cam", classifier, images, targets)
    theirs = peer_masks(peers.AblationCAM, classifier, images, targets)
    assert not torch.allclose(masks, theirs, atol=0.1)
    layer = peers.ablation_layer.AblationLayer()
    layer.indices = np.arange(3)
    layer.set_next_batch(0, A, 3)
    filled = layer(None)
    assert [filled[k, k].max().item() for k in range(3)] == pytest.approx([-1e7, -2e7, -3e7])


# ------------------------------------------------------------------------------------------ chunks


class Counter:
    """Counts the images that a layer saw, by batch."""

    def __init__(self, classifier: ol.Classifier, layer: str) -> None:
        self.batches: list[int] = []
        module = classifier.network.get_submodule(layer)
        module.register_forward_hook(lambda m, inputs, y: self.batches.append(len(inputs[0])))


@pytest.mark.parametrize(("method", "layer"), [("score-cam", "0"), ("ablation-cam", "7")])
def test_the_network_never_sees_more_than_a_chunk(
    method: str, layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given as an option, or chosen by the size of the feature maps."""
    images, targets = make_images(3), torch.tensor([0, 3, 1])
    expected = ol.explain(method, make_classifier("cnn"), images, targets)
    for options in ({"chunk": 4}, {"batch_size": 4}):
        monkeypatch.setattr(ol.Classifier, "images_at_once", lambda self, size, layer=None: 4)
        classifier = make_classifier("cnn")
        counter = Counter(classifier, layer)
        masks = ol.explain(method, classifier, images, targets, **options)
        assert max(counter.batches) == 4
        torch.testing.assert_close(masks, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("method", "layer"), [("score-cam", "0"), ("ablation-cam", "7")])
def test_flat_channels_cost_nothing(method: str, layer: str) -> None:
    """What is 0 takes nothing away, and all flat masks give the same black image: one pass."""
    classifier = make_classifier("cnn")
    norm = classifier.network[3]
    norm.bias[:5] = -100.0  # five maps that the relu makes 0
    images, targets = make_images(3), torch.tensor([0, 3, 1])
    live = int((classifier.features(images).amax((2, 3)) > 0).sum())
    assert live <= 3 * 7
    reference = {**REFERENCES, "score-cam": reference_score_cam}[method]
    expected = [
        mask(reference(classifier, x, int(c)), x.shape)
        for x, c in zip(images, targets, strict=True)
    ]
    counter = Counter(classifier, layer)
    classifier.quick("float32")  # its trial passes are made once a network
    counter.batches.clear()
    masks = ol.explain(method, classifier, images, targets)
    once = {"score-cam": 3 + 1, "ablation-cam": 3}[method]  # features and black; the whole head
    assert sum(counter.batches) == live + once
    torch.testing.assert_close(masks[:, 0], torch.stack(expected), rtol=0, atol=2e-3)


# ------------------------------------------------------------------------------- unusual networks


class Branched(nn.Module):
    """A parallel branch runs between the layer and the 1×1 convolution that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer = nn.Conv2d(3, 8, 3, 4), nn.Conv2d(8, 8, 3, padding=1)
        self.branch, self.point = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a, b = self.layer(x), self.branch(x)
        return self.fc((b.relu() + self.point(a)).relu().mean((2, 3)))


def test_ablation_cam_beside_a_parallel_branch() -> None:
    torch.manual_seed(0)
    classifier = ol.Classifier(Branched(), "layer", size=32, device="cpu")
    x, c = make_images(1), 2
    A, rest = classifier.split(x)
    y = classifier.head(A, rest)[0, c]
    S = torch.zeros(A.shape[2:])
    for k in range(A.shape[1]):
        without = A.clone()
        without[:, k] = 0
        S += (y - classifier.head(without, rest)[0, c]) / y * A[0, k]
    found = ol.explain("ablation-cam", classifier, x, c)[0, 0]
    torch.testing.assert_close(found, mask(S.relu(), x.shape), rtol=0, atol=1e-4)


class TwoHeads(nn.Module):
    """The last linear layer is not the one that gives the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.auxiliary = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


def test_cam_reads_the_weights_of_the_head_that_is_used() -> None:
    torch.manual_seed(0)
    classifier = ol.Classifier(TwoHeads(), "conv", size=32, device="cpu")
    x = make_images(1)
    S = torch.einsum("k,khw->hw", classifier.network.fc.weight[1], classifier.features(x)[0])
    torch.testing.assert_close(ol.explain("cam", classifier, x, 1)[0, 0], mask(S, x.shape))


def test_cam_tries_the_head_once(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, seen = make_classifier("cnn"), []
    split = type(classifier).split
    monkeypatch.setattr(
        type(classifier), "split", lambda self, x: seen.append(len(x)) or split(self, x)
    )
    for _ in range(2):
        ol.explain("cam", classifier, make_images(3), 0)
    assert seen == [2, 3, 3]
    reason = ol.methods.applicable(classifier.at("1"))["cam"]
    assert reason is not None
    assert "'1'" in reason


def test_ablation_cam_takes_no_rounding_for_a_weight() -> None:
    """Behind the last attention the patches' tokens reach no logit."""
    classifier = ol.load_model("scenes_vit", device="cpu").at("blocks.3")
    images, targets = ol.load_dataset("scenes").batch(range(8))
    assert targets is not None
    with torch.no_grad():
        assert not METHODS["ablation-cam"].function(classifier, images, targets).any()


def test_cam_of_a_convolution_in_place_of_the_linear_layer(images: Tensor) -> None:
    """Pooling and a 1×1 convolution are both linear, so their order makes no difference."""
    trunk, conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Conv2d(8, 5, 1)
    pooling = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    before = ol.Classifier(nn.Sequential(*trunk, conv, *pooling), size=32, device="cpu")
    linear = nn.Linear(8, 5)
    linear.load_state_dict({"weight": conv.weight.flatten(1), "bias": conv.bias})
    behind = ol.Classifier(nn.Sequential(*trunk, *pooling, linear), size=32, device="cpu")
    assert before.layer == behind.layer == "1"
    masks = [ol.explain("cam", classifier, images, [0, 1, 2]) for classifier in (before, behind)]
    torch.testing.assert_close(*masks)
    rectified = nn.Sequential(*trunk, conv, nn.ReLU(), *pooling)
    assert ol.methods.applicable(ol.Classifier(rectified, "1", size=32))["cam"] is not None
