"""The trace of an optimisation holds what the run told, image by image."""

from __future__ import annotations

import pytest
import torch
from conftest import make_classifier
from torch import Tensor

import opticam_lite as ol
from opticam_lite import trace as module

OPTIONS = {"iterations": 7, "precision": "float32"}


@pytest.fixture
def cnn() -> ol.Classifier:
    return make_classifier("cnn")


@pytest.mark.parametrize("batch_size", [2, 3])
def test_a_trace_holds_what_each_image_went_through(
    cnn: ol.Classifier, images: Tensor, targets: Tensor, batch_size: int
) -> None:
    trace = ol.Trace(cnn, images, targets)
    ol.explain("opti-cam", cnn, images, targets, batch_size=batch_size, callback=trace, **OPTIONS)
    for i in range(3):
        steps: list[ol.methods.Step] = []
        ol.explain("opti-cam", cnn, images[[i]], targets[[i]], iterations=7, callback=steps.append)
        expected = torch.cat([step.objective for step in steps])
        torch.testing.assert_close(trace.objective(i), expected, rtol=0, atol=1e-4)
        masks, p = trace.masks(i), trace.probabilities(i)
        assert list(masks) == list(p) == [1, 2, 3, 4, 5, 6, 7]
        for step in steps:
            mask = step.masks()
            torch.testing.assert_close(masks[step.index][None], mask, rtol=0, atol=1e-3)
            _, o = ol.masked_probabilities(cnn, images[[i]], mask, targets[[i]])
            assert p[step.index] == pytest.approx(o.item(), abs=1e-4)


def test_the_plot_shows_the_chosen_iterations(
    cnn: ol.Classifier, images: Tensor, targets: Tensor
) -> None:
    trace = ol.Trace(cnn, images, targets)
    ol.explain("opti-cam", cnn, images, targets, iterations=32, callback=trace)

    def drawn(picture: ol.plots.Picture) -> list[str]:
        return [ax.get_title() for ax in picture.figure.axes if ax.images]

    assert drawn(trace.plot(1)) == [f"iteration {t}" for t in (1, 2, 4, 8, 16, 32)]
    picture = trace.plot(2, at=[3, 30, 1000])
    assert drawn(picture) == ["iteration 3", "iteration 30", "iteration 32"]
    whole = cnn.probabilities(images[2:])[0, targets[2]]
    assert f"is {whole:.2f} in the whole image" in picture.alt
    assert picture.alt.startswith(f"Image 2 explained for {cnn.labels[targets[2]]}: ")


def test_long_runs_keep_few_maps_and_always_the_last(
    cnn: ol.Classifier, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAPS", 4)
    trace = ol.Trace(cnn, images[:1])  # the predicted class
    assert trace.targets.tolist() == cnn.predict(images[:1]).tolist()
    ol.explain("opti-cam", cnn, images[:1], iterations=18, tolerance=0, callback=trace)
    assert list(trace.masks()) == [1, 6, 11, 16, 18]
    assert len(trace.objective()) == 18
    assert "iteration 6" in trace.plot(at=[5]).alt


def test_a_trace_that_can_hold_nothing_says_why(
    cnn: ol.Classifier, images: Tensor, targets: Tensor
) -> None:
    trace = ol.Trace(cnn, images, targets)
    with pytest.raises(ValueError, match="pass the trace as callback="):
        trace.plot(0)
    with pytest.raises(ValueError, match="optimises nothing"):
        ol.explain("score-cam", cnn, images, targets, callback=trace)
    run = {"iterations": 2, "callback": trace}
    ol.explain("opti-cam", cnn, images, targets, **run)
    with pytest.raises(ValueError, match="holds one run, and this one has its 3 images already"):
        ol.explain("opti-cam", cnn, images, targets, **run)
    with pytest.raises(IndexError, match="image 3 is none of the 3"):
        trace.plot(3)
