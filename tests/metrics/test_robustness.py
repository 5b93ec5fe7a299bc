"""Max-sensitivity against its definition and Quantus."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_classifier, make_images, peer
from torch import Tensor, nn

import opticam_lite as ol
from opticam_lite import metrics

CNN = make_classifier("cnn")
TARGETS = torch.tensor([0, 3, 1])


def explain(images: Tensor, targets: Tensor) -> Tensor:
    return ol.explain("grad-cam", CNN, images, targets)


def draw_noise(copies: int, radius: float, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [radius * (2 * torch.rand(3, 32, 32, generator=generator) - 1) for _ in range(copies)]


def slow_max_sensitivity(image: Tensor, target: Tensor, copies: int, radius: float) -> float:
    S = explain(image[None], target[None])[0, 0].numpy()
    norm = math.sqrt((S**2).sum())
    worst = 0.0
    for noise in draw_noise(copies, radius):
        perturbed = torch.clip(image + noise, 0, 1)
        other = explain(perturbed[None], target[None])[0, 0].numpy()
        worst = max(worst, math.sqrt(((S - other) ** 2).sum()) / norm)
    return worst


def test_max_sensitivity(images: Tensor) -> None:
    S = explain(images, TARGETS)
    values = metrics.max_sensitivity(explain, images, S, TARGETS, copies=4, radius=0.1)
    expected = [slow_max_sensitivity(*pair, 4, 0.1) for pair in zip(images, TARGETS, strict=True)]
    assert values.tolist() == pytest.approx(expected, rel=1e-4)
    assert min(expected) > 0.01
    alone = metrics.max_sensitivity(
        explain, images[1:2], S[1:2], TARGETS[1:2], copies=4, radius=0.1
    )
    assert float(alone) == pytest.approx(expected[1], rel=1e-4)


def test_the_noise_is_uniform_clamped_and_the_seeds() -> None:
    seen: list[Tensor] = []

    def look(images: Tensor, targets: Tensor) -> Tensor:
        seen.append(images)
        return images[:, :1]

    images = torch.full((2, 3, 64, 64), 0.1)
    images[1] = 0.5
    state = torch.random.get_rng_state()
    metrics.max_sensitivity(look, images, images[:, :1], torch.zeros(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(seen) == 10
    change = torch.stack(seen)[:, 1] - 0.5
    assert change.abs().max() <= 0.2
    quantiles = torch.quantile(change[0].flatten(), torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99]))
    expected = torch.tensor([-0.196, -0.1, 0.0, 0.1, 0.196])
    torch.testing.assert_close(quantiles, expected, atol=0.01, rtol=0)
    assert not torch.equal(change[0], change[1])
    assert torch.stack(seen)[:, 0].amin() == 0  # dark pixels end at black
    again = metrics.max_sensitivity(look, images, images[:, :1], torch.zeros(2), seed=0)
    other = metrics.max_sensitivity(look, images, images[:, :1], torch.zeros(2), seed=1)
    assert torch.equal(torch.stack(seen[:10]), torch.stack(seen[10:20]))
    assert not torch.equal(again, other)


def test_one_copy_and_the_largest_seed(images: Tensor) -> None:
    S, seed = images[:, :1], 2**63 - 1
    value = metrics.max_sensitivity(lambda x, c: x[:, :1], images, S, TARGETS, copies=1, seed=seed)
    x = (images + draw_noise(1, 0.2, seed)[0]).clamp(0, 1)
    expected = (x - images)[:, 0].flatten(1).norm(dim=1) / S.flatten(1).norm(dim=1)
    torch.testing.assert_close(value.float(), expected)


def test_a_map_of_norm_0() -> None:
    images, zeros = make_images(2), torch.zeros(2, 1, 32, 32)
    answers = torch.stack([torch.zeros(1, 32, 32), torch.ones(1, 32, 32)])
    values = metrics.max_sensitivity(lambda x, c: answers, images, zeros, TARGETS[:2])
    assert float(values[0]) == 0  # nothing stayed nothing
    assert math.isnan(values[1])  # what became of nothing has no measure
    assert metrics.METRICS["MS"].average(values, None) == 0


def test_max_sensitivity_is_quantus(images: Tensor) -> None:
    S, noise = explain(images, TARGETS), draw_noise(10, 0.2)

    def by_quantus(clamp: bool) -> np.ndarray:
        drawn = iter(noise)

        def perturb(arr: np.ndarray, **_: Any) -> np.ndarray:
            perturbed = arr + next(drawn).numpy().reshape(1, -1)
            return perturbed.clip(0, 1) if clamp else perturbed

        measure = peer("quantus").MaxSensitivity(
            nr_samples=10, lower_bound=0.2, perturb_func=perturb, disable_warnings=True
        )
        return np.array(
            measure(
                nn.Identity(),
                images.numpy(),
                TARGETS.numpy(),
                S.numpy(),
                device="cpu",
                explain_func=lambda model, inputs, targets, **_: explain_any(inputs, targets),
            )
        )

    def explain_any(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        x = torch.as_tensor(inputs)
        # A method of this kit refuses values outside [0, 1]: to Grad-CAM's function they are fine.
        function = ol.methods.METHODS["grad-cam"].function
        return function(CNN, x, torch.as_tensor(targets)).detach().numpy()

    S = torch.from_numpy(explain_any(images.numpy(), TARGETS.numpy()))
    ours = metrics.max_sensitivity(
        lambda x, c: torch.from_numpy(explain_any(x.numpy(), c.numpy())), images, S, TARGETS
    )
    np.testing.assert_allclose(by_quantus(clamp=True), ours, rtol=1e-4)
    # It does not clamp: its images leave [0, 1], and the maps are of something that is no image.
    assert np.abs(by_quantus(clamp=False) - ours.numpy()).max() > 1e-3


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (32, {}, "need masks of shape"),
        (4, {"copies": 0}, "copies is 0"),
        (4, {"copies": 2.5}, "copies is 2.5; a whole number"),
        (4, {"radius": 0}, "radius is 0; a number > 0 is needed"),
        (4, {"radius": -0.5}, "radius is -0.5; a number > 0 is needed"),
        (4, {"radius": math.nan}, "radius is nan; a number > 0 is needed"),
        (4, {"seed": 0.5}, "seed is 0.5; a whole number"),
        (4, {"seed": -1}, "seed is -1; a whole number"),
        (4, {"seed": 2**63}, f"seed is {2**63}; a whole number"),
    ],
)
def test_bad_input(size: int, options: dict, message: str) -> None:
    masks = torch.arange(16.0).view(1, 1, 4, 4) / 15
    with pytest.raises(ValueError, match=message):
        metrics.max_sensitivity(explain, make_images(1, size, size), masks, TARGETS, **options)


def test_sensitivity_needs_images_in_range() -> None:
    images = make_images(1)
    with pytest.raises(ValueError, match=r"images hold .*; values in \[0, 1\] are needed"):
        metrics.max_sensitivity(explain, images * 255, explain(images, TARGETS[:1]), TARGETS[:1])
