"""ADCC against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_classifier
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import opticam_lite as ol
from opticam_lite import metrics


def slow_adcc(p: float, o: float, S: np.ndarray, again: np.ndarray) -> float:
    a, b = S.ravel(), again.ravel()
    r = 0.0 if a.std() == 0 or b.std() == 0 else float(np.corrcoef(a, b)[0, 1])
    coherency, complexity = (r + 1) / 2, a.mean()
    drop = max(p - o, 0) / p if p > 0 else 0.0
    if coherency == 0 or complexity == 1 or drop == 1:
        return 0.0
    return 3 / (1 / coherency + 1 / (1 - complexity) + 1 / (1 - drop))


fraction = st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.0, 1.0]))


@given(fraction, fraction, st.integers(0, 2**31), st.booleans())
def test_adcc(p: float, o: float, seed: int, alike: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    S, again = torch.rand(2, 1, 1, 6, 7, generator=generator)
    again = S**2 if alike else again
    value = float(metrics.adcc([p], [o], S, again))
    expected = slow_adcc(p, o, S.double().numpy(), again.double().numpy())
    assert value == pytest.approx(expected, abs=1e-9)
    assert 0 <= value <= 1


ramp = torch.arange(16.0).view(1, 1, 4, 4) / 15
flat = torch.full((1, 1, 4, 4), 0.3)


@pytest.mark.parametrize(
    ("p", "o", "S", "again", "expected"),
    [
        (0.5, 0.0, ramp, ramp, 0.0),  # all is dropped
        (0.5, 0.5, ramp, 1 - ramp, 0.0),  # the contrary is coherent with nothing
        (0.5, 0.5, flat / 0.3, flat, 0.0),  # the whole image: nothing could be more complex
        (0.0, 0.0, ramp, ramp, 3 / (1 + 1 / 0.5 + 1)),  # no drop from 0
        (0.5, 0.5, flat, ramp, 3 / (1 / 0.5 + 1 / 0.7 + 1)),  # a flat map: r = 0
        (0.5, 0.5, 0 * flat, 0 * flat, 3 / (1 / 0.5 + 1 + 1)),
        (1.0, 1.0, ramp, ramp, 3 / (1 + 1 / 0.5 + 1)),
    ],
)
def test_limits_of_adcc(p: float, o: float, S: Tensor, again: Tensor, expected: float) -> None:
    assert float(metrics.adcc([p], [o], S, again)) == pytest.approx(expected, abs=1e-6)


def test_adcc_is_a_fraction_for_masks_off_by_rounding() -> None:
    S = torch.full((1, 1, 4, 4), 1 + 9e-7)
    assert float(metrics.complexity(S)) == 1
    assert float(metrics.adcc([0.5], [0.5], S, S)) == 0
    assert float(metrics.complexity(torch.full((1, 1, 4, 4), -9e-7))) == 0
    # Of some of these maps r is 1 + 2e-16, or the opposite.
    S = torch.rand(300, 1, 6, 7, generator=torch.Generator().manual_seed(0))
    assert (metrics.coherency(S, S) <= 1).all()
    assert (metrics.coherency(S, 1 - S) >= 0).all()


@pytest.mark.parametrize("name", ["ADCC", "ADCC-target"])
def test_which_class_is_explained_again(name: str, images: Tensor, targets: Tensor) -> None:
    """ADCC is of the predicted class, as in its authors' code; ADCC-target of the targets."""
    network = make_classifier("cnn")
    asked: list[tuple[Tensor, Tensor]] = []

    def explain(images: Tensor, targets: Tensor) -> Tensor:
        asked.append((images, targets))
        return ol.explain("grad-cam", network, images, targets)

    S, predicted = ol.explain("grad-cam", network, images, targets), network.predict(images)
    assert 0 < (predicted != targets).sum() < len(targets)
    p, o = ol.masked_probabilities(network, images, S, targets)
    boxes = [torch.zeros(0, 4)] * 3
    case = metrics.Case(network, images, targets, predicted, S, p, o, boxes, explain)
    values = metrics.METRICS[name].per_image(case)
    c = predicted if name == "ADCC" else targets
    S = ol.explain("grad-cam", network, images, c)
    p, o = ol.masked_probabilities(network, images, S, c)
    masked, classes = asked[-1]
    torch.testing.assert_close(masked, images * S)
    assert torch.equal(classes, c)
    again = explain(images * S, c).double().numpy()
    expected = [
        100 * slow_adcc(*v)
        for v in zip(p.tolist(), o.tolist(), S.double().numpy(), again, strict=True)
    ]
    assert values.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("p", "masks", "again", "message"),
    [
        (50.0, ramp, ramp, "not percent"),
        (0.5, 2 * ramp, ramp, r"values in \[0, 1\] are needed"),
        (0.5, ramp, ramp[..., :2], "need masks of shape"),
    ],
)
def test_bad_input(p: float, masks: Tensor, again: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.adcc([p], [0.5], masks, again)
