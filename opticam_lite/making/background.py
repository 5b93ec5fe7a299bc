"""Draws an environment: the ground, and behind it a wall, or hills and the sky."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np

from . import textures
from .camera import FOCAL, Camera, light_colours, turned
from .objects import ground_shade
from .sampling import Colour, ObjectSpec, SceneSpec
from .textures import Texture, look_up, mix, smoothstep

Array = np.ndarray


@dataclass(frozen=True)
class Place:
    """An environment.

    ground, wall: Their textures; outdoors there is no wall. tile: Length of a texture's tile.
    turn: The ground is turned by up to half of this angle, either way. albedo: Share of the light
    that ground and wall reflect. hills: Colour of the hills on the horizon.
    """

    ground: Texture
    tile: float
    turn: float = 6.283
    albedo: float = 0.92
    wall: Texture | None = None
    hills: Colour = (0.0, 0.0, 0.0)


PLACES: dict[str, Place] = {
    "brick": Place(textures.concrete, 2.6, turn=0, wall=textures.brick),
    "grass": Place(textures.grass, 2.6, hills=(0.22, 0.38, 0.20)),
    "gravel": Place(textures.gravel, 3.0, hills=(0.42, 0.40, 0.40)),
    "leaves": Place(textures.leaves, 3.0, hills=(0.45, 0.28, 0.14)),
    "sand": Place(textures.sand, 3.4, turn=0.5, albedo=0.8, hills=(0.72, 0.56, 0.36)),
    "snow": Place(textures.snow, 4.5, albedo=0.8, hills=(0.80, 0.86, 0.95)),
    "water": Place(textures.water, 3.6, turn=0.5, hills=(0.24, 0.36, 0.40)),
    "wood": Place(textures.wood, 2.8, turn=0.5, wall=textures.plaster),
}


class Background:
    """An environment as a scene's camera sees it in the scene's light, size × size pixels."""

    def __init__(self, spec: SceneSpec, environment: str, camera: Camera, size: int) -> None:
        g = spec.ground
        self.spec, self.place, self.camera, self.size = spec, PLACES[environment], camera, size
        self.sun, self.sky = light_colours(spec)
        haze = np.float32([0.12, 0.02, -0.10]) * g[1] * spec.warmth
        self.horizon = np.float32([0.80, 0.86, 0.92]) + haze
        tint = np.float32(colorsys.hsv_to_rgb(g[10], 0.10, 1.0))
        self.tint = tint * np.float32(0.9 + 0.2 * g[11])

    def draw(self, things: tuple[ObjectSpec, ...]) -> Array:
        """Draw it with the shadows of things on the ground: float32 (size, size, 3)."""
        size, origin = self.size, self.camera.origin
        rays = self.camera.rays(*np.meshgrid(np.arange(size), np.arange(size)), size)
        _, dy, dz = rays
        floor = dy < -0.004
        to_floor = -origin[1] / np.minimum(dy, np.float32(-0.004))
        distance = np.where(floor, to_floor, np.float32(1e4))
        out = np.zeros((size * size, 3), np.float32)
        if self.place.wall:
            wall_z = np.float32(-2.2 - 1.3 * self.spec.ground[0])
            to_wall = (wall_z - origin[2]) / np.minimum(dz, np.float32(-0.01))
            to_wall = np.where(dz < -0.01, to_wall, 1e4)
            wall = to_wall < distance
            floor &= ~wall
            out[wall] = self._wall(rays[:, wall], to_wall[wall])
        else:
            out[~floor] = self._sky(rays[:, ~floor])
        out[floor] = self._ground(rays[:, floor], np.minimum(distance[floor], 60), things)
        return out.reshape(size, size, 3)

    def _sky(self, rays: Array) -> Array:
        """Colours ``(n, 3)`` of the sky, its clouds, and the hills on the horizon."""
        g = self.spec.ground
        dx, dy, dz = rays
        zenith = np.float32([0.26 + 0.2 * g[2], 0.48 + 0.16 * g[2], 0.78])
        colour = mix(self.horizon, zenith, np.sqrt(np.clip(dy * 2.6, 0, 1)))
        bearing = np.arctan2(dx, -dz)
        footprint = np.full(dy.size, 0.004, np.float32)
        clouds = look_up(textures.plaster, bearing * 0.4 + g[3], dy * 1.3 + g[4], footprint)[:, 0]
        colour += (smoothstep(0.80, 0.88, clouds) * 0.35)[:, None] * (1 - colour)
        hill = 0.05 + 0.05 * g[5] + 0.035 * np.sin(3 * bearing + 6 * g[6])
        hill = hill + 0.02 * np.sin(7 * bearing + 6 * g[7])
        tone = np.float32(self.place.hills) * (self.sky.mean() + 0.5 * self.sun.mean())
        tone = 0.6 * tone + 0.4 * self.horizon
        return colour + (1 - smoothstep(0.0, 0.012, dy - hill))[:, None] * (tone - colour)

    def _wall(self, rays: Array, distance: Array) -> Array:
        """Colours ``(n, 3)`` of the wall at the ends of rays ``(3, n)`` of given lengths."""
        g, light = self.spec.ground, self.spec.light
        x, y, _ = self.camera.origin[:, None] + rays * distance
        light = (light[0], -light[1], light[2])
        colour, diffuse = self._texture(self.place.wall, x, -y, light, distance, np.abs(rays[2]))
        tint = self.tint
        if self.place.wall is textures.plaster:
            tint = np.float32(colorsys.hsv_to_rgb(g[10], 0.12 + 0.25 * g[5], 0.75 + 0.25 * g[6]))
        open_sky = 0.75 + 0.25 * smoothstep(0.0, 0.5, np.abs(y))
        return self._shaded(colour * tint, diffuse, open_sky)

    def _ground(self, rays: Array, distance: Array, things: tuple[ObjectSpec, ...]) -> Array:
        """Colours ``(n, 3)`` of the ground at the ends of rays ``(3, n)`` of given lengths."""
        spec, slant = self.spec, np.abs(rays[1])
        x, _, z = self.camera.origin[:, None] + rays * distance
        turn = (spec.ground[8] - 0.5) * self.place.turn
        light = (*turned(turn, spec.light[0], spec.light[2]), spec.light[1])
        u, v = turned(turn, x, z)
        colour, diffuse = self._texture(self.place.ground, u, v, light, distance, slant)
        lit, open_sky = np.ones_like(diffuse), np.ones_like(diffuse)
        close = np.nonzero(distance < spec.distance + 6)[0]
        for o in things:
            some_light, some_sky = ground_shade(o, x[close], z[close], spec.light)
            lit[close] *= some_light
            open_sky[close] *= some_sky
        colour = self._shaded(colour * self.tint, diffuse * lit, open_sky)
        if self.place.ground is textures.water:
            # A smooth surface reflects more of the sky at grazing angles.
            mirror = (1 - slant) ** 3 * 0.65 * (0.6 + 0.4 * lit)
            colour = colour + mirror[:, None] * (self.horizon * 0.95 - colour)
        if not self.place.wall:
            haze = 1 - np.exp(-np.maximum(distance - 8, 0) / 26)
            colour = colour + haze[:, None] * (self.horizon - colour)
        return colour

    def _texture(
        self, texture: Texture, u: Array, v: Array, light: tuple, distance: Array, slant: Array
    ) -> tuple[Array, Array]:
        """Return RGB ``(n, 3)`` and the diffuse light ``(n,)`` of points of a textured plane.

        u, v: Their coordinates on the plane. light: Direction of the sun along u, along v and along
        the plane's normal. slant: Cosine of the angle between a point's ray and the normal.
        """
        g = self.spec.ground
        tile = self.place.tile * (0.85 + 0.4 * g[9])
        footprint = distance * np.float32(2 / (FOCAL * self.size)) / tile
        footprint = footprint / np.sqrt(np.maximum(slant, 0.02))
        texel = look_up(texture, u / tile + g[3] * 7, v / tile + g[4] * 7, footprint * 0.75)
        tilt = texel[:, 3] * np.float32(light[0]) + texel[:, 4] * np.float32(light[1])
        return texel[:, :3], np.maximum(np.float32(max(light[2], 0.25)) - tilt * 0.8, 0)

    def _shaded(self, colour: Array, sun: Array, open_sky: Array) -> Array:
        """Light colours ``(n, 3)`` by shares ``(n,)`` of the sun's and of the sky's light."""
        light = sun[:, None] * self.sun + open_sky[:, None] * self.sky
        return colour * light * np.float32(self.place.albedo)
