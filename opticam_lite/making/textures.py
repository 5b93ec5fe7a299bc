"""The textures of ground and walls: square tiles that repeat seamlessly.

A tile holds RGB and the two slopes of its height map, from which the light is shaded. Tiles are
made once, from fixed seeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import numpy as np

Array = np.ndarray
TILE = 512  # pixels a side
COLUMN = np.arange(TILE, dtype=np.float32) / TILE
ROW = COLUMN[:, None]
LEAVES = np.array(
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
BLADES = np.array(
    [(0.28, 0.52, 0.14), (0.36, 0.62, 0.18), (0.20, 0.42, 0.12), (0.48, 0.66, 0.24)], np.float32
)


def mix(a, b, t: Array) -> Array:
    """Interpolate from colour a to colour b by t of shape (…): float32 (…, 3)."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return a + (b - a) * t[..., None]


def smoothstep(low: float, high: float, v: Array) -> Array:
    """Rise smoothly from 0 where v ≤ low to 1 where v ≥ high."""
    t = np.clip((v - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _noise(random: Callable, cells: int, octaves: int = 1) -> Array:
    """Smooth noise in [0, 1] that repeats: ``cells`` bumps a side, each octave half as strong."""
    total = np.zeros((TILE, TILE), np.float32)
    for octave in range(octaves):
        n = cells * 2**octave
        grid = random((n, n)).astype(np.float32)
        t = np.arange(TILE, dtype=np.float32) * (n / TILE)
        i = t.astype(int)
        j, f = (i + 1) % n, smoothstep(0, 1, t - i)
        rows = grid[i] * (1 - f)[:, None] + grid[j] * f[:, None]
        total += 0.5**octave * (rows[:, i] * (1 - f) + rows[:, j] * f)
    return total / (2 - 0.5 ** (octaves - 1))


def _cells(random: Callable, n: int) -> tuple[Array, Array]:
    """Divide the tile into cells around n × n jittered points.

    Returns for each pixel how much farther the second nearest point is than the nearest, in units
    of a cell (0 at the border of two cells), and the number of its cell.
    """
    points = random((n, n, 2)).astype(np.float32) * 0.8 + 0.1
    t = np.arange(TILE, dtype=np.float32) * (n / TILE)
    i = t.astype(int)
    distances, numbers = [], []
    for dy, dx in itertools.product((-1, 0, 1), repeat=2):
        row, column = (i[:, None] + dy) % n, (i + dx) % n
        point = points[row, column]
        y = (i + dy)[:, None] + point[..., 0] - t[:, None]
        x = (i + dx) + point[..., 1] - t
        distances.append(np.sqrt(x * x + y * y))
        numbers.append(row * n + column)
    first, second = np.sort(distances, axis=0)[:2]
    return second - first, np.choose(np.argmin(distances, axis=0), numbers)


def _scatter(
    random: Callable, rgb: Array, palette: Array, n: int, length: float, width: float, bend: float
) -> Array:
    """Draw n pointed leaves over ``rgb``, later ones over earlier ones. Returns their height."""
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
    pixel = (np.floor(y).astype(int) % TILE) * TILE + np.floor(x).astype(int) % TILE
    rib = 1 - 0.35 * np.exp(-((v * 5) ** 2))
    order = np.linspace(0, 1, n)[:, None]
    shade = (0.75 + 0.25 * u) * rib * (0.72 + 0.28 * order)
    colour = palette[(draws[:, 5] * len(palette)).astype(int)] * (0.8 + 0.4 * draws[:, 6:7])
    rgb.reshape(-1, 3)[pixel] = colour[:, None, :] * shade[..., None]
    height = np.zeros((TILE, TILE), np.float32)
    height.reshape(-1)[pixel] = order + 0.3 * (1 - v * v)
    return height


# A texture takes a source of random numbers and two kinds of noise, fine and broad. It returns RGB,
# the height of its relief, and the strength of the relief. Its random numbers depend on its name.
Relief = tuple[Array, Array, float]
Texture = Callable[[Callable, Array, Array], Relief]


def grass(random: Callable, fine: Array, broad: Array) -> Relief:
    """Blades of grass."""
    rgb = mix((0.10, 0.20, 0.06), (0.20, 0.32, 0.10), broad)
    height = _scatter(random, rgb, BLADES, 9000, 46, 4, 0.5)
    return rgb * (0.75 + 0.5 * broad)[..., None], height, 0.9


def leaves(random: Callable, fine: Array, broad: Array) -> Relief:
    """Fallen leaves on earth."""
    rgb = mix((0.20, 0.13, 0.07), (0.32, 0.22, 0.12), fine)
    height = _scatter(random, rgb, LEAVES, 900, 64, 34, 0.2)
    return rgb * (0.85 + 0.3 * fine)[..., None], height, 1.6


def sand(random: Callable, fine: Array, broad: Array) -> Relief:
    """Sand with ripples."""
    warp = _noise(random, 4, 3)
    ripple = 0.5 + 0.5 * np.sin(2 * np.pi * (ROW * 11 + 2.2 * warp + 0.7 * broad))
    tone = 0.45 * ripple + 0.35 * broad + 0.3 * fine
    return mix((0.74, 0.60, 0.40), (0.90, 0.79, 0.58), tone), ripple * 0.8 + 0.12 * fine, 1.9


def snow(random: Callable, fine: Array, broad: Array) -> Relief:
    """Snow that sparkles."""
    rgb = mix((0.78, 0.84, 0.94), (0.97, 0.98, 1.0), smoothstep(0.25, 0.75, broad))
    sparkle = smoothstep(0.86, 0.95, _noise(random, 200))
    return rgb + 0.12 * sparkle[..., None], broad * 2.2 + 0.10 * fine, 1.4


def water(random: Callable, fine: Array, broad: Array) -> Relief:
    """Still water with caustics."""
    a, b = _noise(random, 7, 2) * 2 + ROW * 3, _noise(random, 11, 2) * 2 + COLUMN * 2
    height = np.abs(np.sin(2 * np.pi * a)) + 0.8 * np.abs(np.sin(2 * np.pi * b))
    web = 1 - smoothstep(0.0, 0.5, np.minimum(height / 1.4, 1))
    rgb = mix((0.08, 0.30, 0.46), (0.20, 0.52, 0.66), broad)
    return rgb + mix((0, 0, 0), (0.42, 0.50, 0.48), web * (0.4 + 0.6 * broad)), height, 0.7


def gravel(random: Callable, fine: Array, broad: Array) -> Relief:
    """Stones with dark gaps."""
    gap, which = _cells(random, 15)
    stone = smoothstep(0.02, 0.22, gap)
    tint = random((15 * 15, 1)).astype(np.float32) * 0.45 + 0.42
    hue = random((15 * 15, 3)).astype(np.float32) * 0.12 + np.float32([0.02, 0.0, -0.02])
    rgb = (tint + hue)[which] * (0.8 + 0.35 * fine)[..., None] * (0.25 + 0.75 * stone)[..., None]
    return rgb, np.sqrt(stone) * 1.6 + 0.3 * np.minimum(gap, 0.5) + 0.15 * fine, 1.3


def brick(random: Callable, fine: Array, broad: Array) -> Relief:
    """Courses of bricks, each shifted by half a brick."""
    across, down = 5, 12
    row = (ROW * down).astype(int)
    shifted = (COLUMN * across + 0.5 * (row % 2)) % across
    u, v = shifted % 1, (ROW * down) % 1
    wobble = 0.012 * (fine - 0.5)
    edge = np.minimum(np.minimum(u, 1 - u) * (TILE / across), np.minimum(v, 1 - v) * (TILE / down))
    face = smoothstep(2.0, 5.0, edge + 200 * wobble)
    tint = random(across * down).astype(np.float32)[row * across + shifted.astype(int)]
    bricks = mix((0.50, 0.20, 0.14), (0.76, 0.40, 0.28), 0.65 * tint + 0.35 * broad)
    rgb = np.float32([0.70, 0.67, 0.62]) * (1 - face)[..., None] + bricks * face[..., None]
    return rgb * (0.82 + 0.36 * fine)[..., None], face + 0.2 * fine, 0.9


def wood(random: Callable, fine: Array, broad: Array) -> Relief:
    """Planks with grain and gaps."""
    planks = 5
    row, v = (ROW * planks).astype(int), (ROW * planks) % 1
    offset = random(planks).astype(np.float32)
    tint = random(planks * 2).astype(np.float32)
    along = (COLUMN + offset[row]) % 1
    tint = tint[row * 2 + (along > 0.5)]
    swirl, grain = _noise(random, 3, 3), _noise(random, 4, 2)
    grain = 0.5 + 0.5 * np.sin(2 * np.pi * (v * 3 + 5 * swirl * grain + 6 * tint))
    pores = np.repeat(_noise(random, 256)[:, ::16], 16, axis=1)
    rgb = mix((0.46, 0.28, 0.14), (0.80, 0.58, 0.35), 0.4 * grain + 0.4 * tint + 0.2 * pores)
    ends = np.minimum(np.abs(along - 0.5), np.minimum(along, 1 - along)) * TILE
    gap = np.minimum(np.minimum(v, 1 - v) * (TILE / planks), ends)
    rgb = rgb * (0.35 + 0.65 * smoothstep(0.5, 3.0, gap))[..., None]
    return rgb, smoothstep(0.0, 4.0, gap) + 0.12 * grain, 0.6


def plaster(random: Callable, fine: Array, broad: Array) -> Relief:
    """Plain, a little uneven."""
    rgb = mix((0.70, 0.70, 0.70), (0.92, 0.92, 0.92), 0.6 * broad + 0.4 * fine)
    return rgb, 0.5 * fine + broad, 0.5


def concrete(random: Callable, fine: Array, broad: Array) -> Relief:
    """Darker plaster."""
    rgb, height, relief = plaster(random, fine, broad)
    return rgb * np.float32([0.66, 0.64, 0.60]), height, relief


@cache
def _levels(texture: Texture) -> list[Array]:
    """Return the levels of a texture, each half the size of the one before: float32 (n, n, 5)."""
    random = np.random.default_rng([2024, sum(texture.__name__.encode())]).random
    rgb, height, relief = texture(random, _noise(random, 128, 2), _noise(random, 6, 4))
    slopes = [
        np.clip((np.roll(height, -1, axis) - np.roll(height, 1, axis)) * (2 * relief), -1.5, 1.5)
        for axis in (1, 0)
    ]
    levels = [np.dstack([np.clip(rgb, 0, 1.2), *slopes]).astype(np.float32)]
    while (n := len(levels[-1]) // 2) >= 8:
        levels.append(levels[-1].reshape(n, 2, n, 2, 5).mean(axis=(1, 3)))
    return levels


def look_up(texture: Texture, u: Array, v: Array, footprint: Array) -> Array:
    """Return values ``(n, 5)`` of a texture at points (u, v), interpolated trilinearly.

    u, v: ``(n,)``, in tiles. footprint: ``(n,)``, size of a pixel of the picture in tiles; the
    texture is blurred to it.
    """
    levels = _levels(texture)
    out = np.zeros((u.size, 5), np.float32)
    lod = np.clip(np.log2(np.maximum(footprint * TILE, 1e-3)), 0, len(levels) - 1.001)
    base = lod.astype(int)
    blend = lod - base
    for level, tile in enumerate(levels):
        here = np.nonzero((base == level) | (base == level - 1))[0]
        if here.size == 0:
            continue
        n = len(tile)
        x, y = u[here] * n - 0.5, v[here] * n - 0.5
        ix, iy = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
        fx, fy = (x - ix)[:, None], (y - iy)[:, None]
        ix, iy, jx, jy = ix % n, iy % n, (ix + 1) % n, (iy + 1) % n
        top = tile[iy, ix] * (1 - fx) + tile[iy, jx] * fx
        low = tile[jy, ix] * (1 - fx) + tile[jy, jx] * fx
        weight = np.where(base[here] == level, 1 - blend[here], blend[here])[:, None]
        out[here] += weight * (top * (1 - fy) + low * fy)
    return out
