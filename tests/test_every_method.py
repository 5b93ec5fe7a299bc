"""What every method of the registry must keep, on every kind of network that it fits."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NETWORKS, Sized, cnn, make_classifier, make_images
from torch import Tensor, nn

import opticam_lite as ol

OPTIONS = {
    "extremal-perturbation": {
        "iterations": 3,
        "step": 8,
        "sigma": 8.0,
        "levels": 3,
        "learning_rate": 1e-3,
    },
    "gradient-shap": {"samples": 4, "chunk": 2},
    "lime": {"samples": 20, "chunk": 8},
    "opti-cam": {"iterations": 5},
    "opti-cam-fast": {"passes": 5},
}
# Methods that owe no zeros to an image of one colour, and why.
NOT_ZERO_ON_FLAT = {
    "extremal-perturbation": "its mask has the area that it is given, whatever the image",
    "fake-cam": "it does not look at the image",
    "gradient-shap": "it explains pixels, and the noise on them is not flat",
}
CLASSIFIERS = {kind: make_classifier(kind) for kind in NETWORKS}
CLASSIFIERS["rerun"] = ol.Classifier(Sized(cnn()), "network.4", size=32, device="cpu")
FITS = [
    (method, kind)
    for method in ol.list_methods()
    for kind, classifier in CLASSIFIERS.items()
    if ol.methods.applicable(classifier)[method] is None
    and (kind != "rerun" or ol.methods.METHODS[method].uses_layer)
]
every = pytest.mark.parametrize(("method", "kind"), FITS)


def run(method: str, kind: str, images: Tensor, targets: Tensor, **more: object) -> Tensor:
    options = {**OPTIONS.get(method, {}), **more}
    return ol.explain(method, CLASSIFIERS[kind], images, targets, **options)


def test_every_method_fits_some_network() -> None:
    assert {method for method, _ in FITS} == set(ol.list_methods())


@pytest.mark.parametrize("method", ol.list_methods())
def test_every_method_has_a_slow_reference(method: str) -> None:
    name = method.replace("-", "_").replace("++", "_plus_plus")
    file = Path(__file__).parent / "methods" / f"test_{name}.py"
    assert f"def reference_{name}(" in file.read_text(encoding="utf-8")


@every
def test_range_shape_and_type(method: str, kind: str, images: Tensor, targets: Tensor) -> None:
    masks = run(method, kind, images, targets)
    assert masks.shape == (3, 1, 32, 32)
    assert masks.dtype == torch.float32
    assert masks.device == images.device
    assert not masks.requires_grad
    assert masks.min() >= 0
    assert masks.max() <= 1
    for mask in masks:
        assert mask.max() == pytest.approx(1) or not mask.any()


@every
def test_batch_mates_and_order_do_not_matter(
    method: str, kind: str, images: Tensor, targets: Tensor
) -> None:
    together = run(method, kind, images, targets)
    for i in range(3):
        alone = run(method, kind, images[i : i + 1], targets[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-3)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(
        run(method, kind, images[order], targets[order]), together[order], rtol=0, atol=1e-3
    )
    torch.testing.assert_close(
        run(method, kind, images, targets, batch_size=2), together, rtol=0, atol=1e-3
    )


@every
def test_the_same_call_gives_the_same_masks(
    method: str, kind: str, images: Tensor, targets: Tensor
) -> None:
    first = run(method, kind, images, targets)
    torch.manual_seed(99)
    torch.testing.assert_close(run(method, kind, images, targets), first, rtol=0, atol=0)


def state_of(classifier: ol.Classifier) -> tuple:
    modules = list(classifier.network.modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return (
        {k: v.clone() for k, v in classifier.network.state_dict().items()},
        [m.training for m in modules],
        [len(getattr(m, kind)) for m in modules for kind in hooks],
        [(p.requires_grad, p.grad is None) for p in classifier.network.parameters()],
        torch.get_rng_state(),
        torch.is_grad_enabled(),
        [*np.random.get_state()[1], np.random.get_state()[2]],  # noqa: NPY002
    )


def assert_same(before: tuple, after: tuple) -> None:
    for k, v in before[0].items():
        assert torch.equal(v, after[0][k]), k
    assert before[1:4] == after[1:4]
    assert torch.equal(before[4], after[4])
    assert before[5:] == after[5:]


@every
def test_network_and_random_state_are_left_as_found(
    method: str, kind: str, images: Tensor, targets: Tensor
) -> None:
    kept = images.clone()
    before = state_of(CLASSIFIERS[kind])
    run(method, kind, images, targets)
    assert_same(before, state_of(CLASSIFIERS[kind]))
    assert torch.equal(images, kept)


class Bomb(nn.Module):
    """Goes off when its fuse has burnt down; each run of the network burns one."""

    def __init__(self) -> None:
        super().__init__()
        self.fuse = 1000

    def __deepcopy__(self, memo: dict) -> Bomb:
        return self  # the quick copy of a network burns the same fuse

    def forward(self, x: Tensor) -> Tensor:
        self.fuse -= 1
        if self.fuse < 0 * x.numel():  # depends on a value, so it is not traced but run
            raise RuntimeError("the network failed")
        return x


@pytest.mark.parametrize("where", ["trunk", "head"])
@pytest.mark.parametrize("fuse", [0, 1])
@pytest.mark.parametrize("method", [m for m in ol.list_methods() if m != "fake-cam"])
def test_network_is_left_as_found_after_an_exception(
    method: str, fuse: int, where: str, images: Tensor, targets: Tensor
) -> None:
    if (method, "cnn") in FITS:
        layers = list(copy.deepcopy(CLASSIFIERS["cnn"].network))
        at = 2 if where == "trunk" else 5
        network = nn.Sequential(*layers[:at], Bomb(), *layers[at:])
        classifier = ol.Classifier(network, "5" if where == "trunk" else "4", size=32)
    else:
        network = copy.deepcopy(CLASSIFIERS["vit"].network)
        setattr(network, "norm_pre" if where == "trunk" else "head_drop", Bomb())
        classifier = ol.Classifier(network, "blocks.1.norm1", size=32)
    (bomb,) = [m for m in classifier.network.modules() if isinstance(m, Bomb)]
    before = state_of(classifier)
    bomb.fuse = fuse
    options = {**OPTIONS, "score-cam": {"chunk": 12}}.get(method, {})
    gradients = ("grad-cam", "grad-cam++", "xgrad-cam", "layer-cam", "hires-cam")
    runs_once = {(m, part) for m in gradients for part in ("trunk", "head")}
    runs_once |= {("cam", "head"), ("ablation-cam", "trunk")}
    if fuse == 0 or (method, where) not in runs_once:
        with pytest.raises(RuntimeError, match="the network failed"):
            ol.explain(method, classifier, images, targets, **options)
    assert_same(before, state_of(classifier))
    bomb.fuse = 1000
    assert ol.explain(method, classifier, images, targets, **options).shape == (3, 1, 32, 32)


@pytest.mark.parametrize(
    "method", [m for m in ol.list_methods() if "callback" in ol.methods.METHODS[m].options]
)
def test_an_exception_in_the_callback_passes_through(
    method: str, images: Tensor, targets: Tensor
) -> None:
    class CancelledError(Exception):
        pass

    def cancel(step: ol.methods.Step) -> None:
        raise CancelledError

    before = state_of(CLASSIFIERS["cnn"])
    with pytest.raises(CancelledError):
        ol.explain(method, CLASSIFIERS["cnn"], images, targets, callback=cancel)
    assert_same(before, state_of(CLASSIFIERS["cnn"]))


@every
def test_flat_feature_maps_give_zeros_and_never_nan(
    method: str, kind: str, targets: Tensor
) -> None:
    """The features of a black image are constant but for the border; cut where they are flat."""
    flat = torch.zeros(3, 3, 32, 32)
    masks = run(method, kind, flat, targets)
    assert torch.isfinite(masks).all()
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    linear = nn.Sequential(*network, nn.Linear(4, 5))
    classifier = ol.Classifier(linear, "0", size=32)
    if ol.methods.applicable(classifier)[method] is not None:  # a transformer without positions
        network = copy.deepcopy(CLASSIFIERS["vit"].network)
        network.pos_embed.data.zero_()
        classifier = ol.Classifier(network, size=32)
    masks = ol.explain(method, classifier, flat + 0.3, targets, **OPTIONS.get(method, {}))
    assert torch.isfinite(masks).all()
    assert method in NOT_ZERO_ON_FLAT or not masks.any()


@every
def test_a_single_image_and_no_image(method: str, kind: str, images: Tensor) -> None:
    assert run(method, kind, images[:1], torch.tensor([1])).shape == (1, 1, 32, 32)
    empty = run(method, kind, images[:0], torch.zeros(0, dtype=torch.int64))
    assert empty.shape == (0, 1, 32, 32)


@every
def test_images_need_not_be_square(method: str, kind: str, targets: Tensor) -> None:
    images = make_images(3, 32, 64)
    if kind == "vit":  # its position embedding has one fixed grid
        from timm.models.vision_transformer import VisionTransformer

        torch.manual_seed(2)
        network = VisionTransformer(
            img_size=(32, 64), patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5
        )
        classifier = ol.Classifier(network, "blocks.1.norm1", size=(32, 64))
        assert classifier.layer_shape() == (16, 4, 8)
        masks = ol.explain(method, classifier, images, targets, **OPTIONS.get(method, {}))
    else:
        masks = run(method, kind, images, targets)
    assert masks.shape == (3, 1, 32, 64)
    assert torch.isfinite(masks).all()


@every
def test_inside_no_grad_and_inference_mode(
    method: str, kind: str, images: Tensor, targets: Tensor
) -> None:
    expected = run(method, kind, images, targets)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            masks = run(method, kind, images.clone(), targets.clone())
        torch.testing.assert_close(masks, expected, rtol=0, atol=1e-4)


OTHER_LAYERS = {"cnn": "1", "dense": "1", "vit": "blocks.0", "rerun": "network.1"}


@every
def test_the_layer_matters_only_to_methods_that_use_it(
    method: str, kind: str, images: Tensor, targets: Tensor
) -> None:
    elsewhere = CLASSIFIERS[kind].at(OTHER_LAYERS[kind])
    if ol.methods.applicable(elsewhere)[method] is not None:
        assert ol.methods.METHODS[method].uses_layer
        return
    here = run(method, kind, images, targets)
    there = ol.explain(method, elsewhere, images, targets, **OPTIONS.get(method, {}))
    same = torch.allclose(here, there, rtol=0, atol=1e-5)
    assert same != ol.methods.METHODS[method].uses_layer


WHOLE = {"chunk", "samples", "seed", "iterations", "passes"}


@pytest.mark.parametrize(
    ("method", "option"),
    [
        (method, option)
        for method in ol.list_methods()
        for option in sorted(WHOLE & set(ol.methods.METHODS[method].options))
    ],
)
def test_whole_numbers(method: str, option: str, images: Tensor) -> None:
    kind = next(kind for name, kind in FITS if name == method)
    for value in (1.5, "2", -1):
        with pytest.raises(ValueError, match=rf"{option} is '?{value}'?; a whole number"):
            run(method, kind, images, torch.tensor([0, 1, 2]), **{option: value})
    with pytest.raises(ValueError, match=r"batch_size is 1\.5; a whole number ≥ 1 is needed"):
        run(method, kind, images, torch.tensor([0, 1, 2]), batch_size=1.5)
