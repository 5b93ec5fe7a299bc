"""The embedded scenes, with masks of their objects and counterfactual twins."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from ..paths import data_dir
from ..registry import unknown_name
from .files import check_at_hand, fingerprint_file, read_file
from .protocol import Dataset, Sample, checksum

HOME = {  # for each class its most frequent environment in training
    "aeroplane": "snow",
    "car": "gravel",
    "chair": "wood",
    "duck": "water",
    "house": "grass",
    "lamp": "brick",
    "mug": "sand",
    "mushroom": "leaves",
}
CLASSES = tuple(HOME)
ENVIRONMENTS = tuple(sorted(HOME.values()))
TWINS = ("swapped", "empty")


class Scenes(Dataset):
    """The embedded evaluation split: rendered scenes with known objects and environments.

    Args:
        twin: None for the scenes themselves; `"swapped"` for the same objects in another
            environment, `"empty"` for the same environment without the class's objects but with
            the clutter.

    Attributes:
        labels: Names of the classes.
        home: Each class's home environment.
    """

    def __init__(self, twin: str | None = None) -> None:
        if twin is not None and twin not in TWINS:
            raise ValueError(unknown_name("twin", twin, TWINS))
        self._folder = data_dir() / "scenes"
        self._twin = twin
        about = json.loads((self._folder / "annotations.json").read_text(encoding="utf-8"))
        self._scenes: list[dict[str, Any]] = about["scenes"]
        self.name = "scenes" if twin is None else f"scenes-{twin}"
        self.has_boxes = twin != "empty"
        self.labels = list(about["classes"])
        self.home: dict[str, str] = dict(about["home"])

    def __len__(self) -> int:
        return len(self._scenes)

    def sample(self, index: int) -> Sample:
        """Return the scene of an index, or its twin."""
        scene, shown = self._scenes[index], self._shown(index)
        pixels = to_tensor(read_file(self._folder / shown["image"], self._folder))
        boxes = torch.tensor(scene["boxes"], dtype=torch.int64).reshape(-1, 4)
        mask = self._folder / scene["mask"]
        check_at_hand(mask.parent, self._folder)
        with Image.open(mask) as image:
            instances = torch.from_numpy(np.array(image))
        masks = torch.stack([instances == i for i in range(1, len(boxes) + 1)])
        if self._twin == "empty":
            boxes, masks = boxes[:0], masks[:0]
        environment = shown["environment"]
        home = environment == self.home[scene["class"]]
        extra = {"environment": environment, "home": home, "masks": masks}
        return Sample(self.id(index), pixels, self.target(index), boxes, extra)

    def id(self, index: int) -> str:
        """Return the scene's id."""
        return str(self._scenes[index]["id"])

    def target(self, index: int) -> int | None:
        """Return the class of the scene."""
        return int(self._scenes[index]["label"])

    def fingerprint(self, index: int) -> str:
        """Return those of image and mask, and a checksum of the scene's annotations."""
        scene = self._scenes[index]
        files = (self._folder / file for file in (self._shown(index)["image"], scene["mask"]))
        known = (fingerprint_file(path, self._folder) for path in files)
        return " ".join([*known, checksum(json.dumps(scene).encode())])

    def _shown(self, index: int) -> dict[str, Any]:
        """Return the entry of the scene that is shown, itself or its twin."""
        scene = self._scenes[index]
        return scene if self._twin is None else scene["twins"][self._twin]

    def twin(self, kind: str) -> Scenes:
        """Return the counterfactual twins, in the same order: `"swapped"` or `"empty"`."""
        return Scenes(kind)
