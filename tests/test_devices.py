"""The same maps on every device that this machine has."""

from __future__ import annotations

import pytest
import torch
from conftest import make_images
from test_every_method import FITS, NETWORKS, OPTIONS, run
from torch import Tensor

import opticam_lite as ol

DEVICES = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
on_every = pytest.mark.parametrize("device", DEVICES)


def make(kind: str, device: str) -> ol.Classifier:
    build, layer = NETWORKS[kind]
    normalisation = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    return ol.Classifier(build(), layer, **normalisation, size=32, device=device)


@on_every
@pytest.mark.parametrize(("method", "kind"), FITS)
def test_masks_do_not_depend_on_the_device(
    method: str, kind: str, device: str, images: Tensor, targets: Tensor
) -> None:
    classifier = make(kind, device)
    assert classifier.logits(images).device == images.device
    masks = ol.explain(method, classifier, images, targets, **OPTIONS.get(method, {}))
    assert masks.device == images.device
    torch.testing.assert_close(masks, run(method, kind, images, targets), rtol=0, atol=2e-3)
    there = images.to(device)
    assert ol.explain("cam", make("cnn", device), there, 0).device == there.device


@on_every
def test_metrics_come_back_to_the_images(device: str, images: Tensor, targets: Tensor) -> None:
    classifier = make("cnn", device)
    masks = ol.explain("grad-cam", classifier, images, targets)
    p, o = ol.masked_probabilities(classifier, images, masks, targets)
    assert p.device == o.device == images.device
    assert p.dtype == o.dtype == torch.float32


@on_every
@pytest.mark.parametrize("method", ["opti-cam", "opti-cam-fast"])
def test_an_optimisation_never_waits_for_a_gpu(method: str, device: str) -> None:
    """Between its checks for finished images, every tenth iteration, nothing asks for a value."""
    classifier = make("cnn", device)
    images = make_images(4).to(device)
    targets = torch.arange(4, device=device)
    steps = {"opti-cam": {"iterations": 9}, "opti-cam-fast": {"passes": 9}}[method]
    function = ol.methods.METHODS[method].function
    seen = []
    function(classifier, images, targets, **steps)  # makes the quick copy of the network
    if device != "cpu":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            masks = function(classifier, images, targets, callback=seen.append, **steps)
    finally:
        if device != "cpu":
            torch.cuda.set_sync_debug_mode("default")
    assert masks.device.type == torch.device(device).type
    assert len(seen) == {"opti-cam": 9, "opti-cam-fast": 8}[method]
