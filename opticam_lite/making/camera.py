"""Where a scene is seen from, and the directions and light colours that all its parts share."""

from __future__ import annotations

import math

import numpy as np

from .sampling import SceneSpec

Array = np.ndarray
FOCAL = 2.2  # focal length in half picture widths: a view of about 49 degrees


class Camera:
    """A pinhole camera that looks at a point above the middle of the ground."""

    def __init__(self, spec: SceneSpec) -> None:
        cp, sp = math.cos(spec.pitch), math.sin(spec.pitch)
        cr, sr = math.cos(spec.roll), math.sin(spec.roll)
        forward = np.array([0.0, -sp, -cp])
        level, up = np.array([1.0, 0.0, 0.0]), np.array([0.0, cp, -sp])
        self.origin = np.float32(np.array([0.0, 0.45, 0.0]) - forward * spec.distance)
        self.right = np.float32(cr * level + sr * up)
        self.up = np.float32(cr * up - sr * level)
        self.forward = np.float32(forward)

    def rays(self, columns: Array, rows: Array, size: int) -> Array:
        """Unit directions ``(3, n)`` through the centres of pixels of a picture of ``size``."""
        x, y = ((a.ravel().astype(np.float32) + 0.5) * 2 / size - 1 for a in (columns, rows))
        forward, right, up = (a[:, None] for a in (self.forward, self.right, self.up))
        d = forward * FOCAL + right * x - up * y
        return d * (1 / np.sqrt(dot(d, d)))

    def project(self, point: Array) -> tuple[float, float, float]:
        """Picture coordinates in [-1, 1], y pointing down, and depth of a point."""
        v = point - self.origin
        depth = float(v @ self.forward)
        return float(v @ self.right) * FOCAL / depth, -float(v @ self.up) * FOCAL / depth, depth


def dot(a: Array, b: Array) -> Array:
    """Scalar products of vectors ``(3,)`` or ``(3, n)``."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def turned(angle: float, x: Array, z: Array) -> tuple[Array, Array]:
    """Coordinates of ground points in axes that are turned by an angle about the vertical."""
    c, s = math.cos(angle), math.sin(angle)
    return c * x - s * z, s * x + c * z


def light_colours(spec: SceneSpec) -> tuple[Array, Array]:
    """RGB of the sun's and of the sky's light."""
    w = spec.warmth
    sun = np.float32([1.0 + 0.10 * w, 1.0, 1.0 - 0.16 * w]) * (1.5 - spec.ambient)
    sky = np.float32([0.92 - 0.02 * w, 0.97, 1.08]) * (spec.ambient + 0.12)
    return sun, sky
