"""The same maps and figures on a device as on the CPU; test_devices.py runs this file."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import NETWORKS, Sized, cnn, make_images
from pretend_gpu import NAME, PretendGPU
from test_every_method import FITS, OPTIONS
from torch import Tensor, nn

import opticam_lite as ol
from opticam_lite import metrics
from opticam_lite.datasets import Dataset, Sample
from opticam_lite.network import RecordedStep


@pytest.fixture
def device() -> Iterator[str]:
    """The name of a device that is not the CPU."""
    name = os.environ["OPTICAM_DEVICE"]
    with PretendGPU() if name == NAME else contextlib.nullcontext():
        yield name


KINDS = NETWORKS | {"rerun": (lambda: Sized(cnn()), "network.4")}


def make(kind: str, device: str) -> ol.Classifier:
    build, layer = KINDS[kind]
    normalisation = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    return ol.Classifier(build(), layer, **normalisation, size=32, device=device)


@pytest.mark.parametrize(("method", "kind"), FITS)
def test_masks_do_not_depend_on_the_device(
    method: str, kind: str, device: str, images: Tensor, targets: Tensor
) -> None:
    classifier = make(kind, device)
    assert classifier.logits(images).device == images.device
    options = OPTIONS.get(method, {})
    if method == "gradient-shap":
        options = {**options, "stdev": 0}  # each device draws its own noise
    masks = ol.explain(method, classifier, images, targets, **options)
    assert masks.device == images.device
    here = ol.explain(method, make(kind, "cpu"), images, targets, **options)
    torch.testing.assert_close(masks, here, rtol=0, atol=2e-3)
    again = ol.explain(method, classifier, images, targets, **options)
    torch.testing.assert_close(again, masks, rtol=0, atol=0)
    there = images.to(device)
    assert ol.explain("cam", make("cnn", device), there, 0).device == there.device


def test_probabilities_come_back_to_the_images(
    device: str, images: Tensor, targets: Tensor
) -> None:
    classifier = make("cnn", device)
    masks = ol.explain("grad-cam", classifier, images, targets)
    p, o = ol.masked_probabilities(classifier, images, masks, targets)
    assert p.device == o.device == images.device
    assert p.dtype == o.dtype == torch.float32


class Boxed(Dataset):
    """Three images with boxes."""

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        self.images, self.targets = images, targets
        self.name, self.labels, self.has_boxes = "boxed", [f"class {c}" for c in range(5)], True

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, index: int) -> Sample:
        boxes = torch.tensor([[2, 3, 20 + index, 30]])
        return Sample(str(index), self.images[index], int(self.targets[index]), boxes=boxes)


def test_every_metric_is_the_same(
    device: str, images: Tensor, targets: Tensor, tmp_path: Path
) -> None:
    dataset, names = Boxed(images, targets), ol.list_metrics()
    here, there = (
        ol.evaluate(make("cnn", d), dataset, ["grad-cam"], metrics=names, out=tmp_path / d)
        for d in ("cpu", device)
    )
    assert set(here["metric"]) == set(names)
    assert here["value"].notna().all()
    keys = ["image", "method", "metric"]
    here, there = (frame.sort_values(keys).reset_index() for frame in (here, there))
    pd.testing.assert_frame_equal(here[[*keys, "value"]], there[[*keys, "value"]], rtol=1e-3)


def test_metrics_stay_where_the_masks_are(device: str, images: Tensor, targets: Tensor) -> None:
    masks = ol.explain("grad-cam", make("cnn", device), images.to(device), targets)
    boxes = [torch.tensor([[2, 3, 20, 30]])] * 3
    p = torch.tensor([0.2, 0.5, 0.9])
    of_boxes = (
        metrics.localization_error,
        metrics.f1_score,
        metrics.box_overlaps,
        metrics.pointing_game,
        metrics.energy_pointing_game,
    )
    found = [metric(masks, boxes) for metric in of_boxes]
    found += [metrics.saliency_metric(masks, p), metrics.complexity(masks)]
    assert all(values.device == masks.device for values in found)


@pytest.mark.parametrize("method", ["opti-cam", "opti-cam-fast"])
def test_an_optimisation_never_waits_for_a_gpu(method: str, device: str) -> None:
    """Between its checks for convergence, every tenth iteration, it does not synchronise."""
    classifier = make("cnn", device)
    images = make_images(4).to(device)
    targets = torch.arange(4).to(device)
    steps = {"opti-cam": {"iterations": 9}, "opti-cam-fast": {"passes": 9}}[method]
    function = ol.methods.METHODS[method].function
    seen: list[ol.methods.Step] = []
    function(classifier, images, targets, **steps)  # makes the quick copy of the network
    with waiting_is_an_error(device), torch.no_grad():
        masks = function(classifier, images, targets, callback=seen.append, **steps)
    assert masks.device == images.device
    assert len(seen) == {"opti-cam": 9, "opti-cam-fast": 8}[method]


def test_an_image_that_has_finished_stays_until_somebody_asks(
    device: str, images: Tensor, targets: Tensor
) -> None:
    """On a GPU convergence is checked every tenth iteration; its best map must not change."""
    options = {"iterations": 19, "tolerance": 2e-3, "learning_rate": 0.3}
    steps: dict[str, list[ol.methods.Step]] = {device: [], "cpu": []}
    masks = {
        d: ol.explain(
            "opti-cam", make("cnn", d), images, targets, callback=steps[d].append, **options
        )
        for d in steps
    }
    finished = [
        next((s.index for s, t in pairwise(steps["cpu"]) if s.objective[i] == t.objective[i]), 19)
        for i in range(len(images))
    ]
    assert len(set(finished)) > 1
    assert any(index % 10 for index in finished)
    torch.testing.assert_close(masks[device], masks["cpu"], rtol=0, atol=2e-3)


REPEATED = {"opti-cam": {"iterations": 12}, "opti-cam-fast": {"passes": 9}}
REPEATED["extremal-perturbation"] = {"iterations": 8, "sigma": 8.0, "step": 4}


@pytest.mark.parametrize("method", REPEATED)
def test_a_recording_does_what_the_step_does(
    method: str, device: str, images: Tensor, targets: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    record = RecordedStep._recorded

    def recorded(self: RecordedStep) -> torch.cuda.CUDAGraph | None:
        made.append(record(self))
        return made[-1]

    monkeypatch.setattr(RecordedStep, "_recorded", recorded)
    classifier = make("cnn", device)
    masks = ol.explain(method, classifier, images, targets, **REPEATED[method])
    assert bool(made) == device.startswith("cuda")
    assert all(made)
    monkeypatch.setattr(RecordedStep, "_recorded", lambda self: None)
    done = ol.explain(method, classifier, images, targets, **REPEATED[method])
    torch.testing.assert_close(masks, done, rtol=0, atol=0)


def test_a_network_that_asks_for_a_value(device: str, images: Tensor, targets: Tensor) -> None:
    class Asks(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.detach().mean()) < 1e9 else x

    Asks.__module__ = "torch.nn.modules.activation"  # a leaf module for torch.fx
    layers = list(NETWORKS["cnn"][0]())
    network = nn.Sequential(layers[0], Asks(), *layers[2:])
    masks = [
        ol.explain("opti-cam", ol.Classifier(network, "4", size=32, device=d), images, targets)
        for d in (device, device, "cpu")
    ]
    torch.testing.assert_close(masks[0], masks[1], rtol=0, atol=0)
    assert (masks[0] - masks[2]).abs().mean() < 0.01
    after = ol.explain("opti-cam", make("cnn", device), images, targets)
    assert after.isfinite().all()


@contextlib.contextmanager
def waiting_is_an_error(device: str) -> Iterator[None]:
    """Raise an error for operations that synchronise with the GPU."""
    if device.startswith("cuda"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns that it does not detect all of them
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        with PretendGPU(may_wait=False):
            yield


def test_the_pretended_gpu_is_a_device_of_its_own() -> None:
    with PretendGPU():
        far = torch.arange(3.0).to(NAME)
        assert (far + 1).device == torch.zeros(3, device=NAME).device == far.device
        assert far[torch.tensor([0, 2])].tolist() == [0, 2]
        assert (far * torch.tensor(2.0)).cpu().tolist() == [0, 2, 4]
        with pytest.raises(RuntimeError, match="different devices"):
            far + torch.zeros(3)
        far += 1
        assert far.tolist() == [1, 2, 3]
    for ask in (lambda: far.sum().item(), lambda: far.cpu(), lambda: far[far > 1]):
        with PretendGPU(may_wait=False), pytest.raises(RuntimeError, match="waits"):
            ask()


def test_curves_take_images_and_masks_from_different_devices(
    device: str, images: Tensor, targets: Tensor
) -> None:
    masks = ol.explain("grad-cam", make("cnn", "cpu"), images, targets)
    expected = metrics.deletion(make("cnn", "cpu"), images, masks, targets).values
    for x, S in ((images, masks.to(device)), (images.to(device), masks)):
        found = metrics.deletion(make("cnn", device), x, S, targets).values
        assert found.device == x.device
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-3)
