"""The quick copy of a network does what the network does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from conftest import NETWORKS, make_classifier, make_images
from torch import Tensor, nn

import opticam_lite as ol
from opticam_lite import precision
from opticam_lite.precision import Accelerated, dtype_of, exact

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


def check_same(classifier: ol.Classifier, images: Tensor) -> Accelerated:
    before = copy.deepcopy(classifier.network.state_dict())
    quick = classifier.at_precision("float32")
    expected = classifier.logits(images)
    torch.testing.assert_close(quick.logits(images), expected, rtol=1e-4, atol=1e-5)
    for name, value in classifier.network.state_dict().items():
        assert torch.equal(value, before[name])
    copied = quick._accelerated[torch.float32]
    assert copied is not None
    return copied


@pytest.mark.parametrize("kind", NETWORKS)
def test_logits_and_gradients_are_those_of_the_network(kind: str, images: Tensor) -> None:
    classifier = make_classifier(kind)
    check_same(classifier, images)
    gradients = []
    for view in (classifier, classifier.at_precision("float32")):
        x = images.clone().requires_grad_()
        (g,) = torch.autograd.grad(view.logits(x)[:, 1].sum(), x)
        gradients.append(g)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


def test_only_batch_norms_that_belong_to_one_convolution_are_folded(images: Tensor) -> None:
    quick = check_same(ol.Classifier(with_norms(), "relu", size=32), images)
    left = {n for n, m in quick.module.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert left == {"bn2", "bn3", "bn4"}
    # The pooling comes before the relu in both places.
    assert isinstance(quick.module.relu, nn.MaxPool2d)
    assert isinstance(quick.module.pool, nn.ReLU)
    assert isinstance(quick.module.act, nn.MaxPool2d)


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "efficientnet_b0", "densenet121"])
def test_real_architectures(name: str) -> None:
    torch.manual_seed(0)
    network = timm.create_model(name).eval()
    for module in network.modules():  # statistics that are not those of an untrained network
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    quick = check_same(ol.Classifier(network, size=64), make_images(2, 64, 64))
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in quick.module.modules())
    assert norms < sum(isinstance(m, nn.BatchNorm2d) for m in network.modules())


@pytest.mark.parametrize("kind", NETWORKS)
def test_bfloat16_is_rough_and_its_logits_still_change_finely(kind: str, images: Tensor) -> None:
    classifier = make_classifier(kind)
    rough = classifier.at_precision("bfloat16")
    y = classifier.logits(images)
    difference = (rough.logits(images) - y).abs().max()
    assert 0 < difference < 0.05 * y.abs().max()
    assert rough.logits(images).dtype == torch.float32
    # Eight binary digits would leave at most 2 * 256 values between −2 and 2, mostly equal ones.
    logits = rough.logits(make_images(200))[:, 0]
    assert len(logits.unique()) > 150


def test_a_quick_view_makes_the_others_as_the_network_does() -> None:
    classifier = make_classifier("cnn")
    rough = classifier.at_precision("bfloat16")
    assert rough.at_precision("float32").precision == torch.float32
    assert classifier.at_precision("float32").precision == torch.float32


def test_only_exact_passes_on_a_gpu_want_the_channels_first() -> None:
    gpu = torch.device("cuda")
    assert precision.memory_format(CPU, torch.float32) == torch.channels_last
    assert precision.memory_format(CPU, torch.bfloat16) == torch.channels_last
    assert precision.memory_format(gpu, torch.bfloat16) == torch.channels_last
    assert precision.memory_format(gpu, torch.float32) == torch.contiguous_format


def test_masked_logits_and_their_gradients(images: Tensor) -> None:
    classifier = make_classifier("cnn")
    s = torch.rand(3, 1, 32, 32)
    for normalize in (True, False):
        view = ol.Classifier(
            classifier.network, "4", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1), size=32,
            device="cpu", normalize=normalize,
        )  # fmt: skip
        results = []
        for masked in (True, False):
            x, m = images.clone().requires_grad_(), s.clone().requires_grad_()
            y = view.logits(x, m) if masked else view.logits(x * m)
            results.append((y, *torch.autograd.grad(y[:, 2].sum(), (x, m))))
        for ours, plain in zip(*results, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


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
    return [getattr(where, name) for where, name in precision._SWITCHES]


def test_float32_is_exact_on_a_gpu_and_the_switches_are_put_back() -> None:
    before, gpu = switches(), torch.device("cuda", 0)
    assert before != precision._EXACT
    with exact(CPU):
        assert switches() == before
    with exact(gpu):
        with exact(gpu):
            assert switches() == precision._EXACT
        assert switches() == precision._EXACT
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
    assert switches() == precision._EXACT
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

    for module in (ol.classifier, ol.methods):
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


@pytest.mark.parametrize("needed", [False, True])
def test_autocast_only_where_it_is_needed(
    needed: bool, images: Tensor, capfd: pytest.CaptureFixture[str]
) -> None:
    class Through(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float() if needed else x

    layers = list(make_classifier("cnn").network)
    network = nn.Sequential(*layers[:2], Through(), *layers[2:])
    classifier = ol.Classifier(network, "3", size=32, device="cpu")
    rough = classifier.at_precision("bfloat16")
    y = rough.logits(images)
    assert rough._accelerated[torch.bfloat16]._autocast is needed
    torch.testing.assert_close(y, classifier.logits(images), rtol=0, atol=0.05)
    assert capfd.readouterr() == ("", "")  # of the trial nobody hears


class Float32Only(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise RuntimeError("not implemented for 'BFloat16'")
        return x


def test_a_network_that_fails_in_bfloat16(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = list(copy.deepcopy(make_classifier("cnn").network))
    network = nn.Sequential(*layers[:4], Float32Only(), *layers[4:])
    classifier = ol.Classifier(network, "3", size=32, device="cpu")
    monkeypatch.setattr(precision, "_multiplies_bfloat16", lambda device: True)
    auto = classifier.at_precision("auto")
    assert auto.precision == torch.float32
    torch.testing.assert_close(auto.logits(images), classifier.logits(images))
    with pytest.raises(ValueError, match=r"fails in bfloat16.*use precision='auto' or 'float32'"):
        classifier.at_precision("bfloat16")


def test_a_network_without_parameters(images: Tensor) -> None:
    network = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    classifier = ol.Classifier(network, layer="0", size=32, device="cpu")
    rough = classifier.at_precision("bfloat16")
    torch.testing.assert_close(rough.logits(images), classifier.logits(images), atol=0.02, rtol=0)


def test_the_copy_is_made_once_and_shared_by_all_cuts() -> None:
    classifier = make_classifier("cnn")
    one = classifier.at_precision("float32")
    two = classifier.at("1").at_precision("float32")
    assert one._accelerated[torch.float32] is two._accelerated[torch.float32]
    assert classifier.precision is None
    assert one.at("1").precision == torch.float32


def test_images_at_once_follow_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = make_classifier("cnn")

    def free(number: float) -> None:
        memory = type("Memory", (), {"available": number})
        monkeypatch.setattr("psutil.virtual_memory", lambda: memory)

    free(2**34)
    assert classifier.images_at_once() == 32
    assert classifier._traced.largest == 3 * 32 * 32  # the image; 8 maps of 16×16 are fewer
    for more, number in {2**20: 8, 2**18: 16, 2**17: 32}.items():
        monkeypatch.setattr(classifier._traced, "largest", more)
        assert classifier.images_at_once() == number
    monkeypatch.setattr(classifier._traced, "largest", 2**18)
    assert classifier.images_at_once((64, 32)) == 8
    free(0)
    assert classifier.images_at_once() == 1
    each = 8 * classifier._traced.values
    free(4 * each * 3.5)
    assert classifier.images_at_once() == 3
    assert classifier.images_at_once((64, 32)) == 1


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_pickled_classifier_keeps_its_precision(precision: str, images: Tensor) -> None:
    quick = make_classifier("cnn").at_precision(precision)
    other = pickle.loads(pickle.dumps(quick))
    assert other.precision == quick.precision == getattr(torch, precision)
    assert torch.equal(other.logits(images), quick.logits(images))
