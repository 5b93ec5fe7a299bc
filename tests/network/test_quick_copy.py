"""The quick copy of a network does what the network does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from conftest import NETWORKS, make_classifier, make_images
from torch import Tensor, nn

import opticam_lite as ol
from opticam_lite.network import classifier as room
from opticam_lite.network import dtype_of, exact, quick_copy
from opticam_lite.network.quick_copy import QuickCopy

CPU = torch.device("cpu")


def with_norms() -> nn.Module:
    """Batch norms with statistics of their own, in every place where folding may go wrong."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
            self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)  # read twice
            self.conv3, self.bn3 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)  # used twice
            self.bn4 = nn.BatchNorm2d(8)  # behind an addition
            self.act, self.last_pool = nn.ReLU(), nn.MaxPool2d(2)
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.pool(self.relu(self.bn1(self.conv1(x))))
            y = self.conv2(x)
            x = self.bn2(y) + y
            x = self.bn3(self.conv3(x)) + self.bn3(self.conv3(x.relu()))
            x = self.last_pool(self.act(self.bn4(x)))
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    network = Network()
    for norm in (network.bn1, network.bn2, network.bn3, network.bn4):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return network.eval()


def check_same(classifier: ol.Classifier, images: Tensor) -> nn.Module:
    before = copy.deepcopy(classifier.network.state_dict())
    quick = classifier.quick("float32")
    expected = classifier.logits(images)
    torch.testing.assert_close(quick.logits(images), expected, rtol=1e-4, atol=1e-5)
    for name, value in classifier.network.state_dict().items():
        assert torch.equal(value, before[name])
    assert isinstance(quick._network, QuickCopy)
    return quick._network.network


@pytest.mark.parametrize("kind", NETWORKS)
def test_logits_and_gradients_are_those_of_the_network(kind: str, images: Tensor) -> None:
    classifier = make_classifier(kind)
    check_same(classifier, images)
    gradients = []
    for view in (classifier, classifier.quick("float32")):
        x = images.clone().requires_grad_()
        (g,) = torch.autograd.grad(view.logits(x)[:, 1].sum(), x)
        gradients.append(g)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


def test_only_batch_norms_that_belong_to_one_convolution_are_folded(images: Tensor) -> None:
    quick = check_same(ol.Classifier(with_norms(), "relu", size=32), images)
    left = {n for n, m in quick.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert left == {"bn2", "bn3", "bn4"}
    # The pooling comes before the relu in both places.
    assert isinstance(quick.relu, nn.MaxPool2d)
    assert isinstance(quick.pool, nn.ReLU)
    assert isinstance(quick.act, nn.MaxPool2d)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "efficientnet_b0",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("vgg11_bn", "densenet121")),
    ],
)
def test_real_architectures(name: str) -> None:
    torch.manual_seed(0)
    network = timm.create_model(name).eval()
    for module in network.modules():  # statistics that are not those of an untrained network
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    quick = check_same(ol.Classifier(network, size=64), make_images(2, 64, 64))
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in quick.modules())
    assert norms < sum(isinstance(m, nn.BatchNorm2d) for m in network.modules())


@pytest.mark.parametrize("kind", NETWORKS)
def test_bfloat16_is_rough_and_its_logits_still_change_finely(kind: str, images: Tensor) -> None:
    classifier = make_classifier(kind)
    rough = classifier.quick("bfloat16")
    y = classifier.logits(images)
    difference = (rough.logits(images) - y).abs().max()
    assert 0 < difference < 0.05 * y.abs().max()
    assert rough.logits(images).dtype == torch.float32
    # Eight binary digits would leave at most 2 * 256 values between −2 and 2, mostly equal ones.
    logits = rough.logits(make_images(200))[:, 0]
    assert len(logits.unique()) > 150


def test_auto_asks_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, expected in (
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx2": True}, torch.float32),
        ({}, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags, raising=False)
        assert dtype_of("auto", CPU) == expected
        assert dtype_of("float32", CPU) == torch.float32
        assert dtype_of("bfloat16", CPU) == torch.bfloat16
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert dtype_of("auto", CPU) == torch.float32
    with pytest.raises(ValueError, match="unknown precision 'bfloat'; did you mean 'bfloat16'"):
        dtype_of("bfloat", CPU)


def switches() -> list[Any]:
    return [getattr(where, name) for where, name in quick_copy._SWITCHES]


def test_float32_is_exact_on_a_gpu_and_the_switches_are_put_back() -> None:
    before, gpu = switches(), torch.device("cuda", 0)
    assert before != quick_copy._EXACT
    with exact(CPU):
        assert switches() == before
    with exact(gpu):
        with exact(gpu):
            assert switches() == quick_copy._EXACT
        assert switches() == quick_copy._EXACT
    assert switches() == before
    with pytest.raises(ValueError, match="within"), exact(gpu):
        raise ValueError("within")
    assert switches() == before


def test_the_last_thread_to_leave_puts_the_switches_back() -> None:
    before, gpu = switches(), torch.device("cuda", 0)
    first, second = exact(gpu), exact(gpu)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert switches() == quick_copy._EXACT
    second.__exit__(None, None, None)
    assert switches() == before


def test_all_that_the_kit_computes_is_exact(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward wherever a network is run, and the way back within `ol.explain`."""
    within: list[torch.device] = []
    entered: list[str] = []

    @contextmanager
    def noted(device: torch.device) -> Iterator[None]:
        within.append(device)
        entered.append("")
        yield
        within.pop()

    for module in (room, ol.methods):
        monkeypatch.setattr(module, "exact", noted)
    classifier = make_classifier("cnn")
    maps, rest = classifier.split(images)
    for number, run in enumerate(
        (lambda: classifier.head(maps, rest), lambda: classifier.logits(images)), start=2
    ):
        run()
        assert len(entered) == number
    steps: list[bool] = []
    ol.explain("opti-cam", classifier, images, 0, iterations=3, callback=lambda step: steps.append(
        within == [CPU]
    ))  # fmt: skip
    assert steps == [True] * 3
    assert not within


class Float32Only(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise RuntimeError("not implemented for 'BFloat16'")
        return x


def test_a_network_that_fails_in_bfloat16(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = list(copy.deepcopy(make_classifier("cnn").network))
    network = nn.Sequential(*layers[:4], Float32Only(), *layers[4:])
    classifier = ol.Classifier(network, "3", size=32, device="cpu")
    monkeypatch.setattr(quick_copy, "_multiplies_bfloat16", lambda device: True)
    auto = classifier.quick("auto")
    assert auto.dtype == torch.float32
    torch.testing.assert_close(auto.logits(images), classifier.logits(images))
    with pytest.raises(ValueError, match=r"fails in bfloat16.*use precision='auto' or 'float32'"):
        classifier.quick("bfloat16")


def test_a_network_without_parameters(images: Tensor) -> None:
    network = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    classifier = ol.Classifier(network, layer="0", size=32, device="cpu")
    rough = classifier.quick("bfloat16")
    torch.testing.assert_close(rough.logits(images), classifier.logits(images), atol=0.02, rtol=0)


def test_the_copy_is_made_once_and_shared_by_all_cuts() -> None:
    classifier = make_classifier("cnn")
    one = classifier.quick("float32")
    two = classifier.at("1").quick("float32")
    assert one._network is two._network


def test_images_at_once_follow_layers_and_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = make_classifier("cnn")
    traced = classifier._cuttable

    def free(number: float) -> None:
        memory = type("Memory", (), {"available": number})
        monkeypatch.setattr("psutil.virtual_memory", lambda: memory)

    free(2**34)
    assert traced.largest() == 3 * 32 * 32  # the image; 8 maps of 16×16 are fewer
    assert traced.largest("1") == 12 * 8 * 8
    assert classifier.images_at_once() == 64
    for largest, number in {2**20: 8, 2**18: 16, 2**17: 32, 2**10: 64}.items():
        monkeypatch.setattr(traced, "largest", lambda layer, largest=largest: largest)
        assert classifier.images_at_once() == number
    monkeypatch.setattr(traced, "largest", lambda layer: 2**18 if layer is None else 2**17)
    assert classifier.images_at_once((64, 32)) == 8
    assert classifier.images_at_once(layer="4") == 32
    free(0)
    assert classifier.images_at_once() == 1
    each = 8 * traced.values
    free(4 * each * 3.5)
    assert classifier.images_at_once() == 3
    assert classifier.images_at_once((64, 32)) == 1
