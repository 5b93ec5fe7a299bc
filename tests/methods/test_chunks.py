"""Score-CAM and Ablation-CAM run many channels of an image, some at a time."""

from __future__ import annotations

import pytest
import torch
from conftest import make_classifier, make_images
from references import mask
from test_ablation_cam import reference_ablation_cam
from test_score_cam import reference_score_cam

import opticam_lite as ol

BOTH = pytest.mark.parametrize(("method", "layer"), [("score-cam", "0"), ("ablation-cam", "7")])
REFERENCES = {"score-cam": reference_score_cam, "ablation-cam": reference_ablation_cam}


class Counter:
    """Counts the images that a layer saw, by batch."""

    def __init__(self, classifier: ol.Classifier, layer: str) -> None:
        self.batches: list[int] = []
        module = classifier.network.get_submodule(layer)
        module.register_forward_hook(lambda m, inputs, y: self.batches.append(len(inputs[0])))


@BOTH
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


@BOTH
def test_the_callback_sees_every_chunk(method: str, layer: str) -> None:
    steps: list[ol.methods.Step] = []
    ol.explain(
        method, make_classifier("cnn"), make_images(3), [0, 3, 1], chunk=7, callback=steps.append
    )
    assert [(s.index, s.total) for s in steps] == [(i, 6) for i in range(1, 7)]  # 12 channels each


@BOTH
def test_flat_channels_cost_nothing(method: str, layer: str) -> None:
    """What is 0 takes nothing away, and all flat masks give the same black image: one pass."""
    classifier = make_classifier("cnn")
    norm = classifier.network[3]
    norm.bias[:5] = -100.0  # five maps that the relu makes 0
    images, targets = make_images(3), torch.tensor([0, 3, 1])
    live = int((classifier.features(images).amax((2, 3)) > 0).sum())
    assert live <= 3 * 7
    expected = [
        mask(REFERENCES[method](classifier, x, int(c)), x.shape)
        for x, c in zip(images, targets, strict=True)
    ]
    counter = Counter(classifier, layer)
    classifier.quick("float32")  # its trial passes are made once a network
    counter.batches.clear()
    masks = ol.explain(method, classifier, images, targets)
    # Features and black; the whole head, for `explain`'s check of the logits and for the method.
    once = {"score-cam": 3 + 1, "ablation-cam": 3 + 3}[method]
    assert sum(counter.batches) == live + once
    torch.testing.assert_close(masks[:, 0], torch.stack(expected), rtol=0, atol=2e-3)
