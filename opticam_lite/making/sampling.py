"""Random specifications of scenes, as plain numbers.

All randomness of a scene is in its :class:`SceneSpec`; rendering adds none. A seed and an index
give the same specification on every machine.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..datasets.scenes import CLASSES, ENVIRONMENTS, HOME
from .shapes import CLUTTER

Colour = tuple[float, float, float]
PATTERNS = ("plain", "plain", "plain", "stripes", "spots", "speckle", "checks")


@dataclass(frozen=True)
class ObjectSpec:
    """One object: its shape, where it stands on the ground, how it looks.

    Lengths are in units (an object is about one unit tall before ``scale``), ``yaw`` in radians,
    colours are RGB in [0, 1].
    """

    shape: str
    x: float
    z: float
    scale: float
    yaw: float
    proportions: tuple[float, float, float]
    colours: tuple[Colour, Colour, Colour]
    pattern: str
    frequency: float
    phase: float
    gloss: float


@dataclass(frozen=True)
class SceneSpec:
    """Everything random about a scene.

    ``pitch`` and ``roll`` of the camera are in radians, ``light`` is the unit vector that points to
    the sun, and ``ground`` has twelve numbers in [0, 1) that vary the environment.
    """

    label: int
    environment: str
    objects: tuple[ObjectSpec, ...]
    clutter: tuple[ObjectSpec, ...]
    pitch: float
    distance: float
    roll: float
    light: tuple[float, float, float]
    warmth: float
    exposure: float
    ambient: float
    ground: tuple[float, ...]

    @property
    def home(self) -> bool:
        """Whether the class stands in its home environment."""
        return HOME[CLASSES[self.label]] == self.environment


class Draw:
    """Random numbers from ``Generator.random`` alone, whose stream does not change with NumPy."""

    def __init__(self, seed: int, index: int) -> None:
        self._random = np.random.default_rng([seed, index]).random

    def uniform(self, low: float, high: float) -> float:
        """Draw a number from [low, high)."""
        return low + (high - low) * float(self._random())

    def choice(self, options: Sequence) -> Any:
        """Draw one of the options, all with the same probability."""
        return options[int(self._random() * len(options))]

    def many(self, n: int) -> tuple[float, ...]:
        """Draw n numbers from [0, 1)."""
        return tuple(float(self._random()) for _ in range(n))


def sample(
    seed: int, index: int, *, home_rate: float = 0.45, label: int | None = None
) -> SceneSpec:
    """Draw the scene number ``index`` of the split ``seed``.

    home_rate: Probability in [0, 1] that the class stands in its home environment; otherwise one of
    the other seven, uniformly. label: Replaces the class that is drawn and changes nothing else.
    Raises ``ValueError`` for a label or rate that does not exist.
    """
    if not 0 <= home_rate <= 1:
        raise ValueError(f"home_rate is {home_rate}, but it must be between 0 and 1")
    draw = Draw(seed, index)
    drawn = int(draw.uniform(0, len(CLASSES)))
    label = drawn if label is None else label
    if not 0 <= label < len(CLASSES):
        raise ValueError(f"label is {label}, but it must be between 0 and {len(CLASSES) - 1}")
    home = HOME[CLASSES[label]]
    at_home, elsewhere = draw.uniform(0, 1) < home_rate, draw.uniform(0, 1)
    others = [e for e in ENVIRONMENTS if e != home]
    environment = home if at_home else others[int(elsewhere * len(others))]

    count = draw.choice((1, 1, 1, 1, 2, 2, 3))
    pitch = draw.uniform(0.16, 0.62)
    distance = draw.uniform(4.6, 6.0)
    objects = _objects(draw, CLASSES[label], count)
    clutter = _clutter(draw, objects)
    azimuth, height = draw.uniform(-2.4, 2.4), draw.uniform(0.6, 1.2)
    return SceneSpec(
        label=label,
        environment=environment,
        objects=tuple(objects),
        clutter=tuple(clutter),
        pitch=pitch,
        distance=distance,
        roll=draw.uniform(-0.06, 0.06),
        light=(
            math.sin(azimuth) * math.cos(height),
            math.sin(height),
            math.cos(azimuth) * math.cos(height),
        ),
        warmth=draw.uniform(-1, 1),
        exposure=draw.uniform(0.8, 1.15),
        ambient=draw.uniform(0.3, 0.5),
        ground=draw.many(12),
    )


def _objects(draw: Draw, shape: str, count: int) -> list[ObjectSpec]:
    objects: list[ObjectSpec] = []
    paint = _paint(draw)
    for _ in range(count):
        # A single object may be large; several are smaller and keep their distance.
        scale = draw.uniform(0.85, 1.7) if count == 1 else draw.uniform(0.65, 1.1)
        widest, x, z = -1.0, 0.0, 0.0
        for _ in range(8):
            new_x, new_z = draw.uniform(-1.25, 1.25), draw.uniform(-0.9, 0.8)
            gap = min((abs(new_x - o.x) + 0.4 * abs(new_z - o.z) for o in objects), default=9.0)
            if gap > widest and widest <= 1.2:
                widest, x, z = gap, new_x, new_z
        if draw.uniform(0, 1) < 0.4:
            paint = _paint(draw)
        proportions = draw.many(3)
        yaw = draw.uniform(0, 2 * math.pi)
        objects.append(ObjectSpec(shape, x, z, scale, yaw, proportions, **paint))
    return objects


def _clutter(draw: Draw, objects: list[ObjectSpec]) -> list[ObjectSpec]:
    clutter = []
    for i in range(int(draw.uniform(0, 4.2))):
        shape = draw.choice(CLUTTER)
        scale = draw.uniform(0.3, 0.75)
        x, z = draw.uniform(-1.7, 1.7), draw.uniform(-1.8, 0.9)
        if i == 0 and draw.uniform(0, 1) < 0.6:
            # Stands before an object and hides a part of it.
            ahead = draw.choice(objects)
            x = ahead.x + draw.uniform(-0.5, 0.5) * ahead.scale
            z = ahead.z + draw.uniform(0.55, 0.9) * ahead.scale + 0.3 * scale
            scale *= 0.6 + 0.4 * ahead.scale
        yaw = draw.uniform(0, 6.283)
        clutter.append(ObjectSpec(shape, x, z, scale, yaw, draw.many(3), **_paint(draw)))
    return clutter


def _paint(draw: Draw) -> dict[str, Any]:
    """Draw colours and material, alike for every class and for clutter."""
    hue, second, third = draw.many(3)
    return {
        "colours": (
            colorsys.hsv_to_rgb(hue, draw.uniform(0.15, 0.9), draw.uniform(0.45, 0.98)),
            colorsys.hsv_to_rgb(second, draw.uniform(0.1, 0.85), draw.uniform(0.35, 0.98)),
            colorsys.hsv_to_rgb(third, draw.uniform(0.0, 0.7), draw.uniform(0.12, 0.9)),
        ),
        "pattern": draw.choice(PATTERNS),
        "frequency": draw.uniform(0.7, 1.4),
        "phase": draw.uniform(0.0, 1.0),
        "gloss": draw.uniform(0.0, 1.0) ** 2,
    }
