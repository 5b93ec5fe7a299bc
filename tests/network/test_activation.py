"""Networks with several labels an image; outputs that are probabilities already; no head at all."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
from conftest import cnn, make_classifier, vit
from test_every_method import OPTIONS
from torch import Tensor, nn

import opticam_lite as ol
from opticam_lite import metrics
from opticam_lite.evaluation.store import StoreError
from opticam_lite.explorer.controller import Controller


def multi_label(classes: int = 5, **arguments: object) -> ol.Classifier:
    network = cnn(classes)
    network[-1].weight.data *= 8  # so that probabilities differ
    return ol.Classifier(network, "4", size=32, device="cpu", activation="sigmoid", **arguments)


def p_of(classifier: ol.Classifier, images: Tensor, c: Tensor | int) -> Tensor:
    y = classifier.logits(images)
    chosen = torch.as_tensor(c).expand(len(images))[:, None]
    return 1 / (1 + (-y.gather(1, chosen)[:, 0]).exp())


def test_probabilities_are_each_class_s_own(images: Tensor, targets: Tensor) -> None:
    classifier = multi_label()
    p = classifier.probabilities(images)
    torch.testing.assert_close(p, torch.sigmoid(classifier.logits(images)))
    assert (p.sum(1) - 1).abs().min() > 0.1
    torch.testing.assert_close(classifier.predict(images), classifier.logits(images).argmax(1))
    mask = torch.rand(3, 1, 32, 32)
    p, o = ol.masked_probabilities(classifier, images, mask, targets)
    torch.testing.assert_close(p, p_of(classifier, images, targets))
    torch.testing.assert_close(o, p_of(classifier, images * mask, targets))


def test_the_activation_stays_with_the_classifier(images: Tensor) -> None:
    classifier = multi_label()
    for same in (
        classifier.at("1"), classifier.remember(images), pickle.loads(pickle.dumps(classifier)),
        ol.Classifier(**classifier.rebuild_arguments()), classifier.with_network(cnn()),
        ol.load_model("scenes_resnet", activation="sigmoid"),
    ):  # fmt: skip
        assert same.activation == "sigmoid"
    assert make_classifier("cnn").activation == "softmax"
    with pytest.raises(ValueError, match="unknown activation 'sigmoids'; did you mean 'sigmoid'"):
        ol.Classifier(cnn(), size=32, activation="sigmoids")


@pytest.mark.parametrize(
    ("selector", "objective"),
    [
        ("logit", lambda y, c: y[c]),
        ("probability", lambda y, c: y[c].sigmoid()),
        ("log-probability", lambda y, c: y[c].sigmoid().log()),
        ("margin", lambda y, c: y[c] - max(v for i, v in enumerate(y) if i != c)),
    ],
)
@pytest.mark.parametrize("method", ["opti-cam", "extremal-perturbation"])
def test_selectors(method: str, selector: str, objective: object, images: Tensor) -> None:
    classifier, steps = multi_label(), []
    options = {**OPTIONS[method], "levels": 2, "jitter": False, "precision": "float32"}
    options = {k: v for k, v in options.items() if k in ol.methods.METHODS[method].options}
    ol.explain(
        method, classifier, images[:1], 1, selector=selector, callback=steps.append, **options
    )
    for step in steps:
        if method == "extremal-perturbation":
            from opticam_lite.methods.extremal_perturbation import perturb, pyramid

            y = pyramid(images[:1], 2, 20.0)
            shown = perturb(y, torch.tensor([0]), step.saliency)
        else:
            shown = images[:1] * step.masks()
        expected = objective(classifier.logits(shown)[0].double(), 1)
        torch.testing.assert_close(step.objective[0].double(), expected, rtol=1e-4, atol=1e-5)
    assert steps


def test_fast_opti_cam_maximises_the_class_s_own_log_odds(images: Tensor) -> None:
    classifier, steps = multi_label(), []
    ol.explain("opti-cam-fast", classifier, images, 2, passes=4, precision="float32",
               callback=steps.append)  # fmt: skip
    for step in steps:
        p = p_of(classifier, images * step.masks(), 2)
        torch.testing.assert_close(step.objective, (p / (1 - p)).log(), rtol=1e-3, atol=1e-4)


def test_metrics_and_rows(images: Tensor, targets: Tensor, tmp_path: Path) -> None:
    classifier = multi_label()
    masks = ol.explain("opti-cam", classifier, images, targets, iterations=3)
    p = p_of(classifier, images, targets)
    o = p_of(classifier, images * masks, targets)
    black = p_of(classifier, images * 0, targets)
    for metric, first, last in (
        (metrics.deletion, p, black), (metrics.aopc, p, None), (metrics.insertion, None, p)
    ):  # fmt: skip
        values = metric(classifier, images, masks, targets).values
        for at, expected in ((0, first), (-1, last)):
            if expected is not None:
                torch.testing.assert_close(values[:, at], expected.double(), rtol=0, atol=1e-5)
    dataset = ol.Images(images, targets)
    methods = {"opti-cam": {"iterations": 3}}
    names = ["AD", "AG", "AI", "ADCC", "SM"]
    frame = ol.evaluate(classifier, dataset, methods, names, progress=False, out=tmp_path)
    rows = frame[frame["metric"] == "AD"]
    torch.testing.assert_close(torch.tensor(rows["p"].to_numpy()), p.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.tensor(rows["o"].to_numpy()), o.double(), rtol=0, atol=1e-5)
    drop = 100 * metrics.drop(p, o)
    torch.testing.assert_close(torch.tensor(rows["value"].to_numpy()), drop, rtol=0, atol=1e-3)
    softmax = ol.Classifier(**classifier.rebuild_arguments() | {"activation": "softmax"})
    with pytest.raises(StoreError, match="activation"):
        ol.evaluate(softmax, dataset, methods, names, progress=False, out=tmp_path)


def test_the_explorer_and_the_trace_show_them(images: Tensor) -> None:
    classifier = multi_label(labels=list("abcde"))
    with_one = Controller({"tiny": classifier}, images, pace=0, preview=3600)
    with_one.choose(method="grad-cam", target=2)
    with_one.start()
    assert with_one.join(60)
    result = with_one.state.result
    assert result.before == pytest.approx(p_of(classifier, images[:1], 2).item(), abs=1e-6)
    shown = classifier.logits(images[:1] * result.mask)[0]
    assert result.top_after[0][1] == pytest.approx(shown.sigmoid().max().item(), abs=1e-6)
    trace = ol.Trace(classifier, images, 2)
    ol.explain("opti-cam", classifier, images, 2, iterations=3, callback=trace)
    for t, mask in trace.masks(1).items():
        expected = p_of(classifier, images[1:2] * mask, 2).item()
        assert trace.probabilities(1)[t] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_one_logit(kind: str, images: Tensor) -> None:
    network = {"cnn": cnn, "vit": vit}[kind](1)
    for parameter in list(network.parameters())[-2:]:
        parameter.data *= 20
    with pytest.raises(ValueError, match=r"one logit, .* always 1 .*; pass activation='sigmoid'"):
        ol.Classifier(network, size=32)
    classifier = ol.Classifier(network, size=32, device="cpu", activation="sigmoid")
    methods = [m for m, why in ol.methods.applicable(classifier).items() if why is None]
    for method in methods:
        masks = ol.explain(method, classifier, images, **OPTIONS.get(method, {}))
        assert masks.isfinite().all()
    with pytest.raises(ValueError, match="one logit, and a margin needs two"):
        ol.explain("opti-cam", classifier, images, selector="margin", iterations=1)


class Ends(nn.Module):
    """The small network with something behind its logits."""

    def __init__(self, end: object, classes: int = 5) -> None:
        super().__init__()
        self.body, self.end = cnn(classes), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.body(x))


@pytest.mark.parametrize(
    "end",
    [
        nn.Sigmoid(),
        nn.Hardsigmoid(),
        torch.sigmoid,
        lambda y: y.sigmoid().unflatten(1, (5, 1)).flatten(1),
        lambda y: y.softmax(1)[:, 1:],
        lambda y: torch.cat([y[:, :2].sigmoid(), y[:, 2:].sigmoid()], 1).clamp(1e-6, 1),
    ],
)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_outputs_that_are_probabilities_are_refused(end: object, activation: str) -> None:
    with pytest.raises(
        ValueError, match=re.escape("leave out its last sigmoid and pass activation='")
    ):
        ol.Classifier(Ends(end), "body.4", size=32, activation=activation)
    for classes in (1, 2):
        with pytest.raises(ValueError, match="returns probabilities"):
            ol.Classifier(Ends(torch.sigmoid, classes), "body.4", size=32, activation="sigmoid")


def test_a_last_layer_of_zeros_costs_no_further_run() -> None:
    network = cnn()
    nn.init.zeros_(network[-1].weight)
    nn.init.zeros_(network[-1].bias)
    runs = []
    network[0].register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    ol.Classifier(network, "4", size=32, device="cpu", copy=False)
    assert runs
    assert not any(runs)  # the search for a last sigmoid needs gradients


def test_logits_that_happen_to_lie_in_the_range_are_not(images: Tensor) -> None:
    network = cnn(2)
    network[-1].weight.data *= 1e-3
    network[-1].bias.data[:] = torch.tensor([0.3, 0.6])
    y = ol.Classifier(network, "4", size=32).logits(images)
    assert y.min() > 0
    assert y.max() < 1
    network[-1].weight.data.zero_()  # before training
    network[-1].bias.data.zero_()
    for activation in ("softmax", "sigmoid"):
        ol.Classifier(network, "4", size=32, activation=activation)
    gated = nn.Sequential(*cnn()[:5], nn.Sigmoid(), *cnn()[5:])
    ol.Classifier(gated, "4", size=32)


@pytest.mark.parametrize(
    "name", ["vit_small_patch14_dinov2", "vit_base_patch16_siglip_224.webli", "resnet50_clip"]
)
def test_networks_without_a_classifier_are_refused(name: str) -> None:
    for weights in ("hub", "random"):
        with pytest.raises(ValueError, match=f"{name} has no classifier: .*num_classes=…"):
            ol.load_model(name, weights=weights)


def test_a_network_that_says_it_has_no_classes_is_refused() -> None:
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)
    with pytest.raises(ValueError, match=r"has no classifier .* build it with num_classes=…"):
        ol.Classifier(network, size=32)
    with_head = nn.Sequential(network, nn.Linear(192, 3))
    assert ol.Classifier(with_head, size=32).classes == 3


def test_networks_with_classes_are_not_refused() -> None:
    from opticam_lite.models import _check_head

    refused = []
    for name in timm.list_models(pretrained=True):
        try:
            _check_head(name)
        except ValueError:
            refused.append(name)
    sizes = {timm.get_pretrained_cfg(name).num_classes for name in refused}
    assert sizes == {0, 384, 512, 640, 768, 1024, 1152, 1280}
    assert not any(re.search(r"in1k|in21k|in22k|in12k", n.replace("_mim", "")) and
                   timm.get_pretrained_cfg(n).num_classes for n in refused)  # fmt: skip
