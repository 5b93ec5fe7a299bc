"""Rendered scenes whose truth is known: eight classes of object in eight environments.

A scene shows one to three toy-like objects of one class, with neutral clutter, in an environment.
The classes differ in **shape** alone: colours, materials, light and viewpoint are drawn without
regard to the class. Only the environment may tell something of the class: each class has a *home*,
and the share of scenes at home (``home_rate``) says how tempting that short cut is.

Two steps, so that everything random is in one place:

>>> spec = sample(seed=1, index=0)          # what is in the scene: plain numbers
>>> scene = render(spec)                    # the picture, with labels, boxes and masks
>>> scene.image.shape, scene.image.dtype
((224, 224, 3), dtype('uint8'))
>>> swapped = render(spec, environment="snow")   # the same objects and clutter, somewhere else
>>> empty = render(spec, objects=False)          # the same place without the class's objects

The same seed and index give the same spec on every machine; pixels may differ by a rounding of the
last bit between processors. Objects are signed distance functions, sphere-traced by NumPy at twice
the picture's size inside each object's screen box; the ground and the wall behind it are textured
planes. Units: the ground is y = 0, y points up, objects are about one unit tall; angles in radians;
colours are RGB in [0, 1].

``python -m opticam_lite.scenes data/scenes`` writes the evaluation split again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

Array = np.ndarray
VERSION = 1  # of the pixels: raise it when a change of the renderer alters them
SIZE = 224
SUPER = 2  # samples per pixel and axis on objects
FOCAL = 2.2  # focal length in half picture widths: a view of about 49 degrees
TILE = 512  # pixels of a texture tile


# --------------------------------------------------------------------------------------------------
# Shapes. A shape takes coordinates (x, y, z) of points, float32 arrays of one shape, and returns
# the signed distances to its parts: a list of (distance, part), where part 0, 1, 2 is painted in
# the object's first, second or third colour. y = 0 is the ground. ``p`` are three numbers in
# [0, 1) that vary the proportions.
# --------------------------------------------------------------------------------------------------


def _box(x: Array, y: Array, z: Array, a: float, b: float, c: float, r: float = 0.03) -> Array:
    """Distance to a box of half sizes (a, b, c) at the origin, edges rounded by r."""
    qx, qy, qz = np.abs(x) - (a - r), np.abs(y) - (b - r), np.abs(z) - (c - r)
    inside = np.minimum(np.maximum(qx, np.maximum(qy, qz)), 0)
    qx, qy, qz = np.maximum(qx, 0), np.maximum(qy, 0), np.maximum(qz, 0)
    return np.sqrt(qx * qx + qy * qy + qz * qz) + (inside - r)


def _rect(u: Array, v: Array, a: float, b: float, r: float = 0.02) -> Array:
    """Distance to a rectangle in the plane; with u a radius, to a cylinder."""
    qu, qv = np.abs(u) - (a - r), np.abs(v) - (b - r)
    inside = np.minimum(np.maximum(qu, qv), 0)
    qu, qv = np.maximum(qu, 0), np.maximum(qv, 0)
    return np.sqrt(qu * qu + qv * qv) + (inside - r)


def _ball(x: Array, y: Array, z: Array, r: float) -> Array:
    return np.sqrt(x * x + y * y + z * z) - r


def _ellipsoid(x: Array, y: Array, z: Array, a: float, b: float, c: float) -> Array:
    """Close bound of the distance to an ellipsoid (exact for a ball)."""
    x, y, z = x / a, y / b, z / c
    k0 = np.sqrt(x * x + y * y + z * z)
    k1 = np.sqrt((x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2)
    return k0 * (k0 - 1) / np.maximum(k1, 1e-6)


def _cone(radius: Array, y: Array, low: float, high: float, r0: float, r1: float) -> Array:
    """Distance to a truncated cone between heights low and high with radii r0 and r1."""
    h = (high - low) / 2
    y = y - (low + high) / 2
    k2x, k2y = r1 - r0, 2 * h
    cax = radius - np.minimum(radius, np.where(y < 0, np.float32(r0), np.float32(r1)))
    cay = np.abs(y) - h
    t = np.clip(((r1 - radius) * k2x + (h - y) * k2y) / (k2x * k2x + k2y * k2y), 0, 1)
    cbx = radius - r1 + k2x * t
    cby = y - h + k2y * t
    sign = np.where((cbx < 0) & (cay < 0), np.float32(-1), np.float32(1))
    return sign * np.sqrt(np.minimum(cax * cax + cay * cay, cbx * cbx + cby * cby))


def _segment(x: Array, y: Array, z: Array, a: tuple, b: tuple, r0: float, r1: float) -> Array:
    """Distance to a rounded stick from a to b whose radius runs from r0 to r1."""
    dx, dy, dz = b[0] - a[0], b[1] - a[1], b[2] - a[2]
    x, y, z = x - a[0], y - a[1], z - a[2]
    t = np.clip((x * dx + y * dy + z * dz) / (dx * dx + dy * dy + dz * dz), 0, 1)
    x, y, z = x - dx * t, y - dy * t, z - dz * t
    return np.sqrt(x * x + y * y + z * z) - (r0 + (r1 - r0) * t)


def _aeroplane(x, y, z, p):
    s = np.abs(z)
    y = y - 0.36
    length = 0.72 + 0.12 * p[0]
    body = _ellipsoid(x, y, z, length, 0.17 + 0.04 * p[1], 0.17 + 0.04 * p[1])
    span = 0.72 + 0.14 * p[2]
    wing = _box(x - 0.08 + 0.28 * s, y + 0.02, s - span / 2, 0.17, 0.035, span / 2) * 0.9
    tail = _box(x + length - 0.12 + 0.25 * s, y - 0.06, s - 0.13, 0.1, 0.03, 0.15) * 0.9
    fin = _box(x + length - 0.12 + 0.4 * (y - 0.2), y - 0.2, z, 0.11, 0.19, 0.03) * 0.9
    leg = _segment(x, y, s, (0.08, -0.1, 0.12), (0.08, -0.27, 0.2), 0.03, 0.03)
    wheel = _rect(np.hypot(x - 0.08, y + 0.28), s - 0.2, 0.085, 0.04)
    nose = _box(x - length + 0.01, y, z, 0.025, 0.3, 0.05, 0.02)
    return [
        (body, 0),
        (np.minimum(wing, fin), 1),
        (tail, 1),
        (np.minimum(wheel, leg), 2),
        (nose, 2),
    ]


def _car(x, y, z, p):
    s, t = np.abs(z), np.abs(x)
    length, roof = 0.72 + 0.12 * p[0], 0.16 + 0.07 * p[1]
    body = _box(x, y - 0.3, z, length, 0.15, 0.34, 0.07)
    back = 0.08 + 0.16 * p[2]
    slope = 0.55 * np.maximum(y - 0.45, 0)
    cabin = _box(x + back, y - 0.45 - roof, z, 0.42 - slope, roof + 0.02, 0.29 - 0.3 * slope, 0.06)
    wheel = _rect(np.hypot(t - length * 0.6, y - 0.17), s - 0.31, 0.17, 0.07, 0.03)
    lights = _ball(x - length + 0.02, y - 0.32, s - 0.2, 0.07)
    return [(body, 0), (cabin * 0.8, 1), (wheel, 2), (lights, 2)]


def _chair(x, y, z, p):
    wide, deep = 0.33 + 0.06 * p[0], 0.33 + 0.05 * p[1]
    seat_y, top = 0.5 + 0.06 * p[1], 1.12 + 0.2 * p[2]
    seat = _box(x, y - seat_y, z, deep, 0.05, wide)
    leg = _box(
        np.abs(x) - deep + 0.06, y - seat_y / 2, np.abs(z) - wide + 0.06, 0.05, seat_y / 2, 0.05
    )
    post = _box(
        x + deep - 0.05,
        y - (seat_y + top) / 2,
        np.abs(z) - wide + 0.06,
        0.05,
        (top - seat_y) / 2,
        0.05,
    )
    rail = _box(x + deep - 0.05, y - top + 0.13, z, 0.035, 0.13, wide)
    if p[0] < 0.5:
        bar = _box(x + deep - 0.05, y - (seat_y + top) / 2 + 0.06, z, 0.03, 0.05, wide)
    else:
        bar = _box(
            x + deep - 0.05,
            y - (seat_y + top) / 2,
            np.abs(z) - 0.1,
            0.03,
            (top - seat_y) / 2,
            0.03,
            0.02,
        )
    return [(seat, 0), (np.minimum(leg, post), 1), (np.minimum(rail, bar), 0)]


def _duck(x, y, z, p):
    fat = 0.32 + 0.06 * p[0]
    body = _ellipsoid(x, y - fat + 0.02, z, 0.56 + 0.06 * p[1], fat, 0.36)
    tail = _segment(x, y, z, (-0.38, 0.4, 0.0), (-0.68, 0.62, 0.0), 0.16, 0.03)
    neck = 0.78 + 0.16 * p[2]
    head = _ball(x - 0.36, y - neck, z, 0.235)
    throat = _segment(x, y, z, (0.3, 0.4, 0.0), (0.36, neck, 0.0), 0.2, 0.15)
    bill = _ellipsoid(x - 0.64, y - neck + 0.05, z, 0.17, 0.05, 0.13)
    wing = _ellipsoid(x + 0.1, y - fat - 0.06, np.abs(z) - 0.33, 0.3, 0.17, 0.08)
    eye = _ball(x - 0.5, y - neck - 0.07, np.abs(z) - 0.15, 0.05)
    blend = np.maximum(0.12 - np.abs(body - throat), 0)
    body = np.minimum(body, throat) - blend * blend / 0.48
    return [(np.minimum(body, tail), 0), (head, 0), (wing, 1), (bill, 2), (eye, 2)]


def _house(x, y, z, p):
    a, c = 0.46 + 0.14 * p[0], 0.38 + 0.08 * p[1]
    wall, rise = 0.5 + 0.2 * p[2], 0.42 + 0.14 * p[1]
    walls = _box(x, y - wall / 2, z, a, wall / 2, c, 0.02)
    s = np.abs(z)
    slope = rise / (c + 0.1)
    norm = 1 / math.sqrt(1 + slope * slope)
    peak = wall + rise
    roof = np.maximum((y - peak + slope * s) * norm, wall - 0.06 - y)
    roof = np.maximum(roof, np.abs(x) - a - 0.08)
    chimney = _box(x - a * 0.5, y - peak + 0.08, z - 0.16, 0.08, 0.24, 0.08, 0.01)
    door = _box(x - 0.02, y - 0.17, s - c, 0.1, 0.18, 0.02, 0.01)
    window = _box(np.abs(x - 0.02) - a * 0.62, y - wall * 0.6, s - c, 0.085, 0.1, 0.02, 0.01)
    gable = _box(np.abs(x) - a, y - wall * 0.6, z, 0.02, 0.12, 0.1, 0.01)
    return [(walls, 0), (roof, 1), (chimney, 0), (np.minimum(door, np.minimum(window, gable)), 2)]


def _lamp(x, y, z, p):
    radius = np.hypot(x, z)
    top = 1.25 + 0.2 * p[0]
    foot = _cone(radius, y, 0.0, 0.09, 0.3 + 0.06 * p[1], 0.2)
    pole = _rect(radius, y - top / 2, 0.045, top / 2)
    low = top - 0.52 - 0.1 * p[2]
    wide = 0.42 + 0.08 * p[1]
    shade = _cone(radius, y, low, top, wide, 0.2 + 0.1 * p[2])
    hollow = _cone(radius, y, low - 0.1, top - 0.06, wide + 0.01, 0.16 + 0.1 * p[2])
    shade = np.maximum(shade, -hollow)
    bulb = _ball(x, y - low - 0.1, z, 0.1)
    return [(shade, 0), (foot, 1), (pole, 1), (bulb, 2)]


def _mug(x, y, z, p):
    h, r = 0.84 + 0.2 * p[0], 0.4 + 0.07 * p[1]
    radius = np.hypot(x, z)
    outer = _rect(radius, y - h / 2, r, h / 2, 0.04)
    inner = _rect(radius, y - h / 2 - 0.12, r - 0.075, h / 2, 0.03)
    cup = np.maximum(outer, -inner)
    drink = _rect(radius, y - h * 0.36, r - 0.05, h * 0.36)
    major = 0.23 + 0.05 * p[2]
    ring = np.hypot(np.hypot(x - r - 0.02, y - h * 0.52) - major, z) - 0.07
    ring = np.maximum(ring, r - 0.05 - radius)
    return [(cup, 0), (ring, 1), (drink, 2)]


def _mushroom(x, y, z, p):
    radius = np.hypot(x, z)
    h = 0.5 + 0.16 * p[0]
    stem = _cone(radius, y, 0.0, h + 0.08, 0.21 + 0.05 * p[1], 0.13 + 0.04 * p[1]) - 0.02
    wide, tall = 0.56 + 0.1 * p[2], 0.46 + 0.12 * p[0]
    dome = _ellipsoid(x, y - h, z, wide, tall, wide)
    cap = np.maximum(dome, h - 0.02 - y)
    gills = _rect(radius, y - h + 0.02, wide - 0.06, 0.03)
    return [(cap, 0), (stem, 1), (gills, 2)]


# Clutter: neutral shapes that belong to no class.
def _sphere(x, y, z, p):
    return [(_ball(x, y - 0.5, z, 0.5), 0)]


def _block(x, y, z, p):
    return [(_box(x, y - 0.4, z, 0.3 + 0.2 * p[0], 0.4, 0.3 + 0.2 * p[1], 0.05), 0)]


def _stick(x, y, z, p):
    r = 0.1 + 0.05 * p[0]
    return [(_segment(x, y, z, (-0.7, r, 0.0), (0.7, r, 0.0), r, r * (0.5 + 0.5 * p[1])), 0)]


def _drum(x, y, z, p):
    h = 0.25 + 0.3 * p[0]
    return [(_rect(np.hypot(x, z), y - h, 0.4, h, 0.04), 0)]


def _pyramid(x, y, z, p):
    return [(_cone(np.hypot(x, z), y, 0.0, 0.7 + 0.3 * p[0], 0.45, 0.04), 0)]


Shape = Callable[[Array, Array, Array, tuple[float, float, float]], list[tuple[Array, int]]]

# name -> (shape, height of the bounding ball's centre, its radius)
_SHAPES: dict[str, tuple[Shape, float, float]] = {
    "aeroplane": (_aeroplane, 0.4, 0.95),
    "car": (_car, 0.42, 0.96),
    "chair": (_chair, 0.62, 0.86),
    "duck": (_duck, 0.52, 0.86),
    "house": (_house, 0.58, 0.92),
    "lamp": (_lamp, 0.7, 0.82),
    "mug": (_mug, 0.5, 0.85),
    "mushroom": (_mushroom, 0.56, 0.8),
    "sphere": (_sphere, 0.5, 0.52),
    "block": (_block, 0.4, 0.82),
    "stick": (_stick, 0.12, 0.87),
    "drum": (_drum, 0.5, 0.7),
    "pyramid": (_pyramid, 0.45, 0.7),
}

CLASSES: tuple[str, ...] = (
    "aeroplane",
    "car",
    "chair",
    "duck",
    "house",
    "lamp",
    "mug",
    "mushroom",
)
CLUTTER: tuple[str, ...] = ("sphere", "block", "stick", "drum", "pyramid")
ENVIRONMENTS: tuple[str, ...] = (
    "brick",
    "grass",
    "gravel",
    "leaves",
    "sand",
    "snow",
    "water",
    "wood",
)
HOME: dict[str, str] = {
    "aeroplane": "snow",
    "car": "gravel",
    "chair": "wood",
    "duck": "water",
    "house": "grass",
    "lamp": "brick",
    "mug": "sand",
    "mushroom": "leaves",
}
PATTERNS: tuple[str, ...] = ("plain", "stripes", "spots", "speckle", "checks")


# --------------------------------------------------------------------------------------------------
# Specifications
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ObjectSpec:
    """One object: what it is, where it stands, how it looks. Colours are RGB in [0, 1]."""

    shape: str
    x: float
    z: float
    scale: float
    yaw: float
    proportions: tuple[float, float, float]
    colours: tuple[tuple[float, float, float], ...]
    pattern: str
    frequency: float
    phase: float
    gloss: float


@dataclass(frozen=True)
class SceneSpec:
    """Everything random about a scene; ``render`` adds nothing to it."""

    seed: int
    index: int
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


@dataclass(frozen=True)
class Scene:
    """A rendered scene and its truth.

    image: uint8 ``(H, W, 3)``, RGB. masks: bool ``(M, H, W)``, the visible pixels of each object of
    the class; boxes: int ``(M, 4)``, their bounds as x0, y0, x1, y1 with x1, y1 exclusive. M is 0
    where the objects were left out.
    """

    image: Array
    label: int
    environment: str
    home: bool
    boxes: Array
    masks: Array


class _Draw:
    """Random numbers from ``Generator.random`` alone, whose stream does not change with NumPy."""

    def __init__(self, seed: int, index: int) -> None:
        self._random = np.random.default_rng([seed, index]).random

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(self._random())

    def choice(self, options: tuple) -> object:
        return options[int(self._random() * len(options))]

    def many(self, n: int) -> tuple[float, ...]:
        return tuple(float(self._random()) for _ in range(n))


def _hsv(h: float, s: float, v: float) -> tuple[float, float, float]:
    rgb = []
    for k in (5, 3, 1):
        t = (k + h * 6) % 6
        rgb.append(v - v * s * max(0.0, min(t, 4 - t, 1.0)))
    return rgb[0], rgb[1], rgb[2]


def _paint(draw: _Draw) -> dict:
    """Colours and material, drawn alike for every class and for clutter."""
    hue, second, third = draw.many(3)
    colours = (
        _hsv(hue, draw.uniform(0.15, 0.9), draw.uniform(0.45, 0.98)),
        _hsv(second, draw.uniform(0.1, 0.85), draw.uniform(0.35, 0.98)),
        _hsv(third, draw.uniform(0.0, 0.7), draw.uniform(0.12, 0.9)),
    )
    return {
        "colours": colours,
        "pattern": draw.choice(("plain", "plain", *PATTERNS)),
        "frequency": draw.uniform(0.7, 1.4),
        "phase": draw.uniform(0.0, 1.0),
        "gloss": draw.uniform(0.0, 1.0) ** 2,
    }


def sample(
    seed: int,
    index: int,
    *,
    home_rate: float = 0.45,
    label: int | None = None,
    environment: str | None = None,
) -> SceneSpec:
    """Draw the scene number ``index`` of the split ``seed``.

    home_rate: chance in [0, 1] that the class stands in its home environment; otherwise one of the
    other seven, evenly. ``label`` and ``environment`` fix what would be drawn and change nothing
    else. Raises ``ValueError`` for a label, environment or rate that does not exist.
    """
    if not 0 <= home_rate <= 1:
        raise ValueError(f"home_rate is {home_rate}, but it must be between 0 and 1")
    draw = _Draw(seed, index)
    drawn = int(draw.uniform(0, len(CLASSES)))
    label = drawn if label is None else label
    if not 0 <= label < len(CLASSES):
        raise ValueError(f"label is {label}, but it must be between 0 and {len(CLASSES) - 1}")
    home = HOME[CLASSES[label]]
    at_home, elsewhere = draw.uniform(0, 1) < home_rate, draw.uniform(0, 1)
    others = tuple(e for e in ENVIRONMENTS if e != home)
    place = home if at_home else others[int(elsewhere * len(others))]
    if environment is not None:
        place = _environment(environment)

    count = (1, 1, 1, 1, 2, 2, 3)[int(draw.uniform(0, 7))]
    pitch = draw.uniform(0.16, 0.62)
    distance = draw.uniform(4.6, 6.0)
    objects: list[ObjectSpec] = []
    paint = _paint(draw)
    for _ in range(count):
        # The first object may be large and anywhere; further ones find a free place on the ground.
        scale = draw.uniform(0.85, 1.7) if count == 1 else draw.uniform(0.65, 1.1)
        best = (-1.0, 0.0, 0.0)
        for _ in range(8):
            x, z = draw.uniform(-1.25, 1.25), draw.uniform(-0.9, 0.8)
            gap = min((abs(x - o.x) + 0.4 * abs(z - o.z) for o in objects), default=9.0)
            if gap > best[0] and not (best[0] > 1.2):
                best = (gap, x, z)
        if draw.uniform(0, 1) < 0.4:
            paint = _paint(draw)
        proportions = draw.many(3)
        yaw = draw.uniform(0, 2 * math.pi)
        objects.append(
            ObjectSpec(CLASSES[label], best[1], best[2], scale, yaw, proportions, **paint)
        )

    clutter: list[ObjectSpec] = []
    for i in range(int(draw.uniform(0, 4.2))):
        shape = str(draw.choice(CLUTTER))
        scale = draw.uniform(0.3, 0.75)
        x, z = draw.uniform(-1.7, 1.7), draw.uniform(-1.8, 0.9)
        if i == 0 and draw.uniform(0, 1) < 0.6:
            # Stands before an object and hides a part of it.
            ahead = objects[int(draw.uniform(0, count))]
            x = ahead.x + draw.uniform(-0.5, 0.5) * ahead.scale
            z = ahead.z + draw.uniform(0.55, 0.9) * ahead.scale + 0.3 * scale
            scale *= 0.6 + 0.4 * ahead.scale
        clutter.append(
            ObjectSpec(shape, x, z, scale, draw.uniform(0, 6.283), draw.many(3), **_paint(draw))
        )

    azimuth, height = draw.uniform(-2.4, 2.4), draw.uniform(0.6, 1.2)
    light = (
        math.sin(azimuth) * math.cos(height),
        math.sin(height),
        math.cos(azimuth) * math.cos(height),
    )
    return SceneSpec(
        seed=seed,
        index=index,
        label=label,
        environment=place,
        objects=tuple(objects),
        clutter=tuple(clutter),
        pitch=pitch,
        distance=distance,
        roll=draw.uniform(-0.06, 0.06),
        light=light,
        warmth=draw.uniform(-1, 1),
        exposure=draw.uniform(0.8, 1.15),
        ambient=draw.uniform(0.3, 0.5),
        ground=draw.many(12),
    )


def _environment(name: str) -> str:
    if name not in ENVIRONMENTS:
        raise ValueError(
            f"there is no environment {name!r}; choose one of {', '.join(ENVIRONMENTS)}"
        )
    return name


# --------------------------------------------------------------------------------------------------
# Textures: tiles of 512 x 512 that repeat without a seam, made once from fixed seeds. A tile holds
# RGB and the two slopes of its relief, which the light of a scene turns into light and shade.
# --------------------------------------------------------------------------------------------------


def _noise(random: Callable, cells: int, octaves: int = 1, n: int = TILE) -> Array:
    """Smooth noise in [0, 1] that repeats: ``cells`` bumps a side, each octave half as strong."""
    total = np.zeros((n, n), np.float32)
    weight, weights = 1.0, 0.0
    for _ in range(octaves):
        grid = random((cells, cells)).astype(np.float32)
        t = np.arange(n, dtype=np.float32) * (cells / n)
        i = t.astype(int)
        f = t - i
        f = f * f * (3 - 2 * f)
        i, j = i % cells, (i + 1) % cells
        rows = grid[i] * (1 - f)[:, None] + grid[j] * f[:, None]
        total += weight * (rows[:, i] * (1 - f) + rows[:, j] * f)
        weights += weight
        weight *= 0.5
        cells = min(cells * 2, n)
    return total / weights


def _mix(a, b, t: Array) -> Array:
    return (
        np.asarray(a, np.float32)
        + (np.asarray(b, np.float32) - np.asarray(a, np.float32)) * t[..., None]
    )


def _step(low: float, high: float, v: Array) -> Array:
    t = np.clip((v - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _cells(random: Callable, n: int, squash: float = 1.0) -> tuple[Array, Array, Array]:
    """Cells around n x n jittered points: nearest distance, second nearest, number of the cell."""
    points = random((n, n, 2)).astype(np.float32) * 0.8 + 0.1
    t = np.arange(TILE, dtype=np.float32) * (n / TILE)
    i = t.astype(int)
    first = np.full((TILE, TILE), 9, np.float32)
    second, which = first.copy(), np.zeros((TILE, TILE), int)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            r, c = (i + dy) % n, (i + dx) % n
            p = points[r[:, None], c[None, :]]
            y = (i + dy)[:, None] + p[..., 0] - t[:, None]
            x = (i + dx)[None, :] + p[..., 1] - t[None, :]
            d = np.sqrt(x * x + (y * squash) ** 2)
            closer = d < first
            second = np.where(closer, first, np.minimum(second, d))
            which = np.where(closer, r[:, None] * n + c[None, :], which)
            first = np.where(closer, d, first)
    return first, second, which


def _scatter(
    random: Callable, n: int, length: float, width: float, rgb: Array, height: Array, bend: float
) -> None:
    """Lay n pointed leaves, in order, on the tile: later ones cover earlier ones."""
    u = np.linspace(0, 1, max(4, int(length * 1.6)), dtype=np.float32)
    v = np.linspace(-1, 1, max(3, int(width * 2.6)), dtype=np.float32)
    u, v = (a.ravel() for a in np.meshgrid(u, v))
    draws = random((n, 8)).astype(np.float32)
    size = 0.65 + 0.7 * draws[:, 3:4]
    angle = draws[:, 2:3] * 2 * np.pi
    outline = np.sqrt(np.maximum(np.sin(np.pi * u**0.8), 0))
    along = (u - 0.5) * length * size
    across = v * outline * width * 0.5 * size + bend * (draws[:, 4:5] - 0.5) * length * (u * u)
    x = draws[:, 0:1] * TILE + along * np.cos(angle) - across * np.sin(angle)
    y = draws[:, 1:2] * TILE + along * np.sin(angle) + across * np.cos(angle)
    flat = (np.floor(y).astype(int) % TILE) * TILE + np.floor(x).astype(int) % TILE
    rib = 1 - 0.35 * np.exp(-((v * 5) ** 2))
    shade = (0.75 + 0.25 * u) * rib * (0.72 + 0.28 * np.linspace(0, 1, n))[:, None]
    palette = _LEAF_COLOURS[(draws[:, 5] * len(_LEAF_COLOURS)).astype(int)]
    if width < 6:
        palette = _BLADE_COLOURS[(draws[:, 5] * len(_BLADE_COLOURS)).astype(int)]
    palette = palette * (0.8 + 0.4 * draws[:, 6:7])
    rgb.reshape(-1, 3)[flat.ravel()] = (palette[:, None, :] * shade[..., None]).reshape(-1, 3)
    relief = np.linspace(0, 1, n)[:, None] + 0.3 * (1 - v * v) * np.ones((n, 1))
    height.reshape(-1)[flat.ravel()] = relief.ravel()


_LEAF_COLOURS = np.array(
    [
        (0.85, 0.45, 0.10),
        (0.75, 0.22, 0.08),
        (0.90, 0.68, 0.20),
        (0.55, 0.30, 0.12),
        (0.65, 0.15, 0.10),
        (0.62, 0.50, 0.18),
        (0.48, 0.34, 0.20),
    ],
    np.float32,
)
_BLADE_COLOURS = np.array(
    [(0.28, 0.52, 0.14), (0.36, 0.62, 0.18), (0.20, 0.42, 0.12), (0.48, 0.66, 0.24)], np.float32
)


@cache
def _texture(name: str) -> tuple[Array, ...]:
    """The levels of a texture, each half the size of the one before: float32 (n, n, 5)."""
    random = np.random.default_rng([2024, sum(name.encode())]).random
    row, column = np.mgrid[0:TILE, 0:TILE].astype(np.float32) / TILE
    fine = _noise(random, 128, 2)
    broad = _noise(random, 6, 4)
    if name == "grass":
        rgb = _mix((0.10, 0.20, 0.06), (0.20, 0.32, 0.10), broad)
        height = np.zeros((TILE, TILE), np.float32)
        _scatter(random, 9000, 46, 4.0, rgb, height, 0.5)
        rgb *= (0.75 + 0.5 * broad)[..., None]
        relief = 0.9
    elif name == "leaves":
        rgb = _mix((0.20, 0.13, 0.07), (0.32, 0.22, 0.12), fine)
        height = np.zeros((TILE, TILE), np.float32)
        _scatter(random, 900, 64, 34, rgb, height, 0.2)
        rgb *= (0.85 + 0.3 * fine)[..., None]
        relief = 1.6
    elif name == "sand":
        warp = _noise(random, 4, 3)
        ripple = 0.5 + 0.5 * np.sin(2 * np.pi * (row * 11 + 2.2 * warp + 0.7 * broad))
        rgb = _mix(
            (0.74, 0.60, 0.40), (0.90, 0.79, 0.58), 0.45 * ripple + 0.35 * broad + 0.3 * fine
        )
        height = ripple * 0.8 + 0.12 * fine
        relief = 1.9
    elif name == "snow":
        rgb = _mix((0.78, 0.84, 0.94), (0.97, 0.98, 1.0), _step(0.25, 0.75, broad))
        sparkle = _step(0.86, 0.95, _noise(random, 200))
        rgb = rgb + 0.12 * sparkle[..., None]
        height = broad * 2.2 + 0.10 * fine
        relief = 1.4
    elif name == "water":
        a, b = _noise(random, 7, 2), _noise(random, 11, 2)
        height = np.abs(np.sin(2 * np.pi * (a * 2 + row * 3))) + 0.8 * np.abs(
            np.sin(2 * np.pi * (b * 2 + column * 2))
        )
        web = 1 - _step(0.0, 0.5, np.minimum(height / 1.4, 1))
        rgb = _mix((0.08, 0.30, 0.46), (0.20, 0.52, 0.66), broad) + _mix(
            (0, 0, 0), (0.42, 0.50, 0.48), web * (0.4 + 0.6 * broad)
        )
        relief = 0.7
    elif name == "gravel":
        first, second, which = _cells(random, 15)
        gap = second - first
        stone = _step(0.02, 0.22, gap)
        tint = random((15 * 15, 1)).astype(np.float32) * 0.45 + 0.42
        hue = random((15 * 15, 3)).astype(np.float32) * 0.12 + np.float32([0.02, 0.0, -0.02])
        rgb = (
            (tint + hue)[which] * (0.8 + 0.35 * fine)[..., None] * (0.25 + 0.75 * stone)[..., None]
        )
        height = np.sqrt(np.maximum(stone, 0)) * 1.6 + 0.3 * np.minimum(gap, 0.5) + 0.15 * fine
        relief = 1.3
    elif name == "brick":
        across, down = 5, 12
        r = (row * down).astype(int)
        shifted = (column * across + 0.5 * (r % 2)) % across
        u, v = shifted % 1, (row * down) % 1
        wobble = 0.012 * (fine - 0.5)
        edge = np.minimum(
            np.minimum(u, 1 - u) * (TILE / across), np.minimum(v, 1 - v) * (TILE / down)
        )
        face = _step(2.0, 5.0, edge + 200 * wobble)
        which = r * across + shifted.astype(int)
        tint = random((across * down,)).astype(np.float32)[which]
        bricks = _mix((0.50, 0.20, 0.14), (0.76, 0.40, 0.28), 0.65 * tint + 0.35 * broad)
        rgb = np.float32([0.70, 0.67, 0.62]) * (1 - face)[..., None] + bricks * face[..., None]
        rgb = rgb * (0.82 + 0.36 * fine)[..., None]
        height = face + 0.2 * fine
        relief = 0.9
    elif name == "wood":
        planks = 5
        r = (row * planks).astype(int)
        v = (row * planks) % 1
        offset = random((planks,)).astype(np.float32)
        tint = random((planks * 2,)).astype(np.float32)
        along = (column + offset[r]) % 1
        plank = r * 2 + (along > 0.5)
        swirl = _noise(random, 3, 3)
        grain = _noise(random, 4, 2)
        grain = 0.5 + 0.5 * np.sin(2 * np.pi * (v * 3 + 5 * swirl * grain + 6 * tint[plank]))
        pores = np.repeat(_noise(random, 256)[:, ::16], 16, axis=1)
        rgb = _mix(
            (0.46, 0.28, 0.14), (0.80, 0.58, 0.35), 0.4 * grain + 0.4 * tint[plank] + 0.2 * pores
        )
        ends = np.minimum(np.abs(along - 0.5), np.minimum(along, 1 - along)) * TILE
        gap = np.minimum(np.minimum(v, 1 - v) * (TILE / planks), ends)
        rgb = rgb * (0.35 + 0.65 * _step(0.5, 3.0, gap))[..., None]
        height = _step(0.0, 4.0, gap) + 0.12 * grain
        relief = 0.6
    else:  # plaster, concrete: what stands behind wood and lies before brick
        rgb = _mix((0.70, 0.70, 0.70), (0.92, 0.92, 0.92), 0.6 * broad + 0.4 * fine)
        if name == "concrete":
            rgb = rgb * np.float32([0.66, 0.64, 0.60])
        height = 0.5 * fine + broad
        relief = 0.5
    scale = relief * TILE / 512 * 2.0
    gy = (np.roll(height, -1, 0) - np.roll(height, 1, 0)) * scale
    gx = (np.roll(height, -1, 1) - np.roll(height, 1, 1)) * scale
    level = np.concatenate(
        [
            np.clip(rgb, 0, 1.2),
            np.clip(gx, -1.5, 1.5)[..., None],
            np.clip(gy, -1.5, 1.5)[..., None],
        ],
        axis=2,
    ).astype(np.float32)
    levels = [level]
    while level.shape[0] > 8:
        n = level.shape[0] // 2
        level = level.reshape(n, 2, n, 2, 5).mean(axis=(1, 3))
        levels.append(level)
    return tuple(np.ascontiguousarray(a) for a in levels)


def _look_up(name: str, u: Array, v: Array, footprint: Array) -> Array:
    """Values of a texture at (u, v) in tiles, blurred to ``footprint`` tiles a pixel: (n, 5)."""
    levels = _texture(name)
    if u.size == 0:
        return np.zeros((0, 5), np.float32)
    lod = np.clip(np.log2(np.maximum(footprint * TILE, 1e-3)), 0, len(levels) - 1.001)
    base = lod.astype(int)
    blend = (lod - base)[:, None]
    out = np.zeros((u.size, 5), np.float32)
    for level in range(int(base.min()), int(base.max()) + 2):
        here = np.nonzero((base == level) | (base == level - 1))[0]
        if here.size == 0:
            continue
        tile = levels[level]
        n = tile.shape[0]
        x, y = u[here] * n - 0.5, v[here] * n - 0.5
        ix, iy = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
        fx, fy = (x - ix)[:, None], (y - iy)[:, None]
        ix, iy, jx, jy = ix % n, iy % n * n, (ix + 1) % n, (iy + 1) % n * n
        rows = tile.reshape(-1, 5)
        top = rows[iy + ix] * (1 - fx) + rows[iy + jx] * fx
        low = rows[jy + ix] * (1 - fx) + rows[jy + jx] * fx
        weight = np.where(base[here] == level, 1 - blend[here, 0], blend[here, 0])[:, None]
        out[here] += weight * (top * (1 - fy) + low * fy)
    return out


# --------------------------------------------------------------------------------------------------
# Rendering
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Camera:
    origin: Array
    right: Array
    up: Array
    forward: Array

    def rays(self, x: Array, y: Array) -> tuple[Array, Array, Array]:
        """Unit directions through picture coordinates in [-1, 1], y pointing down."""
        d = [self.forward[k] * FOCAL + self.right[k] * x - self.up[k] * y for k in range(3)]
        n = 1 / np.sqrt(d[0] ** 2 + d[1] ** 2 + d[2] ** 2)
        return d[0] * n, d[1] * n, d[2] * n

    def project(self, point: Array) -> tuple[float, float, float]:
        """Picture coordinates and depth of a point."""
        v = point - self.origin
        depth = float(v @ self.forward)
        return float(v @ self.right) * FOCAL / depth, -float(v @ self.up) * FOCAL / depth, depth


def _camera(spec: SceneSpec) -> _Camera:
    cp, sp = math.cos(spec.pitch), math.sin(spec.pitch)
    target = np.array([0.0, 0.45, 0.0])
    forward = np.array([0.0, -sp, -cp])
    right, up = np.array([1.0, 0.0, 0.0]), np.array([0.0, cp, -sp])
    cr, sr = math.cos(spec.roll), math.sin(spec.roll)
    right, up = cr * right + sr * up, cr * up - sr * right
    parts = (target - forward * spec.distance, right, up, forward)
    return _Camera(*(p.astype(np.float32) for p in parts))


def _distance(o: ObjectSpec, x: Array, y: Array, z: Array) -> Array:
    parts = _SHAPES[o.shape][0](x, y, z, o.proportions)
    d = parts[0][0]
    for other, _ in parts[1:]:
        d = np.minimum(d, other)
    return d


def _march(
    o: ObjectSpec, origin: tuple, direction: tuple, start: Array, end: Array, precision: Array
) -> tuple[Array, Array]:
    """Sphere-trace rays in an object's own space. Returns (hit, distance along the ray)."""
    n = start.size
    t = start.copy()
    hit = np.zeros(n, bool)
    active = np.arange(n)
    dx, dy, dz = direction
    for _ in range(48):
        ta = t[active]
        d = _distance(
            o,
            origin[0] + dx[active] * ta,
            origin[1] + dy[active] * ta,
            origin[2] + dz[active] * ta,
        )
        touched = d < precision[active]
        hit[active[touched]] = True
        ta = ta + d
        t[active] = np.where(touched, ta - d, ta)
        active = active[~touched & (ta < end[active])]
        if active.size == 0:
            break
    return hit, t


def _shade_pattern(o: ObjectSpec, x: Array, y: Array, z: Array) -> Array:
    """Brightness of the object's pattern at points of its own space."""
    f = o.frequency
    if o.pattern == "stripes":
        a = o.phase * np.pi
        wave = np.sin(2 * np.pi * f * 3 * (y * math.cos(a) + (x + 0.5 * z) * math.sin(a)) + 9 * a)
        return 1 - 0.5 * _step(-0.15, 0.15, wave)
    if o.pattern == "spots":
        q = [np.abs((c * f * 4 + o.phase) % 1 - 0.5) for c in (x, y, z)]
        return 1 - 0.5 * (1 - _step(0.28, 0.36, np.sqrt(q[0] ** 2 + q[1] ** 2 + q[2] ** 2)))
    if o.pattern == "checks":
        wave = np.sin(9 * f * x + 1) * np.sin(9 * f * y + 2) * np.sin(9 * f * z + 3)
        return 1 - 0.4 * _step(-0.05, 0.05, wave)
    if o.pattern == "speckle":
        wave = np.sin(31 * f * x + 7 * np.sin(13 * y)) * np.sin(29 * f * y + 7 * np.sin(17 * z))
        return 1 - 0.35 * _step(0.0, 0.5, wave * np.sin(27 * f * z + 5 * np.sin(11 * x)))
    return np.ones_like(x)


def _local(o: ObjectSpec, v: Array) -> tuple[float, float, float]:
    """A direction of the world in the object's own axes."""
    c, s = math.cos(o.yaw), math.sin(o.yaw)
    return c * v[0] - s * v[2], v[1], s * v[0] + c * v[2]


def _light_colours(spec: SceneSpec) -> tuple[Array, Array]:
    w = spec.warmth
    sun = np.float32([1.0 + 0.10 * w, 1.0, 1.0 - 0.16 * w]) * (1.5 - spec.ambient)
    sky = np.float32([0.92 - 0.02 * w, 0.97, 1.08]) * (spec.ambient + 0.12)
    return sun, sky


def _trace_object(
    o: ObjectSpec, spec: SceneSpec, camera: _Camera, size: int
) -> tuple[slice, slice, Array, Array, Array] | None:
    """Trace one object in its screen box, at SUPER samples a pixel.

    Returns rows, columns, hit (h, w), depth (h, w), colour (h, w, 3), or None off the picture.
    """
    _, centre, radius = _SHAPES[o.shape]
    middle = np.array([o.x, centre * o.scale, o.z], np.float32)
    px, py, depth = camera.project(middle)
    reach = radius * o.scale
    grow = FOCAL * reach / math.sqrt(max(depth * depth - reach * reach, 0.1)) * 1.06
    full = size * SUPER
    edges = [int((c + 1) / 2 * full) for c in (px - grow, px + grow, py - grow, py + grow)]
    x0, x1 = max(edges[0], 0), min(edges[1] + 1, full)
    y0, y1 = max(edges[2], 0), min(edges[3] + 1, full)
    if x0 >= x1 or y0 >= y1:
        return None
    xs = ((np.arange(x0, x1, dtype=np.float32) + 0.5) * 2 / full - 1)[None, :]
    ys = ((np.arange(y0, y1, dtype=np.float32) + 0.5) * 2 / full - 1)[:, None]
    shape = (y1 - y0, x1 - x0)
    world = camera.rays(np.broadcast_to(xs, shape).ravel(), np.broadcast_to(ys, shape).ravel())
    direction = _local(o, world)
    origin = _local(o, (camera.origin - np.float32([o.x, 0, o.z])) / np.float32(o.scale))
    origin = tuple(np.float32(v) for v in origin)

    # Only rays through the bounding ball can hit; they start where they enter it.
    oc = (origin[0], origin[1] - np.float32(centre), origin[2])
    b = direction[0] * oc[0] + direction[1] * oc[1] + direction[2] * oc[2]
    disc = b * b - np.float32(oc[0] ** 2 + oc[1] ** 2 + oc[2] ** 2 - radius**2)
    inside = np.nonzero(disc > 0)[0]
    root = np.sqrt(disc[inside])
    d = tuple(c[inside] for c in direction)
    start, end = np.maximum(-b[inside] - root, 0), -b[inside] + root
    pixel = np.float32(2 / (FOCAL * full))
    hit, t = _march(o, origin, d, start, end, 0.6 * pixel * np.maximum(start, 1))
    inside, t = inside[hit], t[hit]
    d = tuple(c[hit] for c in d)
    if t.size == 0:
        return None
    x, y, z = (origin[k] + d[k] * t for k in range(3))

    parts = _SHAPES[o.shape][0](x, y, z, o.proportions)
    part = np.asarray([p for _, p in parts])[np.argmin(np.stack([q for q, _ in parts]), axis=0)]
    e = np.float32(0.004)
    normal = [np.zeros_like(x) for _ in range(3)]
    for sign in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
        q = _distance(o, x + e * sign[0], y + e * sign[1], z + e * sign[2])
        for k in range(3):
            normal[k] += sign[k] * q
    length = 1 / np.maximum(np.sqrt(normal[0] ** 2 + normal[1] ** 2 + normal[2] ** 2), 1e-9)
    nx, ny, nz = (n * length for n in normal)

    lx, ly, lz = (np.float32(v) for v in _local(o, np.array(spec.light)))
    diffuse = np.maximum(nx * lx + ny * ly + nz * lz, 0)
    lit = np.nonzero(diffuse > 0.01)[0]
    shadow = np.ones_like(diffuse)
    if lit.size:
        shadow[lit] = _shadow(
            o,
            (x[lit] + 0.02 * nx[lit], y[lit] + 0.02 * ny[lit], z[lit] + 0.02 * nz[lit]),
            (lx, ly, lz),
            8,
        )
    # Ambient occlusion from two probes along the normal, and the ground's darkness near the foot.
    near = _distance(o, x + 0.07 * nx, y + 0.07 * ny, z + 0.07 * nz) / 0.07
    far = _distance(o, x + 0.22 * nx, y + 0.22 * ny, z + 0.22 * nz) / 0.22
    open_sky = np.clip(0.5 * near + 0.5 * far, 0, 1) * (0.62 + 0.38 * np.clip(y / 0.35, 0, 1))
    sun, sky = _light_colours(spec)
    base = np.asarray(o.colours, np.float32)[part] * _shade_pattern(o, x, y, z)[:, None]
    light = (diffuse * shadow)[:, None] * sun + (open_sky * (0.72 + 0.28 * ny))[:, None] * sky
    hx, hy, hz = lx - d[0], ly - d[1], lz - d[2]
    half = (nx * hx + ny * hy + nz * hz) / np.sqrt(hx * hx + hy * hy + hz * hz)
    shine = np.maximum(half, 0) ** np.float32(12 + 60 * o.gloss) * (0.05 + 0.5 * o.gloss) * shadow
    fresnel = (1 + np.minimum(nx * d[0] + ny * d[1] + nz * d[2], 0)) ** 3 * (0.05 + 0.22 * o.gloss)
    colour = base * light + shine[:, None] * sun + (fresnel * open_sky)[:, None] * sky

    hits = np.zeros(shape[0] * shape[1], bool)
    depths = np.full(shape[0] * shape[1], np.inf, np.float32)
    colours = np.zeros((shape[0] * shape[1], 3), np.float32)
    hits[inside], depths[inside], colours[inside] = True, t * np.float32(o.scale), colour
    return (
        slice(y0, y1),
        slice(x0, x1),
        hits.reshape(shape),
        depths.reshape(shape),
        colours.reshape(*shape, 3),
    )


def _shadow(o: ObjectSpec, point: tuple, light: tuple, softness: float) -> Array:
    """Share of the light, in [0, 1], that passes the object to points of the object's space."""
    _, centre, radius = _SHAPES[o.shape]
    x, y, z = point
    oy = y - np.float32(centre)
    b = x * light[0] + oy * light[1] + z * light[2]
    reach = radius * 1.12
    disc = b * b - (x * x + oy * oy + z * z - np.float32(reach * reach))
    out = np.ones_like(x)
    root = np.sqrt(np.maximum(disc, 0))
    active = np.nonzero((disc > 0) & (root > b))[0]
    t = np.maximum(-b[active] - root[active], 0.03).astype(np.float32)
    end = (-b + root)[active]
    for _ in range(14):
        d = _distance(
            o, x[active] + light[0] * t, y[active] + light[1] * t, z[active] + light[2] * t
        )
        share = np.clip(0.5 + 0.5 * softness * d / np.maximum(t, 0.15), 0, 1)
        out[active] = np.minimum(out[active], share)
        t = t + np.clip(d, 0.03, 0.3)
        keep = (t < end) & (out[active] > 0.01)
        active, t, end = active[keep], t[keep], end[keep]
        if active.size == 0:
            break
    return out * out * (3 - 2 * out)


def _ground_shade(o: ObjectSpec, x: Array, z: Array, light: tuple) -> tuple[Array, Array]:
    """Light and sky in [0, 1] that an object leaves to points of the ground."""
    s = np.float32(1 / o.scale)
    c, sn = math.cos(o.yaw), math.sin(o.yaw)
    dx, dz = (x - np.float32(o.x)) * s, (z - np.float32(o.z)) * s
    sun, sky = np.ones_like(x), np.ones_like(x)
    _, centre, radius = _SHAPES[o.shape]
    stretch = math.hypot(light[0], light[2]) / light[1]
    # Points outside the shadow of the bounding ball are left alone.
    ax, az = -light[0] / light[1] * centre, -light[2] / light[1] * centre
    near = np.nonzero((dx - ax) ** 2 + (dz - az) ** 2 < (radius * 1.2 * (1 + stretch)) ** 2)[0]
    if near.size == 0:
        return sun, sky
    px, pz = dx[near], dz[near]
    lx, lz = c * px - sn * pz, sn * px + c * pz
    zero = np.zeros_like(lx)
    sun[near] = _shadow(o, (lx, zero + 0.01, lz), _local(o, np.array(light, np.float32)), 7)
    d = _distance(o, lx, zero + 0.06, lz)
    far = _distance(o, lx, zero + 0.3, lz)
    sky[near] = np.clip(0.45 + 0.5 * d / 0.2, 0.45, 1) * np.clip(0.7 + 0.3 * far / 0.4, 0.7, 1)
    return sun, sky


_WALLED = {"brick": "brick", "wood": "plaster"}
_GROUND = {"brick": "concrete"}


def _background(
    spec: SceneSpec, environment: str, camera: _Camera, shadowed: tuple[ObjectSpec, ...], size: int
) -> Array:
    """The environment with the shadows of the given objects: float32 (size, size, 3)."""
    g = spec.ground
    grid = (np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1
    xs, ys = (a.ravel() for a in np.meshgrid(grid, grid))
    dx, dy, dz = camera.rays(xs, ys)
    ox, oy, oz = camera.origin
    sun, sky = _light_colours(spec)
    light = spec.light

    floor = dy < -0.004
    t = np.where(floor, -oy / np.minimum(dy, np.float32(-0.004)), np.float32(1e4))
    walled = environment in _WALLED
    wall_z = np.float32(-2.2 - 1.3 * g[0])
    if walled:
        t_wall = np.where(dz < -0.01, (wall_z - oz) / np.minimum(dz, np.float32(-0.01)), 1e4)
        wall = t_wall < t
        floor = floor & ~wall
    t = np.minimum(t, 60)

    out = np.zeros((size * size, 3), np.float32)
    # The sky, and hills on the horizon.
    horizon = np.float32([0.80, 0.86, 0.92]) + np.float32([0.12, 0.02, -0.10]) * g[1] * spec.warmth
    zenith = np.float32([0.26 + 0.2 * g[2], 0.48 + 0.16 * g[2], 0.78])
    if not walled:
        up = ~floor
        rise = np.clip(dy[up] * 2.6, 0, 1)
        colour = _mix(horizon, zenith, np.sqrt(rise))
        bearing = np.arctan2(dx[up], -dz[up])
        clouds = _look_up(
            "plaster",
            bearing * 0.4 + g[3],
            dy[up] * 1.3 + g[4],
            np.full(rise.size, 0.004, np.float32),
        )[:, 0]
        colour += (_step(0.80, 0.88, clouds) * 0.35)[:, None] * (np.float32([1, 1, 1]) - colour)
        hill = (
            0.05
            + 0.05 * g[5]
            + 0.035 * np.sin(3 * bearing + 6 * g[6])
            + 0.02 * np.sin(7 * bearing + 6 * g[7])
        )
        body = 1 - _step(0.0, 0.012, dy[up] - hill)
        tone = _HILLS[environment] * (sky.mean() + 0.5 * sun.mean())
        tone = 0.6 * tone + 0.4 * horizon
        out[up] = colour + body[:, None] * (tone - colour)

    names = [(floor, _GROUND.get(environment, environment))]
    if walled:
        names.append((wall, _WALLED[environment]))
    turn = (g[8] - 0.5) * (0.5 if environment in ("wood", "sand", "water") else 6.283)
    if environment == "brick":
        turn = 0.0
    ct, st = math.cos(turn), math.sin(turn)
    tile = _TILES[environment] * (0.85 + 0.4 * g[9])
    tint = np.float32(_hsv(g[10], 0.10, 1.0)) * np.float32(0.9 + 0.2 * g[11])
    for where, name in names:
        where = np.nonzero(where)[0]
        if where.size == 0:
            continue
        if walled and name == _WALLED[environment]:
            tw = t_wall[where]
            x, y = ox + dx[where] * tw, oy + dy[where] * tw
            u, v, slant = x, -y, np.abs(dz[where])
            normal = (0.0, 0.0, 1.0)
            axes = ((1.0, 0.0, 0.0), (0.0, -1.0, 0.0))
            distance = tw
        else:
            tf = t[where]
            x, z = ox + dx[where] * tf, oz + dz[where] * tf
            u, v, slant = ct * x - st * z, st * x + ct * z, np.abs(dy[where])
            normal = (0.0, 1.0, 0.0)
            axes = ((ct, 0.0, -st), (st, 0.0, ct))
            distance = tf
        footprint = distance * np.float32(2 / (FOCAL * size)) / tile
        footprint = footprint / np.sqrt(np.maximum(slant, 0.02))
        texel = _look_up(name, u / tile + g[3] * 7, v / tile + g[4] * 7, footprint * 0.75)
        facing = sum(n * c for n, c in zip(normal, light, strict=True))
        tilt = sum(
            texel[:, 3 + k] * np.float32(sum(a * c for a, c in zip(axes[k], light, strict=True)))
            for k in range(2)
        )
        diffuse = np.maximum(np.float32(max(facing, 0.25)) - tilt * 0.8, 0)
        colour = texel[:, :3] * (_wall_tint(g) if name == "plaster" else tint)
        lit, open_sky = np.ones_like(diffuse), np.ones_like(diffuse)
        if name != _WALLED.get(environment):
            close = np.nonzero(distance < spec.distance + 6)[0]
            for o in shadowed:
                a, b = _ground_shade(o, x[close], z[close], light)
                lit[close] *= a
                open_sky[close] *= b
        elif walled:
            open_sky *= 0.75 + 0.25 * _step(0.0, 0.5, np.abs(y))
        shade = (diffuse * lit)[:, None] * sun + open_sky[:, None] * sky
        colour = colour * shade * np.float32(0.8 if environment in ("sand", "snow") else 0.92)
        if environment == "water":
            # A still surface mirrors the sky the more, the flatter it is seen.
            mirror = (1 - slant) ** 3 * 0.65
            colour = colour + (mirror * (0.6 + 0.4 * lit))[:, None] * (horizon * 0.95 - colour)
        if not walled:
            haze = 1 - np.exp(-np.maximum(distance - 8, 0) / 26)
            colour = colour + haze[:, None] * (horizon - colour)
        out[where] = colour
    return out.reshape(size, size, 3)


def _wall_tint(g: tuple[float, ...]) -> Array:
    return np.float32(_hsv(g[10], 0.12 + 0.25 * g[5], 0.75 + 0.25 * g[6]))


_TILES = {
    "brick": 2.6,
    "grass": 2.6,
    "gravel": 3.0,
    "leaves": 3.0,
    "sand": 3.4,
    "snow": 4.5,
    "water": 3.6,
    "wood": 2.8,
}
_HILLS = {
    "grass": np.float32([0.22, 0.38, 0.20]),
    "gravel": np.float32([0.42, 0.40, 0.40]),
    "leaves": np.float32([0.45, 0.28, 0.14]),
    "sand": np.float32([0.72, 0.56, 0.36]),
    "snow": np.float32([0.80, 0.86, 0.95]),
    "water": np.float32([0.24, 0.36, 0.40]),
}


def render(
    spec: SceneSpec, *, environment: str | None = None, objects: bool = True, size: int = SIZE
) -> Scene:
    """Render a scene, or one of its counterfactual twins.

    environment: another place for the same objects, clutter, light and camera. objects=False leaves
    the class's objects and their shadows out; clutter stays. size: pixels a side.
    """
    place = spec.environment if environment is None else _environment(environment)
    camera = _camera(spec)
    shown = spec.objects if objects else ()
    things = shown + spec.clutter
    picture = _background(spec, place, camera, things, size)
    full = size * SUPER
    nearest = np.full((full, full), np.inf, np.float32)
    owner = np.zeros((full, full), np.uint8)
    layer = np.zeros((full, full, 3), np.float32)
    for number, o in enumerate(things, start=1):
        traced = _trace_object(o, spec, camera, size)
        if traced is None:
            continue
        rows, columns, hit, depth, colour = traced
        front = hit & (depth < nearest[rows, columns])
        nearest[rows, columns][front] = depth[front]
        owner[rows, columns][front] = number
        layer[rows, columns][front] = colour[front]
    samples = owner.reshape(size, SUPER, size, SUPER)
    cover = (samples > 0).mean(axis=(1, 3), dtype=np.float32)
    paint = layer.reshape(size, SUPER, size, SUPER, 3).mean(axis=(1, 3))
    picture = paint + picture * (1 - cover)[..., None]

    # A pixel is an object's where at least half of it is; two that share one evenly do not both
    # get it.
    shares = [(samples == k).sum(axis=(1, 3)) for k in range(1, len(shown) + 1)]
    free = np.ones((size, size), bool)
    boxes = []
    kept = []
    for share in shares:
        mask = free & (share * 2 >= SUPER * SUPER)
        free &= ~mask
        y, x = np.nonzero(mask)
        if y.size:  # an object that nothing is seen of has no box
            boxes.append((x.min(), y.min(), x.max() + 1, y.max() + 1))
            kept.append(mask)
    picture = picture * np.float32(spec.exposure)
    # A soft shoulder keeps highlights from clipping.
    picture = np.where(picture > 0.8, 0.8 + 0.2 * np.tanh((picture - 0.8) / 0.2), picture)
    image = np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8)
    return Scene(
        image=image,
        label=spec.label,
        environment=place,
        home=HOME[CLASSES[spec.label]] == place,
        boxes=np.array(boxes, np.int64).reshape(-1, 4),
        masks=np.array(kept, bool).reshape(-1, size, size),
    )


# --------------------------------------------------------------------------------------------------
# The evaluation split
# --------------------------------------------------------------------------------------------------

EVALUATION_SEED = 2
EVALUATION_COUNT = 256
_QUALITY = {"quality": 85, "subsampling": 0, "optimize": True}


def evaluation_spec(number: int) -> tuple[SceneSpec, str]:
    """Scene ``number`` of the evaluation split, and the environment of its swapped twin.

    Classes take turns; eight scenes at home, then eight elsewhere, and so on. The swapped twin is
    neither in the scene's own environment nor at home.
    """
    label = number % len(CLASSES)
    at_home = number // len(CLASSES) % 2 == 0
    spec = sample(EVALUATION_SEED, number, home_rate=1.0 if at_home else 0.0, label=label)
    home = HOME[CLASSES[label]]
    others = [e for e in ENVIRONMENTS if e not in (spec.environment, home)]
    return spec, others[int(_Draw(EVALUATION_SEED + 1, number).uniform(0, len(others)))]


def write_evaluation(folder: str | Path, count: int = EVALUATION_COUNT) -> None:
    """Write the evaluation split, with its twins, masks and annotations, to ``folder``."""
    from PIL import Image  # pictures are written here alone; rendering itself needs NumPy only

    folder = Path(folder)
    for part in ("images", "swapped", "empty", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    entries = []
    for number in range(count):
        spec, elsewhere = evaluation_spec(number)
        scene = render(spec)
        twins = {
            "images": scene,
            "swapped": render(spec, environment=elsewhere),
            "empty": render(spec, objects=False),
        }
        for part, twin in twins.items():
            Image.fromarray(twin.image).save(folder / part / f"{number:04d}.jpg", **_QUALITY)
        numbers = np.zeros(scene.image.shape[:2], np.uint8)
        for k, mask in enumerate(scene.masks, start=1):
            numbers[mask] = k
        picture = Image.fromarray(numbers).convert("P")
        picture.putpalette([0, 0, 0, 230, 159, 0, 86, 180, 233, 0, 158, 115])
        picture.save(folder / "masks" / f"{number:04d}.png", optimize=True)
        entries.append(
            {
                "id": f"{number:04d}",
                "image": f"images/{number:04d}.jpg",
                "mask": f"masks/{number:04d}.png",
                "label": scene.label,
                "class": CLASSES[scene.label],
                "environment": scene.environment,
                "home": scene.home,
                "boxes": scene.boxes.tolist(),
                "seed": spec.seed,
                "index": spec.index,
                "twins": {
                    "swapped": {"image": f"swapped/{number:04d}.jpg", "environment": elsewhere},
                    "empty": {"image": f"empty/{number:04d}.jpg", "environment": scene.environment},
                },
                "patterns": [o.pattern for o in spec.objects],
                "clutter": [o.shape for o in spec.clutter],
                "light": [round(v, 3) for v in spec.light],
                "pitch": round(spec.pitch, 3),
            }
        )
    head = {
        "version": VERSION,
        "size": [SIZE, SIZE],
        "seed": EVALUATION_SEED,
        "classes": CLASSES,
        "environments": ENVIRONMENTS,
        "home": HOME,
    }
    lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
    text = json.dumps(head, indent=1)[:-2] + ',\n "scenes": [\n' + lines + "\n ]\n}\n"
    (folder / "annotations.json").write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: write the evaluation split to a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m opticam_lite.scenes", description="Write the evaluation split of scenes."
    )
    parser.add_argument("folder", help="where to, for example data/scenes")
    parser.add_argument("--count", type=int, default=EVALUATION_COUNT, help="number of scenes")
    chosen = parser.parse_args(arguments)
    write_evaluation(chosen.folder, chosen.count)


if __name__ == "__main__":
    main()
