"""The shapes of the objects, as signed distance functions.

A shape takes the coordinates (x, y, z) of points, float32 arrays of one shape, and three numbers
``p`` in [0, 1) that vary its proportions. It returns its parts as a list of (distance, colour): the
signed distances of the points to the part, and which of the object's three colours (0, 1, 2) the
part has. The ground is y = 0, the shape stands on it and is about one unit tall.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import numpy as np

Array = np.ndarray
Proportions = tuple[float, float, float]


def _rounded(faces: list[Array], r: float) -> Array:
    """Distance to a box with edges rounded by r.

    faces: For each axis, signed distances to the faces of the box that is smaller by r.
    """
    inside = np.minimum(reduce(np.maximum, faces), 0)
    return np.sqrt(sum(np.maximum(q, 0) ** 2 for q in faces)) + (inside - r)


def _box(x: Array, y: Array, z: Array, a: float, b: float, c: float, r: float = 0.03) -> Array:
    """Distance to a box of half sizes (a, b, c) at the origin, edges rounded by r."""
    return _rounded([np.abs(x) - (a - r), np.abs(y) - (b - r), np.abs(z) - (c - r)], r)


def _rect(u: Array, v: Array, a: float, b: float, r: float = 0.02) -> Array:
    """Distance to a rectangle in the plane; with u a radius, to a cylinder."""
    return _rounded([np.abs(u) - (a - r), np.abs(v) - (b - r)], r)


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
    back, side = x + deep - 0.05, np.abs(z) - wide + 0.06
    above, half = y - (seat_y + top) / 2, (top - seat_y) / 2
    seat = _box(x, y - seat_y, z, deep, 0.05, wide)
    leg = _box(np.abs(x) - deep + 0.06, y - seat_y / 2, side, 0.05, seat_y / 2, 0.05)
    post = _box(back, above, side, 0.05, half, 0.05)
    rail = _box(back, y - top + 0.13, z, 0.035, 0.13, wide)
    if p[0] < 0.5:
        bar = _box(back, above + 0.06, z, 0.03, 0.05, wide)
    else:
        bar = _box(back, above, np.abs(z) - 0.1, 0.03, half, 0.03, 0.02)
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


class Shape(NamedTuple):
    """A shape and its bounding ball, whose centre is above the origin.

    parts: The function described at the top of this file. centre: Height of the ball's centre.
    radius: Its radius.
    """

    parts: Callable[..., list[tuple[Array, int]]]
    centre: float
    radius: float

    def distance(self, points: Array, p: Proportions) -> Array:
        """Signed distances ``(n,)`` of points ``(3, n)`` to the nearest part."""
        return reduce(np.minimum, (distance for distance, _ in self.parts(*points, p)))


SHAPES: dict[str, Shape] = {
    "aeroplane": Shape(_aeroplane, 0.4, 0.95),
    "car": Shape(_car, 0.42, 0.96),
    "chair": Shape(_chair, 0.62, 0.86),
    "duck": Shape(_duck, 0.52, 0.86),
    "house": Shape(_house, 0.58, 0.92),
    "lamp": Shape(_lamp, 0.7, 0.82),
    "mug": Shape(_mug, 0.5, 0.85),
    "mushroom": Shape(_mushroom, 0.56, 0.8),
    "sphere": Shape(_sphere, 0.5, 0.52),
    "block": Shape(_block, 0.4, 0.82),
    "stick": Shape(_stick, 0.12, 0.87),
    "drum": Shape(_drum, 0.5, 0.7),
    "pyramid": Shape(_pyramid, 0.45, 0.7),
}
CLUTTER = ("sphere", "block", "stick", "drum", "pyramid")  # shapes of no class
