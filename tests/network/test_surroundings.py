"""Autocast, another default dtype and another default device around the kit change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import make_classifier
from test_every_method import FITS, OPTIONS
from torch import Tensor, nn
from torchvision.utils import save_image

import opticam_lite as ol
from opticam_lite import metrics


@contextmanager
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def meta() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": float64,
    "meta": meta,
}
around = pytest.mark.parametrize("surroundings", SURROUNDINGS.values(), ids=SURROUNDINGS)
Surroundings = Callable[[], contextmanager]


@around
@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_every_method(
    kind: str, surroundings: Surroundings, images: Tensor, targets: Tensor
) -> None:
    classifier = make_classifier(kind)
    methods = {method: OPTIONS.get(method, {}) for method, fits in FITS if fits == kind}
    expected = ol.explain(methods, classifier, images, targets)
    with surroundings():
        masks = ol.explain(methods, classifier, images, targets)
        again = ol.Classifier(**classifier.rebuild_arguments())
        masks |= {"made within": ol.explain("opti-cam", again, images, targets, iterations=5)}
    expected["made within"] = expected["opti-cam"]
    for method, own in masks.items():
        torch.testing.assert_close(own, expected[method], rtol=0, atol=0, msg=method)


@around
def test_what_was_set_is_found_again(surroundings: Surroundings, images: Tensor) -> None:
    classifier = make_classifier("cnn")
    with surroundings():
        before = torch.get_default_dtype(), torch.get_default_device()
        before += (torch.is_autocast_enabled("cpu"),)
        ol.explain("grad-cam", classifier, images)
        with pytest.raises(ValueError, match="unknown selector"):
            ol.explain("opti-cam", classifier, images, selector="none")
        after = torch.get_default_dtype(), torch.get_default_device()
        assert before == (*after, torch.is_autocast_enabled("cpu"))


@around
def test_loading_reading_and_measuring(
    surroundings: Surroundings, images: Tensor, targets: Tensor, tmp_path: Path
) -> None:
    save_image(images[0], tmp_path / "0.png")
    classifier = make_classifier("cnn")
    names = [name for name in ol.list_metrics() if metrics.METRICS[name].needs is None]

    def compute() -> list[Tensor]:
        network = ol.load_model("resnet18", weights="random", device="cpu")
        scenes = ol.load_dataset("scenes", classifier=network)
        x, c = scenes.batch([0])
        read = ol.load_image(tmp_path / "0.png", network)
        masks = ol.explain("grad-cam", classifier, images, targets)
        dataset = ol.Images(images, [0, 1, 2])
        frame = ol.evaluate(classifier, dataset, ["grad-cam"], names, progress=False)
        values = torch.tensor(frame["value"].to_list(), dtype=torch.float64, device="cpu")
        return [
            x, c, read, network.probabilities(x), masks, values,
            classifier.predict(images), ol.upsample(masks[..., ::4, ::4], (32, 32)),
            *ol.masked_probabilities(classifier, images, masks, [0, 1, 2]),
            metrics.insertion(classifier, images, masks).areas,
            metrics.deletion(classifier, images, masks, 0).areas,
            metrics.aopc(classifier, images, masks, [0, 1, 2]).areas,
            metrics.adcc(masks[:, 0, 0, 0], masks[:, 0, 9, 9], masks, masks),
        ]  # fmt: skip

    expected = compute()
    with surroundings():
        found = compute()
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_threads_that_overlap_put_the_dtype_back() -> None:
    with float64():
        first, second = ol.network.usual(), ol.network.usual()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_default_dtype() == torch.float32
        second.__exit__(None, None, None)
        assert torch.get_default_dtype() == torch.float64


def test_a_network_that_creates_tensors(images: Tensor) -> None:
    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.zeros(8, 1, 1)

    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), Shifted(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    expected = ol.explain("grad-cam", ol.Classifier(network, "2", size=32, device="cpu"), images, 0)
    for surroundings in (float64, meta, lambda: torch.device("meta")):
        with surroundings():
            classifier = ol.Classifier(network, "2", size=32, device="cpu")
            masks = ol.explain("grad-cam", classifier, images, 0)
        torch.testing.assert_close(masks, expected, rtol=0, atol=0)
