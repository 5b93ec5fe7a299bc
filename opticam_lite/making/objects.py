"""Draws objects by sphere tracing: their visible pixels and the shadows they cast."""

from __future__ import annotations

import math

import numpy as np

from .camera import FOCAL, Camera, dot, light_colours, turned
from .sampling import ObjectSpec, SceneSpec
from .shapes import SHAPES
from .textures import smoothstep

Array = np.ndarray


def _own_axes(o: ObjectSpec, v: Array) -> Array:
    """Turn vectors of the world, ``(3,)`` or ``(3, n)``, into the object's own axes."""
    x, z = turned(o.yaw, v[0], v[2])
    return np.array([x, v[1], z])


def _distance(o: ObjectSpec, points: Array) -> Array:
    return SHAPES[o.shape].distance(points, o.proportions)


def trace(o: ObjectSpec, spec: SceneSpec, camera: Camera, size: int) -> tuple[Array, Array, Array]:
    """Trace one object in a picture of size × size pixels.

    Returns, of the n pixels that show it, their indices ``(n,)`` in the flattened picture, the
    depth ``(n,)`` and the colour ``(n, 3)``.
    """
    shape = SHAPES[o.shape]
    middle = np.array([o.x, shape.centre * o.scale, o.z], np.float32)
    px, py, depth = camera.project(middle)
    reach = shape.radius * o.scale
    grow = FOCAL * reach / math.sqrt(max(depth * depth - reach * reach, 0.1)) * 1.06
    x0, x1, y0, y1 = (int((c + 1) / 2 * size) for c in (px - grow, px + grow, py - grow, py + grow))
    columns, rows = np.meshgrid(
        np.arange(max(x0, 0), min(x1 + 1, size)), np.arange(max(y0, 0), min(y1 + 1, size))
    )
    pixels = (rows * size + columns).ravel()
    direction = _own_axes(o, camera.rays(columns, rows, size))
    origin = _own_axes(o, (camera.origin - np.float32([o.x, 0, o.z])) / np.float32(o.scale))

    # Only rays through the bounding ball can hit; they start where they enter it.
    from_centre = origin - np.float32([0, shape.centre, 0])
    b = dot(direction, from_centre)
    disc = b * b - np.float32(dot(from_centre, from_centre) - shape.radius**2)
    inside = np.nonzero(disc > 0)[0]
    direction, root = direction[:, inside], np.sqrt(disc[inside])
    start, end = np.maximum(-b[inside] - root, 0), -b[inside] + root
    precision = 0.6 * np.float32(2 / (FOCAL * size)) * np.maximum(start, 1)
    hit, t = _march(o, origin[:, None], direction, start, end, precision)
    direction, t = direction[:, hit], t[hit]
    colour = _colour(o, spec, origin[:, None] + direction * t, direction)
    return pixels[inside[hit]], t * np.float32(o.scale), colour


def _march(
    o: ObjectSpec, origin: Array, direction: Array, start: Array, end: Array, precision: Array
) -> tuple[Array, Array]:
    """Sphere-trace rays in an object's own space. Returns (hit, distance along the ray)."""
    t = start.copy()
    hit = np.zeros(t.size, bool)
    active = np.arange(t.size)
    for _ in range(48):
        d = _distance(o, origin + direction[:, active] * t[active])
        touched = d < precision[active]
        hit[active[touched]] = True
        further = t[active] + d
        t[active] = np.where(touched, further - d, further)
        active = active[~touched & (further < end[active])]
    return hit, t


def _colour(o: ObjectSpec, spec: SceneSpec, points: Array, direction: Array) -> Array:
    """Colours ``(n, 3)`` of points on the surface, seen along the directions ``(3, n)``."""
    distances, numbers = zip(*SHAPES[o.shape].parts(*points, o.proportions), strict=True)
    part = np.array(numbers)[np.argmin(distances, axis=0)]
    # The gradient of the distance from four probes, the corners of a tetrahedron.
    normal = np.zeros_like(points)
    for corner in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
        sign = np.float32(corner)[:, None]
        normal += sign * _distance(o, points + np.float32(0.004) * sign)
    normal = normal * (1 / np.maximum(np.sqrt(dot(normal, normal)), 1e-9))

    light = np.float32(_own_axes(o, np.array(spec.light)))
    diffuse = np.maximum(dot(normal, light), 0)
    lit = np.nonzero(diffuse > 0.01)[0]
    shadow = np.ones_like(diffuse)
    shadow[lit] = _shadow(o, points[:, lit] + 0.02 * normal[:, lit], light, 8)
    # Ambient occlusion from two probes along the normal, and darkening near the ground.
    near, far = (_distance(o, points + reach * normal) / reach for reach in (0.07, 0.22))
    foot = 0.62 + 0.38 * np.clip(points[1] / 0.35, 0, 1)
    open_sky = np.clip(0.5 * near + 0.5 * far, 0, 1) * foot

    sun, sky = light_colours(spec)
    base = np.asarray(o.colours, np.float32)[part] * _pattern(o, points)[:, None]
    ambient = open_sky * (0.72 + 0.28 * normal[1])
    received = (diffuse * shadow)[:, None] * sun + ambient[:, None] * sky
    half = light[:, None] - direction
    shine = np.maximum(dot(normal, half) / np.sqrt(dot(half, half)), 0)
    shine = shine ** np.float32(12 + 60 * o.gloss) * (0.05 + 0.5 * o.gloss) * shadow
    fresnel = (1 + np.minimum(dot(normal, direction), 0)) ** 3 * (0.05 + 0.22 * o.gloss)
    return base * received + shine[:, None] * sun + (fresnel * open_sky)[:, None] * sky


def _pattern(o: ObjectSpec, points: Array) -> Array:
    """Brightness of the object's pattern at points of its own space."""
    x, y, z = points
    f = o.frequency
    if o.pattern == "stripes":
        a = o.phase * np.pi
        wave = np.sin(2 * np.pi * f * 3 * (y * math.cos(a) + (x + 0.5 * z) * math.sin(a)) + 9 * a)
        return 1 - 0.5 * smoothstep(-0.15, 0.15, wave)
    if o.pattern == "spots":
        q = np.abs((points * f * 4 + o.phase) % 1 - 0.5)
        return 1 - 0.5 * (1 - smoothstep(0.28, 0.36, np.sqrt(dot(q, q))))
    if o.pattern == "checks":
        wave = np.sin(9 * f * x + 1) * np.sin(9 * f * y + 2) * np.sin(9 * f * z + 3)
        return 1 - 0.4 * smoothstep(-0.05, 0.05, wave)
    if o.pattern == "speckle":
        wave = np.sin(31 * f * x + 7 * np.sin(13 * y)) * np.sin(29 * f * y + 7 * np.sin(17 * z))
        return 1 - 0.35 * smoothstep(0.0, 0.5, wave * np.sin(27 * f * z + 5 * np.sin(11 * x)))
    return np.ones_like(x)


def _shadow(o: ObjectSpec, points: Array, light: Array, softness: float) -> Array:
    """Share of the light, in [0, 1], that passes the object to points of the object's space."""
    shape = SHAPES[o.shape]
    x, y, z = points[0], points[1] - np.float32(shape.centre), points[2]
    b = x * light[0] + y * light[1] + z * light[2]
    reach = shape.radius * 1.12
    disc = b * b - (x * x + y * y + z * z - np.float32(reach * reach))
    out = np.ones_like(x)
    root = np.sqrt(np.maximum(disc, 0))
    active = np.nonzero((disc > 0) & (root > b))[0]
    t = np.maximum(-b[active] - root[active], 0.03).astype(np.float32)
    end = (-b + root)[active]
    for _ in range(14):
        d = _distance(o, points[:, active] + light[:, None] * t)
        share = np.clip(0.5 + 0.5 * softness * d / np.maximum(t, 0.15), 0, 1)
        out[active] = np.minimum(out[active], share)
        t = t + np.clip(d, 0.03, 0.3)
        keep = (t < end) & (out[active] > 0.01)
        active, t, end = active[keep], t[keep], end[keep]
    return smoothstep(0, 1, out)


def ground_shade(o: ObjectSpec, x: Array, z: Array, light: tuple) -> tuple[Array, Array]:
    """Shares in [0, 1] of sun and sky light that reach points of the ground past an object."""
    shape, scale = SHAPES[o.shape], np.float32(1 / o.scale)
    x, z = (x - np.float32(o.x)) * scale, (z - np.float32(o.z)) * scale
    # Points outside the shadow of the bounding ball are fully lit.
    ball_x, ball_z = -light[0] / light[1] * shape.centre, -light[2] / light[1] * shape.centre
    reach = shape.radius * 1.2 * (1 + math.hypot(light[0], light[2]) / light[1])
    near = np.nonzero((x - ball_x) ** 2 + (z - ball_z) ** 2 < reach**2)[0]
    ground = _own_axes(o, np.array([x[near], np.zeros_like(x[near]), z[near]]))
    up = np.float32([[0], [1], [0]])
    sun, sky = np.ones_like(x), np.ones_like(x)
    sun[near] = _shadow(o, ground + 0.01 * up, _own_axes(o, np.array(light, np.float32)), 7)
    low, high = _distance(o, ground + 0.06 * up), _distance(o, ground + 0.3 * up)
    sky[near] = np.clip(0.45 + 0.5 * low / 0.2, 0.45, 1) * np.clip(0.7 + 0.3 * high / 0.4, 0.7, 1)
    return sun, sky
