"""Draws the explorer's pictures without pyplot: PNG bytes with alternative texts."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..methods import METHODS
from ..plots import COLORMAP, Picture, fitted, overlay, to_array
from ..plots import drawing_lock as drawing  # one lock for all figures
from ..text import plain
from .state import Drawn, Result, Settings, Shown

TILE = 260
"""Side of a picture on the screen, in CSS pixels: three of them fit side by side into 848 pixels,
the width of a cell in JupyterLab with its file browser in a window of 1280."""
BEFORE, AFTER = "#6b7280", "#21918c"
"""Colours of values of the image and of the masked image; distinct in greyscale, too."""


def draw_image(image: Tensor, alt: str) -> Drawn:
    """Encode an image `(3, H, W)` in [0, 1] as a PNG whose longer side is at most 2·`TILE`."""
    scale = 2 * TILE / max(image.shape[1:])
    if scale < 1:
        size = [max(1, round(side * scale)) for side in image.shape[1:]]
        image = F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]
    pixels = image.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).contiguous()
    buffer = io.BytesIO()
    Image.fromarray(pixels.cpu().numpy()).save(buffer, "PNG", compress_level=4)
    return Drawn(buffer.getvalue(), pixels.shape[1], pixels.shape[0], alt)


def image_name(image: int, classes: Sequence[str]) -> str:
    """Return the number of an image and its class, if that is known."""
    return f"Image {image}" + (f": {classes[image]}" if classes[image] else "")


def draw_shown(
    asked: Settings,
    image: Tensor,
    mask: Tensor,
    label: str,
    objective: Sequence[float],
    iterations: int,
) -> Shown:
    """Draw the overlay, the masked image and, if there is an objective, its curve."""
    return Shown(
        asked,
        overlay=draw_image(
            torch.from_numpy(overlay(image, mask)).permute(2, 0, 1),
            f"Saliency map of {asked.method} for the class {label} over image {asked.image} in "
            f"grey: {where_in_words(mask)}.",
        ),
        masked=draw_image(
            image * mask,
            f"Image {asked.image} multiplied by the map of {asked.method}: what the map calls "
            "unimportant is black.",
        ),
        curve=draw_curve(objective, iterations) if objective else None,
    )


def where_in_words(mask: Tensor) -> str:
    """Return where a mask `(1, H, W)` is bright, in words, for alternative texts."""
    total = float(mask.sum())
    if total == 0:
        return "zero everywhere"
    share = float((mask > 0.5).float().mean())
    if share > 0.9:
        return "bright nearly everywhere"
    height, width = mask.shape[1:]
    y = float((mask[0].sum(1) * torch.arange(height)).sum()) / total / height
    x = float((mask[0].sum(0) * torch.arange(width)).sum()) / total / width
    row = "top" if y < 0.4 else "bottom" if y > 0.6 else "middle"
    column = "left" if x < 0.4 else "right" if x > 0.6 else "centre"
    place = "centre" if (row, column) == ("middle", "centre") else f"{row} {column}"
    return f"{share:.0%} of it is above one half, its weight lies in the {place}"


def subject(settings: Settings) -> str:
    """Return the network of a map, and the layer if the method depends on it, as text."""
    if METHODS[settings.method].uses_layer:
        return f"at {settings.layer} of {settings.network}"
    return f"of {settings.network}"


def draw_curve(objective: Sequence[float], iterations: int) -> Drawn:
    """Draw the objective against the iteration as a PNG of twice the size on the screen."""
    with drawing:
        figure = Figure(figsize=(4, 2.4), dpi=200, layout="constrained")
        _curve(figure.add_subplot(), objective, iterations)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    alt = f"Curve of the objective: it {_change(objective)}."
    return Drawn(buffer.getvalue(), 800, 480, alt)


def _change(objective: Sequence[float]) -> str:
    change = "rises" if objective[-1] >= objective[0] else "falls"
    return f"{change} from {objective[0]:.2f} to {objective[-1]:.2f} in {len(objective)} iterations"


def _curve(axes: Any, objective: Sequence[float], iterations: int) -> None:
    steps = range(1, len(objective) + 1)
    axes.plot(steps, objective, color=AFTER, linewidth=1.8)
    axes.plot(len(objective), objective[-1], "o", color=AFTER, markersize=5)
    axes.set(xlabel="iteration", ylabel="objective", xlim=(0, max(iterations, 1) * 1.03))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_snapshot(result: Result) -> Picture:
    """Draw a result as one figure, for readers without a kernel."""
    settings, objective = result.settings, result.objective
    label = plain(result.target_label)
    pictures = {
        f"image {settings.image}\np({label}) = {result.before:.3f}": to_array(result.image),
        f"{settings.method}\n{subject(settings)}": overlay(result.image, result.mask),
        f"image × map\np({label}) = {result.after:.3f}": to_array(result.image * result.mask),
    }
    ratios = [1, 1, 1, 1.45] if objective else [1, 1, 1]
    figure = Figure(figsize=(11 if objective else 7.7, 3.1), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(ratios), width_ratios=ratios)
    for ax, (title, picture) in zip(axes, pictures.items(), strict=False):
        ax.imshow(picture)
        ax.set_title(fitted(title, 2.3, 10), fontsize=10)
        ax.set_axis_off()
    bar = figure.colorbar(ScalarMappable(cmap=COLORMAP), ax=axes[1], fraction=0.05, pad=0.02)
    bar.set_ticks([0, 0.5, 1])
    curve = ""
    if objective:
        _curve(axes[3], objective, result.steps)
        axes[3].set_title("objective", fontsize=10)
        curve = f" The objective {_change(objective)}."
    return Picture(
        figure,
        f"Image {settings.image}, the map of {settings.method} {subject(settings)} for the class "
        f"{label} ({where_in_words(result.mask)}), and the image multiplied by it. The probability "
        f"of the class goes from {result.before:.3f} to {result.after:.3f}.{curve}",
    )
