"""Specification of a scene → image, boxes and masks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..datasets.scenes import ENVIRONMENTS
from ..registry import check_name
from .background import Background
from .camera import Camera
from .objects import trace
from .sampling import SceneSpec

Array = np.ndarray
VERSION = 1  # of the pixels: raise it when a change of the renderer alters them
SIZE = 224
SUPER = 2  # samples per pixel and axis on objects


@dataclass(frozen=True)
class Scene:
    """A rendered scene and where its objects are.

    image: uint8 ``(H, W, 3)``, RGB. masks: bool ``(M, H, W)``, the visible pixels of each object of
    the class; boxes: int64 ``(M, 4)``, their bounds as x0, y0, x1, y1 with x1, y1 exclusive. M is 0
    where the objects were left out.
    """

    image: Array
    boxes: Array
    masks: Array


def render(
    spec: SceneSpec, *, environment: str | None = None, objects: bool = True, size: int = SIZE
) -> Scene:
    """Render a scene, or one of its counterfactual twins.

    environment: Another place for the same objects, clutter, light and camera. objects: False
    leaves the class's objects and their shadows out; clutter stays. size: Pixels a side.
    Raises ``ValueError`` for an unknown environment.
    """
    place = spec.environment if environment is None else environment
    check_name("environment", place, ENVIRONMENTS)
    camera = Camera(spec)
    shown = spec.objects if objects else ()
    things = shown + spec.clutter

    # Of all objects at a sample the nearest is visible.
    full = size * SUPER
    nearest = np.full(full * full, np.inf, np.float32)
    owner = np.zeros(full * full, np.uint8)
    layer = np.zeros((full * full, 3), np.float32)
    for number, o in enumerate(things, start=1):
        at, depth, colour = trace(o, spec, camera, full)
        front = depth < nearest[at]
        at = at[front]
        nearest[at], owner[at], layer[at] = depth[front], number, colour[front]
    samples = owner.reshape(size, SUPER, size, SUPER)
    cover = (samples > 0).mean(axis=(1, 3), dtype=np.float32)
    paint = layer.reshape(size, SUPER, size, SUPER, 3).mean(axis=(1, 3))
    background = Background(spec, place, camera, size).draw(things)
    picture = paint + background * (1 - cover)[..., None]
    picture = picture * np.float32(spec.exposure)
    # A tone curve with a soft shoulder, so that highlights do not clip.
    picture = np.where(picture > 0.8, 0.8 + 0.2 * np.tanh((picture - 0.8) / 0.2), picture)

    # A pixel belongs to the first object that covers at least half of it.
    free = np.ones((size, size), bool)
    boxes, masks = [], []
    for number in range(1, len(shown) + 1):
        mask = free & ((samples == number).sum(axis=(1, 3)) * 2 >= SUPER * SUPER)
        free &= ~mask
        y, x = np.nonzero(mask)
        if y.size:  # a hidden object has neither box nor mask
            boxes.append((x.min(), y.min(), x.max() + 1, y.max() + 1))
            masks.append(mask)
    return Scene(
        image=np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8),
        boxes=np.array(boxes, np.int64).reshape(-1, 4),
        masks=np.array(masks, bool).reshape(-1, size, size),
    )
