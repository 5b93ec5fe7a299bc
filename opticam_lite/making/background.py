"""Draws an environment: the ground, and behind it a wall, or hills and the sky."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np

from .camera import FOCAL, Camera, light_colours, turned
from .objects import ground_shade
from .sampling import Colour, ObjectSpec, SceneSpec
from .textures import look_up, mix, smoothstep

Array = np.ndarray


@dataclass(frozen=True)
class Place:
    """An environment.

    ground, wall: Names of textures; outdoors there is no wall. tile: Length of a texture's tile.
    turn: The ground is turned by up to half of this angle, either way. albedo: Share of the light that
    ground and wall reflect. hills: Colour of the hills on the horizon.
    """

    ground: str
    tile: float
    turn: float = 6.283
    albedo: float = 0.92
    wall: str | None = None
    hills: Colour = (0.0, 0.0, 0.0)


PLACES: dict[str, Place] = {
    "brick": Place("concrete", 2.6, turn=0, wall="brick"),
    "grass": Place("grass", 2.6, hills=(0.22, 0.38, 0.20)),
    "gravel": Place("gravel", 3.0, hills=(0.42, 0.40, 0.40)),
    "leaves": Place("leaves", 3.0, hills=(0.45, 0.28, 0.14)),
    "sand": Place("sand", 3.4, turn=0.5, albedo=0.8, hills=(0.72, 0.56, 0.36)),
    "snow": Place("snow", 4.5, albedo=0.8, hills=(0.80, 0.86, 0.95)),
    "water": Place("water", 3.6, turn=0.5, hills=(0.24, 0.36, 0.40)),
    "wood": Place("wood", 2.8, turn=0.5, wall="plaster"),
}


def background(
    spec: SceneSpec, environment: str, camera: Camera, things: tuple[ObjectSpec, ...], size: int
) -> Array:
    """Draw the environment with the shadows of things: float32 (size, size, 3)."""
    place = PLACES[environment]
    rays = camera.rays(*np.meshgrid(np.arange(size), np.arange(size)), size)
    _, dy, dz = rays
    floor = dy < -0.004
    distance = np.where(
        floor, -camera.origin[1] / np.minimum(dy, np.float32(-0.004)), np.float32(1e4)
    )
    out = np.zeros((size * size, 3), np.float32)
    if place.wall:
        wall_z = np.float32(-2.2 - 1.3 * spec.ground[0]) - camera.origin[2]
        to_wall = np.where(dz < -0.01, wall_z / np.minimum(dz, np.float32(-0.01)), 1e4)
        wall = to_wall < distance
        floor &= ~wall
        out[wall] = _wall(spec, place, camera, rays[:, wall], to_wall[wall], size)
    else:
        out[~floor] = _sky(spec, place, rays[:, ~floor])
    distance = np.minimum(distance[floor], 60)
    out[floor] = _ground(spec, place, camera, rays[:, floor], distance, things, size)
    return out.reshape(size, size, 3)


def _horizon(spec: SceneSpec) -> Array:
    shift = np.float32([0.12, 0.02, -0.10]) * spec.ground[1] * spec.warmth
    return np.float32([0.80, 0.86, 0.92]) + shift


def _sky(spec: SceneSpec, place: Place, rays: Array) -> Array:
    """Colours ``(n, 3)`` of the sky, its clouds, and the hills on the horizon."""
    g = spec.ground
    dx, dy, dz = rays
    horizon = _horizon(spec)
    zenith = np.float32([0.26 + 0.2 * g[2], 0.48 + 0.16 * g[2], 0.78])
    colour = mix(horizon, zenith, np.sqrt(np.clip(dy * 2.6, 0, 1)))
    bearing = np.arctan2(dx, -dz)
    footprint = np.full(dy.size, 0.004, np.float32)
    clouds = look_up("plaster", bearing * 0.4 + g[3], dy * 1.3 + g[4], footprint)[:, 0]
    colour += (smoothstep(0.80, 0.88, clouds) * 0.35)[:, None] * (1 - colour)
    waves = 0.035 * np.sin(3 * bearing + 6 * g[6]), 0.02 * np.sin(7 * bearing + 6 * g[7])
    hill = 0.05 + 0.05 * g[5] + waves[0] + waves[1]
    sun, sky = light_colours(spec)
    tone = 0.6 * (np.float32(place.hills) * (sky.mean() + 0.5 * sun.mean())) + 0.4 * horizon
    return colour + (1 - smoothstep(0.0, 0.012, dy - hill))[:, None] * (tone - colour)


def _wall(
    spec: SceneSpec, place: Place, camera: Camera, rays: Array, distance: Array, size: int
) -> Array:
    """Colours ``(n, 3)`` of the wall at the ends of rays ``(3, n)`` of given lengths."""
    g = spec.ground
    x, y = (camera.origin[k] + rays[k] * distance for k in (0, 1))
    light = (spec.light[0], -spec.light[1], spec.light[2])
    colour, diffuse = _surface(
        spec, place, place.wall, (x, -y), light, distance, np.abs(rays[2]), size
    )
    if place.wall == "plaster":
        tint = np.float32(colorsys.hsv_to_rgb(g[10], 0.12 + 0.25 * g[5], 0.75 + 0.25 * g[6]))
    else:
        tint = _tint(spec)
    open_sky = 0.75 + 0.25 * smoothstep(0.0, 0.5, np.abs(y))
    sun, sky = light_colours(spec)
    shade = diffuse[:, None] * sun + open_sky[:, None] * sky
    return colour * tint * shade * np.float32(place.albedo)


def _ground(
    spec: SceneSpec,
    place: Place,
    camera: Camera,
    rays: Array,
    distance: Array,
    things: tuple[ObjectSpec, ...],
    size: int,
) -> Array:
    """Colours ``(n, 3)`` of the ground at the ends of rays ``(3, n)`` of given lengths."""
    x, z = (camera.origin[k] + rays[k] * distance for k in (0, 2))
    turn = (spec.ground[8] - 0.5) * place.turn
    light = (*turned(turn, spec.light[0], spec.light[2]), spec.light[1])
    slant = np.abs(rays[1])
    colour, diffuse = _surface(
        spec, place, place.ground, turned(turn, x, z), light, distance, slant, size
    )
    lit, open_sky = np.ones_like(diffuse), np.ones_like(diffuse)
    close = np.nonzero(distance < spec.distance + 6)[0]
    for o in things:
        some_light, some_sky = ground_shade(o, x[close], z[close], spec.light)
        lit[close] *= some_light
        open_sky[close] *= some_sky
    sun, sky = light_colours(spec)
    shade = (diffuse * lit)[:, None] * sun + open_sky[:, None] * sky
    colour = colour * _tint(spec) * shade * np.float32(place.albedo)
    horizon = _horizon(spec)
    if place.ground == "water":
        # A still surface mirrors the sky the more, the flatter it is seen.
        mirror = (1 - slant) ** 3 * 0.65
        colour = colour + (mirror * (0.6 + 0.4 * lit))[:, None] * (horizon * 0.95 - colour)
    if not place.wall:
        haze = 1 - np.exp(-np.maximum(distance - 8, 0) / 26)
        colour = colour + haze[:, None] * (horizon - colour)
    return colour


def _surface(
    spec: SceneSpec,
    place: Place,
    texture: str,
    points: tuple[Array, Array],
    light: tuple[float, float, float],
    distance: Array,
    slant: Array,
    size: int,
) -> tuple[Array, Array]:
    """Return RGB ``(n, 3)`` and the diffuse light ``(n,)`` of a textured plane.

    points: Their coordinates u, v on the plane. light: Direction of the sun along u, along v and
    along the plane's normal. slant: Cosine of the angle between a point's ray and the normal.
    """
    g = spec.ground
    tile = place.tile * (0.85 + 0.4 * g[9])
    footprint = distance * np.float32(2 / (FOCAL * size)) / tile
    footprint = footprint / np.sqrt(np.maximum(slant, 0.02))
    u, v = points[0] / tile + g[3] * 7, points[1] / tile + g[4] * 7
    texel = look_up(texture, u, v, footprint * 0.75)
    tilt = texel[:, 3] * np.float32(light[0]) + texel[:, 4] * np.float32(light[1])
    return texel[:, :3], np.maximum(np.float32(max(light[2], 0.25)) - tilt * 0.8, 0)


def _tint(spec: SceneSpec) -> Array:
    g = spec.ground
    return np.float32(colorsys.hsv_to_rgb(g[10], 0.10, 1.0)) * np.float32(0.9 + 0.2 * g[11])
