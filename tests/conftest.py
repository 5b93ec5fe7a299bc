"""Small networks and images for the tests; every one is built from a seed."""

from __future__ import annotations

import importlib
import os
import re
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import opticam_lite as ol

# Hypothesis would time each example, which is unreliable on a busy machine.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Threads slow down small networks, and two processes run the tests.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

# Helpers without doctests: some of them import packages that take long.
collect_ignore = ["bench", "on_device.py", "pretend_gpu.py"]
# Files that take long, the longest first.
LONG = (
    *("test_imagenet", "test_bench", "test_on_ray", "test_devices", "test_execution"),
    *("test_training", "test_memory", "test_store", "test_browser", "test_cut", "test_explorer"),
    *("test_repository", "test_scenes", "test_models", "test_extremal_perturbation"),
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave files of slow tests unread by `-m "not slow"`: what they import takes long as well."""
    if config.option.markexpr != "not slow" or collection_path.suffix != ".py":
        return None
    text = collection_path.read_text(encoding="utf-8")
    return True if re.search(r"^pytestmark = \[?\s*pytest\.mark\.slow\b", text, re.M) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long files, so that the processes finish at about the same time."""
    place = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


def peer(name: str) -> ModuleType:
    """Import a package that is compared with, where it is compared: most are slow to import."""
    with warnings.catch_warnings():  # what they warn of on import is theirs
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def cnn(classes: int = 5) -> nn.Module:
    """Convolutions, global average pooling and a linear layer, like a ResNet."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, classes),
    )


def dense_cnn(classes: int = 5) -> nn.Module:
    """Convolutions and dense layers, like a VGG."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 10, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(160, 16),
        nn.ReLU(),
        nn.Linear(16, classes),
    )


def vit(classes: int = 5) -> nn.Module:
    """A small vision transformer with a class token."""
    torch.manual_seed(2)
    network = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=classes
    )
    # After untrained norms the channels' mean, where Opti-CAM begins, is 0 up to rounding.
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return network


class Sized(nn.Module):
    """A network that can't be traced: what it does depends on the size of the images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] < 16:
            x = nn.functional.interpolate(x, scale_factor=2)
        return self.network(x)


NETWORKS = {"cnn": (cnn, "4"), "dense": (dense_cnn, "3"), "vit": (vit, "blocks.1.norm1")}


def make_classifier(kind: str) -> ol.Classifier:
    """A classifier of one of the small networks."""
    build, layer = NETWORKS[kind]
    return ol.Classifier(
        build(), layer, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), size=32, device="cpu"
    )


def make_images(n: int = 3, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    """Random images that are smooth enough to have some structure."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 6, 6, generator=generator)
    return nn.functional.interpolate(coarse, (height, width), mode="bilinear").clamp(0, 1)


@pytest.fixture(scope="session", params=list(NETWORKS))
def classifier(request: pytest.FixtureRequest) -> ol.Classifier:
    """Each of the small networks in turn."""
    return make_classifier(request.param)


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    """Three random 32×32 images."""
    return make_images()


@pytest.fixture(scope="session")
def targets() -> torch.Tensor:
    """A class for each of the three images."""
    return torch.tensor([0, 3, 1])
