"""Fresh inputs for exercises: tiny networks and random values, equal for equal seeds."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..network import Classifier


def generator(seed: int) -> torch.Generator:
    """Return a generator."""
    return torch.Generator().manual_seed(1000 + seed)


def smooth(seed: int, *shape: int) -> Tensor:
    """Return random smooth values in [0, 1], `shape` is `(N, C, H, W)`."""
    coarse = torch.rand(*shape[:2], 5, 5, generator=generator(seed))
    return F.interpolate(coarse, shape[2:], mode="bilinear").clamp(0, 1)


def tiny(seed: int) -> Classifier:
    """Return a network of 6 feature maps of 8×8 at its layer, a head with a relu, and 4 classes."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers: list[nn.Conv2d | nn.Linear] = [
            nn.Conv2d(3, 6, 5, stride=4, padding=2),
            nn.Conv2d(6, 10, 3, padding=1),
            nn.Linear(10, 4),
        ]
    for layer, factor in zip(layers, (2.0, 3.0, 8.0), strict=True):
        layer.weight.data *= factor  # an untrained network hardly tells classes apart
    first, second, last = layers
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    network = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), *pool, last)
    return Classifier(network, "1", size=32, device="cpu", name="tiny", copy=False)


def up(saliency: Tensor, size: tuple[int, ...]) -> Tensor:
    """Enlarge maps `(N, C, h, w)`."""
    return F.interpolate(saliency, size, mode="bilinear", align_corners=False)
