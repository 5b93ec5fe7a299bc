"""Figures with alt text, drawn without pyplot, so that they work in any thread and any notebook.

Saliency is shown in viridis, which keeps its order in greyscale and for colour-blind eyes, on one
scale from 0 to 1.
"""

from __future__ import annotations

import base64
import html
import io
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from .registry import unknown_name

COLORMAP = "viridis"
# Okabe and Ito's colours, told apart by every kind of colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (3, 5)), (0, (1, 1)))
STYLES = ("overlay", "mask", "masked")

# Matplotlib's font and text caches are not safe between threads.
drawing_lock = threading.Lock()


class Picture:
    """A Matplotlib figure with alt text; a notebook shows it as `<figure><img alt=…>`.

    Attributes:
        figure: The `matplotlib.figure.Figure`.
        alt: What a reader who can't see it is told.
    """

    def __init__(self, figure: Figure, alt: str) -> None:
        self.figure, self.alt = figure, alt

    @property
    def png(self) -> bytes:
        """The figure as PNG."""
        with drawing_lock:
            buffer = io.BytesIO()
            FigureCanvasAgg(self.figure)
            self.figure.savefig(buffer, format="png", dpi=self.figure.dpi, bbox_inches="tight")
        return buffer.getvalue()

    def html(self) -> str:
        """The figure as self-contained HTML."""
        data = base64.b64encode(self.png).decode("ascii")
        return (
            f'<figure style="margin: 0"><img alt="{html.escape(self.alt, quote=True)}" '
            f'src="data:image/png;base64,{data}" style="max-width: 100%"></figure>'
        )

    _repr_html_ = html

    def save(self, path: str | Path) -> None:
        """Write the figure to a PNG file."""
        Path(path).write_bytes(self.png)

    def __repr__(self) -> str:
        return f"Picture: {self.alt}"


def overlay(image: Tensor, mask: Tensor, strength: float = 0.6) -> np.ndarray:
    """Lay a mask in viridis over a greyscale copy of its image.

    Args:
        image: `(3, H, W)` in [0, 1].
        mask: `(1, H, W)` in [0, 1].
        strength: Share of the colour, 0 (image only) to 1 (mask only).

    Returns:
        RGB `(H, W, 3)` in [0, 1].
    """
    grey = to_array(image).mean(axis=2, keepdims=True)
    colour = matplotlib.colormaps[COLORMAP](to_array(mask)[..., 0])[..., :3]
    return (1 - strength) * grey + strength * colour


def to_array(image: Tensor) -> np.ndarray:
    """Turn `(C, H, W)` in [0, 1] into an array `(H, W, C)` for Matplotlib."""
    return image.detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()


def grid(
    images: Tensor,
    masks: Mapping[str, Tensor],
    *,
    row_titles: Sequence[str] | None = None,
    captions: Mapping[str, Sequence[str]] | None = None,
    style: str = "overlay",
    title: str = "",
    alt: str | None = None,
    width: float = 1.6,
) -> Picture:
    """Draw images × methods, as in the paper's Figure 2.

    Args:
        images: `(N, 3, H, W)` in [0, 1]; the first column.
        masks: Column title → `(N, 1, H, W)` in [0, 1].
        row_titles: One a row, such as the class; written at the left.
        captions: Column title → one line a row, written under the panel, such as "0.71 → 0.95".
            The title `"input"` captions the first column.
        style: `"overlay"`, `"mask"` (the mask alone) or `"masked"` (image × mask, as the network
            sees it).
        title: Above the figure.
        alt: Alt text. Default: composed of titles and captions.
        width: Of a panel, inches.

    Raises:
        ValueError: If a column has not one mask an image, or the style is unknown.
    """
    if style not in STYLES:
        raise ValueError(unknown_name("style", style, STYLES))
    rows, columns = len(images), ["input", *masks]
    for name, column in masks.items():
        if tuple(column.shape) != (rows, 1, *images.shape[2:]):
            raise ValueError(
                f"masks of {name!r} have shape {tuple(column.shape)}; {rows} images of "
                f"{images.shape[2]}×{images.shape[3]} need {(rows, 1, *images.shape[2:])}"
            )
    captions = captions or {}
    panel = width * images.shape[2] / images.shape[3] + (0.25 if captions else 0.06)
    bar = style != "masked" and bool(masks)
    figure = Figure(
        figsize=(width * len(columns) + 0.35 + 0.5 * bar, panel * rows + 0.45 + 0.3 * bool(title)),
        dpi=100,
        layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01),
    )
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for r in range(rows):
        for c, name in enumerate(columns):
            ax = axes[r, c]
            ax.imshow(_panel(images[r], None if c == 0 else masks[name][r], style), vmin=0, vmax=1)
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(False)
            if r == 0:
                ax.set_title(name, fontsize=10)
            if c == 0 and row_titles is not None:
                ax.set_ylabel(row_titles[r], fontsize=9)
            if name in captions:
                ax.set_xlabel(captions[name][r], fontsize=8, labelpad=2)
    if title:
        figure.suptitle(title, fontsize=11)
    if bar:
        scale = ScalarMappable(cmap=COLORMAP)
        scale.set_clim(0, 1)
        colorbar = figure.colorbar(scale, ax=axes, fraction=0.03, aspect=18 * rows, pad=0.01)
        colorbar.set_label("saliency", fontsize=8)
        colorbar.ax.tick_params(labelsize=7)
    return Picture(figure, alt or _describe(title, rows, list(masks), row_titles, captions, style))


def _panel(image: Tensor, mask: Tensor | None, style: str) -> np.ndarray:
    if mask is None:
        return to_array(image)
    if style == "overlay":
        return overlay(image, mask)
    if style == "masked":
        return to_array(image.cpu() * mask.cpu())
    return matplotlib.colormaps[COLORMAP](to_array(mask)[..., 0])[..., :3]


def _describe(
    title: str,
    rows: int,
    columns: list[str],
    row_titles: Sequence[str] | None,
    captions: Mapping[str, Sequence[str]],
    style: str,
) -> str:
    shown = {"overlay": "saliency maps", "mask": "saliency maps", "masked": "masked images"}[style]
    lines = [f"{title + ': ' if title else ''}{rows} images and their {shown}"]
    lines[0] += f" by {', '.join(columns)}." if columns else "."
    for r in range(rows):
        parts = [f"{name} {captions[name][r]}" for name in ["input", *columns] if name in captions]
        if row_titles is not None or parts:
            name = row_titles[r] if row_titles is not None else ""
            row = f"Row {r + 1} {name}".rstrip()
            lines.append(f"{row}: {'; '.join(parts)}." if parts else f"{row}.")
    return " ".join(line.replace("\n", " ") for line in lines)


def gallery(
    images: Tensor,
    captions: Sequence[str],
    *,
    columns: int = 4,
    title: str = "",
    alt: str | None = None,
    width: float = 1.8,
) -> Picture:
    """Draw images in rows of `columns`, one line of text under each.

    Args:
        images: `(N, 3, H, W)` in [0, 1].
        captions: One an image, such as its class.
        columns: Images in a row.
        title: Above the figure.
        alt: Alt text. Default: composed of the captions.
        width: Of a panel, inches.

    Raises:
        ValueError: If there are no images or not one caption an image.
    """
    n = len(images)
    if not n or len(captions) != n:
        raise ValueError(f"{len(captions)} captions were given for {n} images; pass one for each")
    columns = min(columns, n)
    rows = -(-n // columns)
    panel = width * images.shape[2] / images.shape[3] + 0.25
    figure = Figure(
        figsize=(width * columns, panel * rows + 0.3 * bool(title)), dpi=100, layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for i, ax in enumerate(axes.flat):
        ax.axis("off")
        if i < n:
            ax.imshow(to_array(images[i]))
            ax.set_title(captions[i], fontsize=8, y=0, va="top", pad=-3)
    if title:
        figure.suptitle(title, fontsize=11)
    listed = "; ".join(f"{i} {caption}" for i, caption in enumerate(captions))
    told = f"{title + ': ' if title else ''}{n} images, by number: {listed}."
    return Picture(figure, alt or told.replace("\n", " "))


def curves(
    series: Mapping[str, Sequence[float] | Tensor],
    *,
    x: Sequence[float] | None = None,
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    alt: str | None = None,
    size: tuple[float, float] = (5.5, 3.2),
) -> Picture:
    """Draw one line a name, told apart by colour and by dashes.

    Args:
        series: Name → values.
        x: Positions of the values. Default: 0, 1, 2, …
        xlabel, ylabel, title: Texts.
        alt: Alt text. Default: each line's first and last value.
        size: Width and height, inches.
    """
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    ax = figure.subplots()
    told = []
    for i, (name, values) in enumerate(series.items()):
        y = torch.as_tensor(values).detach().cpu().numpy()
        ax.plot(
            np.arange(len(y)) if x is None else x,
            y,
            color=COLORS[i % len(COLORS)],
            linestyle=DASHES[i % len(DASHES)],
            label=name,
        )
        if len(y):
            told.append(f"{name} goes from {y[0]:.3g} to {y[-1]:.3g}")
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    ax.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        ax.legend(frameon=False, fontsize=8)
    what = f"{title or ylabel or 'Line plot'} against {xlabel or 'the index'}"
    return Picture(figure, alt or f"{what}: {'; '.join(told)}.")


def bars(
    values: Mapping[str, float],
    *,
    ylabel: str = "",
    title: str = "",
    alt: str | None = None,
    size: tuple[float, float] = (5.5, 3.0),
) -> Picture:
    """Draw one labelled bar a name, its value written above it."""
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    ax = figure.subplots()
    drawn = ax.bar(list(values), list(values.values()), color=COLORS[0], width=0.65)
    ax.bar_label(drawn, fmt="%.3g", fontsize=8)
    ax.set(ylabel=ylabel, title=title)
    ax.tick_params(axis="x", labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    told = "; ".join(f"{name} {value:.3g}" for name, value in values.items())
    return Picture(figure, alt or f"Bar chart of {title or ylabel}: {told}.")
