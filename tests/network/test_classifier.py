"""A classifier normalises inside, is frozen, and refuses bad input in one clear sentence."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import cnn, make_classifier, make_images
from torch import nn

import opticam_lite as ol
from opticam_lite import metrics
from opticam_lite.network import ablation

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def test_normalisation_is_inside(images: torch.Tensor) -> None:
    network = cnn().eval()
    classifier = ol.Classifier(network, "4", mean=MEAN, std=STD, size=32)
    normalised = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(classifier.logits(images), network(normalised))
    plain = ol.Classifier(network, "4", mean=MEAN, std=STD, size=32, normalize=False)
    torch.testing.assert_close(plain.logits(images), network(images))


def test_the_users_network_stays_as_it_is(images: torch.Tensor) -> None:
    network = cnn().train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    classifier = ol.Classifier(network, "4", size=32)
    ol.explain("opti-cam", classifier, images, [0, 1, 2], iterations=2)
    assert network.training
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert not classifier.network.training
    assert not any(p.requires_grad for p in classifier.network.parameters())


def test_a_network_given_away_is_not_copied(images: torch.Tensor) -> None:
    network = cnn().train()
    expected = ol.Classifier(network, "4", size=32).logits(images)
    classifier = ol.Classifier(network, "4", size=32, copy=False)
    assert classifier.network is network
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    torch.testing.assert_close(classifier.logits(images), expected)
    assert copy.deepcopy(classifier).network is not network


def test_probabilities_and_predictions(images: torch.Tensor, classifier: ol.Classifier) -> None:
    logits = classifier.logits(images)
    p = classifier.probabilities(images, batch_size=2)
    torch.testing.assert_close(p, logits.softmax(1))
    assert p.dtype == torch.float32
    assert not p.requires_grad
    assert classifier.predict(images).tolist() == logits.argmax(1).tolist()
    assert classifier.predict(images).dtype == torch.int64
    with pytest.raises(ValueError, match=r"values from .* to 255; RGB in \[0, 1\] is needed"):
        classifier.predict(images * 255 / images.amax())


def test_at_cuts_the_same_network_elsewhere(images: torch.Tensor) -> None:
    classifier = make_classifier("cnn")
    other = classifier.at("1")
    assert (classifier.layer, other.layer) == ("4", "1")
    assert other.network is classifier.network
    assert classifier.features(images).shape == (3, 12, 8, 8)
    assert other.features(images).shape == (3, 8, 16, 16)
    assert other.layer_shape() == (8, 16, 16)
    assert other.layer_shape("4") == (12, 8, 8)


def test_labels(classifier: ol.Classifier) -> None:
    assert classifier.labels == [f"class {c}" for c in range(5)]
    named = ol.Classifier(cnn(), "4", size=32, labels=list("abcde"), name="mine")
    assert named.labels == list("abcde")
    of_array = ol.Classifier(cnn(), "4", size=32, labels=np.array(list("abcde")))
    assert of_array.labels == list("abcde")
    assert repr(named).startswith("Classifier('mine', layer='4': 12 maps of 8×8, 5 classes")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": ["a"]}, "1 labels were given for a network of 5 classes"),
        ({"mean": (0.5,)}, "mean must have three values"),
        ({"std": (1, 1, 0)}, "std must be positive"),
        ({"device": "abacus"}, "device 'abacus' can't be used here"),
        ({"layer": "nowhere"}, "unknown layer 'nowhere'"),
        ({"size": 32.5}, "size is 32.5; a whole number ≥ 1 is needed"),
        ({"size": (32, 32, 3)}, "size is (32, 32, 3); a side or (height, width) is needed"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ol.Classifier(cnn(), **{"size": 32, **arguments})


def test_wrappers_are_taken_off(images: torch.Tensor) -> None:
    network = cnn().eval()
    for wrapper in (nn.DataParallel, torch.compile):
        classifier = ol.Classifier(wrapper(network), "4", size=32, device="cpu")
        assert classifier.name == "Sequential"
        torch.testing.assert_close(classifier.logits(images), network(images))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_networks_that_cannot_be_copied_or_mean_nothing() -> None:
    trunk = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3)))
    whole = nn.Sequential(trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for network in (trunk, whole):
        with pytest.raises(ValueError, match="holds TorchScript, which can't be traced; pass the"):
            ol.Classifier(network, "0", size=32)
    quantised = cnn()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such layers are to leave PyTorch
        quantised.append(torch.ao.nn.quantized.dynamic.Linear(5, 5))
    with pytest.raises(ValueError, match=r"quantised layers \(Linear\), which can't be different"):
        ol.Classifier(quantised, size=32)
    left_over = cnn()
    left_over.losses = [left_over(torch.zeros(1, 3, 32, 32)).sum()]
    with pytest.raises(ValueError, match=r"can't be copied .*; pass a network that was just built"):
        ol.Classifier(left_over, size=32)
    with pytest.raises(ValueError, match="gives one logit, and the probability of a single class"):
        ol.Classifier(cnn(1), size=32)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm]
)
def test_weights_that_are_computed(norm: Callable, images: torch.Tensor) -> None:
    """Old norms keep a computed weight, which has no copy; the values are not folded away."""
    network = cnn()
    network.insert(5, nn.Conv2d(12, 6, 1))  # read by ablation
    network[8] = nn.Linear(6, 5)
    for i in (2, 5):
        network[i] = norm(network[i])
    nn.init.uniform_(network[3].weight, 0.5, 2)
    network(images).sum()  # another computed weight
    network.eval()
    network.loss = network(images).sum()  # left over
    before = [(name, p.requires_grad) for name, p in network.named_parameters()]
    classifier = ol.Classifier(network, "4", size=32, device="cpu")
    assert before == [(name, p.requires_grad) for name, p in network.named_parameters()]
    expected = network(images).detach()
    assert classifier.pointwise_reader == "5"
    torch.testing.assert_close(classifier.logits(images), expected)
    torch.testing.assert_close(classifier.quick("float32").logits(images), expected)
    A, rest = classifier.split(images[:1])
    without = A.index_fill(1, torch.tensor(3), 0)
    torch.testing.assert_close(
        ablation(classifier, A, rest)(torch.tensor([3])), classifier.head(without, rest)
    )


def test_the_users_images_stay_as_they_are(images: torch.Tensor) -> None:
    """The network may work in place on its input, and without normalisation that is the images."""
    network = nn.Sequential(nn.Threshold(0.5, 0, inplace=True), *cnn()).eval()
    classifier = ol.Classifier(network, "5", size=32, normalize=False, device="cpu")
    own = images.contiguous(memory_format=torch.channels_last)
    for run in (classifier.logits, classifier.features, classifier.quick("float32").logits):
        run(own)
        assert torch.equal(own, images)


def test_a_classifier_made_in_inference_mode_can_be_explained(images: torch.Tensor) -> None:
    with torch.inference_mode():
        classifier = ol.Classifier(cnn().eval(), "4", size=32, device="cpu")
        masks = ol.explain("grad-cam", classifier, images, 0)
    torch.testing.assert_close(masks, ol.explain("grad-cam", classifier, images, 0))


def test_a_quick_copy_made_in_inference_mode_can_be_differentiated(images: torch.Tensor) -> None:
    classifier = ol.Classifier(cnn().eval(), "4", size=32, device="cpu")
    with torch.inference_mode():
        metrics.deletion(classifier, images, torch.rand(len(images), 1, 32, 32))
    assert ol.explain("opti-cam", classifier, images, 0, iterations=1).isfinite().all()


def test_weights_of_five_dimensions(images: torch.Tensor) -> None:
    class Across(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Conv3d(1, 1, (3, 1, 1), padding=(1, 0, 0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mix(x[:, None])[:, 0]

    network = nn.Sequential(Across(), *cnn()).eval()
    classifier = ol.Classifier(network, "5", size=32, device="cpu")
    torch.testing.assert_close(classifier.logits(images), network(images))
    quick = classifier.quick("float32")
    assert quick.dtype == torch.float32
    torch.testing.assert_close(quick.logits(images), network(images))


def test_a_network_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"use load_model\(name\)"):
        ol.Classifier("resnet50")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(32, 32), ValueError, "(N, 3, H, W) is needed"),
        (torch.zeros(2, 1, 32, 32), ValueError, "is needed: use images.expand(-1, 3, -1, -1)"),
        (torch.zeros(2, 4, 32, 32), ValueError, "is needed: use images[:, :3]"),
        (torch.zeros(2, 32, 32, 3), ValueError, "is needed: use images.permute(0, 3, 1, 2)"),
        (np.zeros((2, 3, 32, 32)), TypeError, "torch.from_numpy one of an array"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), TypeError, "use images / 255"),
        (torch.full((1, 3, 32, 32), 2.0), ValueError, "the classifier normalises inside"),
        (torch.full((1, 3, 32, 32), -0.1), ValueError, "RGB in [0, 1] is needed"),
        (torch.full((1, 3, 32, 32), torch.nan), ValueError, "values from nan"),
        ([[0.0]], TypeError, "images must be a torch.Tensor"),
    ],
)
def test_bad_images(images: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ol.explain("grad-cam", make_classifier("cnn"), images, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ([0, 1], ValueError, "targets have shape (2,); 3 images need shape (3,)"),
        ([0, 1, 5], ValueError, "target 5 is no class of"),
        ([0, 1, -1], ValueError, "target -1 is no class of"),
        ([0.0, 1.0, 2.0], TypeError, "class indices (int64) are needed"),
    ],
)
def test_bad_targets(targets: list, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ol.explain("grad-cam", make_classifier("cnn"), make_images(), targets)


def test_one_target_serves_for_all_and_none_means_the_prediction(images: torch.Tensor) -> None:
    classifier = make_classifier("cnn")
    one = ol.explain("grad-cam", classifier, images, 2)
    torch.testing.assert_close(one, ol.explain("grad-cam", classifier, images, [2, 2, 2]))
    predicted = ol.explain("grad-cam", classifier, images, classifier.predict(images))
    torch.testing.assert_close(ol.explain("grad-cam", classifier, images), predicted)


def test_float64_images_are_welcome(images: torch.Tensor) -> None:
    classifier = make_classifier("cnn")
    masks = ol.explain("grad-cam", classifier, images.double(), 0)
    assert masks.dtype == torch.float32


def test_a_network_of_one_convolution_is_enough(images: torch.Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    classifier = ol.Classifier(network, "0", size=32)
    assert ol.explain("grad-cam", classifier, images, 0).shape == (3, 1, 32, 32)


def test_another_network_with_all_else_the_same(images: torch.Tensor) -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    one = ol.Classifier(
        cnn(), "1", mean=mean, std=std, labels=list("abcde"), size=(32, 40), device="cpu",
        preprocessing=ol.Preprocessing((32, 40), 50, "bicubic"), normalize=True, name="mine",
        activation="sigmoid",
    )  # fmt: skip
    network = cnn()
    for parameter in network.parameters():
        parameter.data = torch.rand_like(parameter) - 0.5
    other = one.with_network(network)
    for name in (
        *("mean", "std", "labels", "size", "preprocessing", "layer", "device", "normalize"),
        *("activation", "name"),
    ):
        assert getattr(other, name) == getattr(one, name), name
    assert (other.mean, other.std) == (mean, std)
    x = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(other.logits(images), network.eval()(x), rtol=1e-4, atol=1e-5)
    assert (other.logits(images) - one.logits(images)).abs().max() > 0.01
    torch.testing.assert_close(one.with_network(cnn()).logits(images), one.logits(images))
    wrapped = one.with_network(nn.DataParallel(network))
    torch.testing.assert_close(wrapped.logits(images), other.logits(images))
    assert one.with_network(nn.Sequential(nn.Sequential(*cnn()))).layer == "0.4"
    with pytest.raises(ValueError, match="5 labels were given for a network of 3 classes"):
        one.with_network(cnn(3))
