"""Figures with alt text, drawn without pyplot, so that they work in any thread and any notebook.

Saliency is shown in viridis, which is monotonic in greyscale and for colour-blind readers, on one
scale from 0 to 1. Texts are shown as they are given: a dollar sign begins no formula.
"""

from __future__ import annotations

import base64
import html
import io
import math
import textwrap
import threading
from collections.abc import Iterable, Mapping, Sequence, Sized
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .registry import check_name, whole_number
from .text import plain

COLORMAP = "viridis"
# Okabe and Ito's colours, distinguishable with every kind of colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (3, 5)), (0, (1, 1)))
STYLES = ("overlay", "mask", "masked")

# Matplotlib's font and text caches are not thread-safe.
drawing_lock = threading.Lock()
NAME_INCHES = 2.2  # that a name beside or below a chart may take


class Picture:
    """A Matplotlib figure with alt text; a notebook shows it as `<figure><img alt=…>`.

    Attributes:
        figure: The `matplotlib.figure.Figure`.
        alt: The figure in words, for readers who can't see it.
    """

    def __init__(self, figure: Figure, alt: str) -> None:
        self.figure, self.alt = figure, plain(alt.replace("\n", " "))

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
    classes: Sequence[str] | None = None,
    probabilities: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    captions: Mapping[str, Sequence[str]] | None = None,
    style: str = "overlay",
    title: str = "",
    alt: str | None = None,
    width: float = 1.6,
) -> Picture:
    """Draw images × methods, as in the paper's Figure 2, all maps on one scale.

        p_and_o = {m: ol.masked_probabilities(classifier, images, masks[m], targets) for m in masks}
        ol.plots.grid(images, masks, classes=names, probabilities=p_and_o)

    Args:
        images: `(N, 3, H, W)` in [0, 1]; the first column.
        masks: Column title → `(N, 1, H, W)` in [0, 1]. Titles and captions that are too long for a
            panel are broken into two lines, and cut where those are too short.
        row_titles: One a row, such as the class; written at the left.
        classes: The class explained in each row; written before the probabilities, cut where it
            is too long for a panel.
        probabilities: Column title → p, o of `masked_probabilities`, each `(N,)`; written under the
            panel as "p → o".
        captions: Column title → one line a row, written under the panel in place of the
            probabilities. The title `"input"` captions the first column.
        style: `"overlay"`, `"mask"` (the mask alone) or `"masked"` (image × mask, the input of the
            network).
        title: Above the figure.
        alt: Alt text. Default: composed of titles and captions.
        width: Of a panel, inches.

    Raises:
        ValueError: If there is not one mask, title, class, pair of probabilities or caption an
            image, probabilities or captions have a column that masks have not, or the style is
            unknown.
    """
    check_name("style", style, STYLES)
    rows, columns = len(images), ["input", *masks]
    for name, column in masks.items():
        if tuple(column.shape) != (rows, 1, *images.shape[2:]):
            raise ValueError(
                f"masks of {name!r} have shape {tuple(column.shape)}; {rows} images of "
                f"{images.shape[2]}×{images.shape[3]} need {(rows, 1, *images.shape[2:])}"
            )
    probabilities, captions = probabilities or {}, captions or {}
    counted: list[tuple[str, Sized | None]] = [("row_titles", row_titles), ("classes", classes)]
    counted += [(f"probabilities of {n!r}", v) for n, pair in probabilities.items() for v in pair]
    counted += [(f"captions of {name!r}", lines) for name, lines in captions.items()]
    for what, values in counted:
        if values is not None and len(values) != rows:
            raise ValueError(
                f"there are {len(values)} {what} for {rows} images; one each is needed"
            )
    for name in [*probabilities, *captions]:
        check_name("column", name, columns)

    def below(classes: Sequence[str]) -> dict[str, Sequence[str]]:
        """Column title → one line a row: its caption, or class and p → o."""
        changes = {
            name: [
                f"{c} {before:.2f} → {after:.2f}".lstrip()
                for c, before, after in zip(classes, p.tolist(), o.tolist(), strict=True)
            ]
            for name, (p, o) in probabilities.items()
        }
        return {**changes, **captions}

    classes = classes or [""] * rows
    told = _describe(columns[1:], row_titles or [""] * rows, below(classes), style)
    height = width * images.shape[2] / images.shape[3]
    heads = [fitted(name, width, 10) for name in columns]
    sides = [fitted(text, height, 9) for text in row_titles or []]
    room = _room(width, 8) - len(" 0.12 → 0.34")  # letters of a class that fit beside them
    shown = {
        name: [fitted(text, width, 8) for text in lines]
        for name, lines in below([_cut(plain(c), room) for c in classes]).items()
    }
    lines = [text for texts in shown.values() for text in texts]
    panel = height + (0.25 + _more(lines, 8) if shown else 0.06)
    bar = style != "masked" and bool(masks)
    figure = Figure(
        figsize=(
            width * len(columns) + 0.35 + _more(sides, 9) + 0.5 * bar,
            panel * rows + 0.45 + _more(heads, 10) + 0.3 * bool(title),
        ),
        dpi=100,
        layout=ConstrainedLayoutEngine(
            w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01, compress=True
        ),
    )
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for (r, c), ax in np.ndenumerate(axes):
        name = columns[c]
        _show(ax, _panel(images[r], masks[name][r] if c else None, style))
        if r == 0:
            ax.set_title(heads[c], fontsize=10)
        if c == 0 and sides:
            ax.set_ylabel(sides[r], fontsize=9)
        if name in shown:
            ax.set_xlabel(shown[name][r], fontsize=8, labelpad=2)
    if bar:
        _colorbar(figure, axes, rows)
    return _titled(figure, title, alt, told)


def _show(ax: Axes, image: np.ndarray) -> None:
    """Draw an image without a frame; labels beside it stay."""
    ax.imshow(image, vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def _titled(figure: Figure, title: str, alt: str | None, told: str) -> Picture:
    """Return a figure with its title, if any; the default alt text is the title and `told`."""
    if title:
        figure.suptitle(fitted(title, figure.get_figwidth(), 11), fontsize=11)
        told = f"{title}: {told}"
    return Picture(figure, alt or told)


def _room(inches: float, size: float) -> int:
    """Return how many letters of a font's size, in points, fit."""
    return max(2, int(128 / size * inches))


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 1].rstrip()}…"


def fitted(text: str, inches: float, size: float) -> str:
    """Return a text as Matplotlib is to draw it: literally, and no wider than there is room.

    Each line becomes at most two, and what is left is cut. Dollars are escaped, other control
    characters than line breaks shown as such, and letters that the font lacks are squares.

    Args:
        text: Any; the names in it are a user's.
        inches: The room.
        size: Of the font, in points.
    """
    room, lines = _room(inches, size), []
    for line in map(plain, text.split("\n")):
        if len(line) > room:
            first, *others = textwrap.wrap(line, room, break_on_hyphens=False) or [""]
            line = "\n".join([first, _cut(" ".join(others), room)] if others else [first])
        lines.append(line)
    known = _letters(tuple(FontProperties().get_family()))
    drawn = (c if c == "\n" or ord(c) in known else "□" for c in "\n".join(lines))
    return "".join(drawn).replace("$", r"\$")


@cache
def _letters(families: tuple[str, ...]) -> frozenset[int]:
    """Return the letters of fonts: Matplotlib warns of others, and draws a square."""
    fonts = (get_font(findfont(FontProperties(family=[family]))) for family in families)
    return frozenset(letter for font in fonts for letter in font.get_charmap())


def _names(names: Iterable[str], size: float = 10) -> list[str]:
    """Return names as they are drawn beside a chart, or in its legend."""
    # Matplotlib leaves empty names and `_x` out of legends; a space before them brings them back.
    return [fitted(f" {n}" if n[:1] in ("", "_") else n, NAME_INCHES, size) for n in names]


def _more(texts: Sequence[str], size: float) -> float:
    """Return the inches that the tallest of some texts takes beyond a single line."""
    return max((text.count("\n") for text in texts), default=0) * size * 1.3 / 72


def _colorbar(figure: Figure, axes: np.ndarray, rows: int) -> None:
    scale = ScalarMappable(cmap=COLORMAP)
    scale.set_clim(0, 1)
    tall = min(rows, 4)  # a longer scale would not be more readable
    colorbar = figure.colorbar(
        scale, ax=axes, fraction=0.03, shrink=tall / rows, anchor=(0, 1), aspect=18 * tall, pad=0.01
    )
    colorbar.set_label("saliency", fontsize=8)
    colorbar.ax.tick_params(labelsize=7)


def _panel(image: Tensor, mask: Tensor | None, style: str) -> np.ndarray:
    if mask is None:
        return to_array(image)
    if style == "masked":
        return to_array(image.cpu() * mask.cpu())
    return overlay(image, mask, 1.0) if style == "mask" else overlay(image, mask)


def _describe(
    columns: Sequence[str],
    row_titles: Sequence[str],
    captions: Mapping[str, Sequence[str]],
    style: str,
) -> str:
    """Return the alt text of a grid, without its title."""
    rows = len(row_titles)
    shown = "masked image" if style == "masked" else "saliency map"
    shown += "s" if rows > 1 or len(columns) > 1 else ""
    # A name that contains a comma would read as two names.
    names = ", ".join(f"“{name}”" if "," in name else name for name in columns)
    lines = [f"1 image and its {shown}" if rows == 1 else f"{rows} images and their {shown}"]
    lines[0] += f" by {names}." if names else "."
    for r, row_title in enumerate(row_titles):
        parts = [f"{name} {captions[name][r]}" for name in ["input", *columns] if name in captions]
        row = f"Row {r + 1} {row_title}".rstrip()
        if row_title or parts:
            lines.append(f"{row}: {'; '.join(parts)}." if parts else f"{row}.")
    return " ".join(lines)


def gallery(
    images: Tensor,
    captions: Sequence[str],
    *,
    columns: int = 4,
    title: str = "",
    alt: str | None = None,
    width: float = 1.8,
) -> Picture:
    """Draw images in rows of `columns`, one or two lines of text under each.

    Args:
        images: `(N, 3, H, W)` in [0, 1].
        captions: One an image, such as its class; cut where two lines are too short for it.
        columns: Images in a row, at least 1.
        title: Above the figure.
        alt: Alt text. Default: composed of the captions.
        width: Of a panel, inches.

    Raises:
        ValueError: If there are no images, not one caption an image, or no column.
    """
    n = len(images)
    if not n or len(captions) != n:
        raise ValueError(f"{len(captions)} captions were given for {n} images; pass one for each")
    columns = min(whole_number("columns", columns, 1), n)
    rows = -(-n // columns)
    short = [fitted(caption, width, 8) for caption in captions]
    panel = width * images.shape[2] / images.shape[3] + 0.25 + _more(short, 8)
    figure = Figure(
        figsize=(width * columns, panel * rows + 0.3 * bool(title)), dpi=100, layout="compressed"
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for i, ax in enumerate(axes.flat):
        ax.axis("off")
        if i < n:
            ax.imshow(to_array(images[i]))
            ax.set_title(short[i], fontsize=8, y=0, va="top", pad=-3)
    listed = "; ".join(f"{i} {caption}" for i, caption in enumerate(captions))
    told = f"1 image: {captions[0]}." if n == 1 else f"{n} images, by number: {listed}."
    return _titled(figure, title, alt, told)


def curves(
    series: Mapping[str, Sequence[float] | Tensor],
    *,
    x: Sequence[float] | None = None,
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    log: bool = False,
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    alt: str | None = None,
    size: tuple[float, float] = (5.5, 3.2),
) -> Picture:
    """Draw one line for each name; colours and dashes distinguish them.

    Args:
        series: Name → values.
        x: Positions of the values. Default: 0, 1, 2, …
        bands: Name → lower and upper ends of intervals, which are shaded.
        log: Whether the positions are on a logarithmic scale.
        xlabel, ylabel, title: Texts.
        alt: Alt text. Default: each line's first and last value.
        size: Width and height, inches.
    """
    figure, ax = _chart(size, xlabel, ylabel, title)
    told = []
    if log:
        ax.set_xscale("log")
    elif x is None or all(float(value).is_integer() for value in x):
        ax.xaxis.set_major_locator(_whole_numbers())
    for i, ((name, values), label) in enumerate(zip(series.items(), _names(series), strict=True)):
        y = torch.as_tensor(values).detach().cpu().numpy()
        ax.plot(
            np.arange(len(y)) if x is None else x,
            y,
            color=COLORS[i % len(COLORS)],
            linestyle=DASHES[i % len(DASHES)],
            label=label,
        )
        if bands and name in bands:
            at = np.arange(len(y)) if x is None else x
            ax.fill_between(at, *bands[name], color=COLORS[i % len(COLORS)], alpha=0.15, lw=0)
        if len(y):
            told.append(f"{name} goes from {y[0]:.3g} to {y[-1]:.3g}")
    if len(series) > 1:
        ax.legend(frameon=False, fontsize=8)
    what = f"{title or ylabel or 'Line plot'} against {xlabel or 'the index'}"
    return Picture(figure, alt or f"{what}: {'; '.join(told)}.")


def _chart(size: tuple[float, float], xlabel: str, ylabel: str, title: str) -> tuple[Figure, Axes]:
    """Return a figure and its axes, without the top and right spines."""
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    ax = figure.subplots()
    ax.set(xlabel=fitted(xlabel, size[0], 10), ylabel=fitted(ylabel, size[1], 10))
    ax.set_title(fitted(title, size[0], 12))
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax


def _whole_numbers() -> MaxNLocator:
    """Return a locator for axes that count, such as iterations: ticks at whole numbers only."""
    return MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)


def trace(
    image: Tensor,
    objective: Sequence[float] | Tensor,
    probabilities: Mapping[int, float],
    masks: Mapping[int, Tensor],
    *,
    whole: float | None = None,
    title: str = "",
    alt: str | None = None,
    width: float = 1.6,
) -> Picture:
    """Draw the optimisation of one image: objective, probability, and masks of some iterations.

    `ol.Trace` records these values and calls this function.

    Args:
        image: `(3, H, W)` in [0, 1].
        objective: Its value in iterations 1, 2, …
        probabilities: Iteration → probability of the class in the masked image.
        masks: Iteration → mask `(1, H, W)` in [0, 1], in the order in which to draw them; their
            iterations are marked on the curves.
        whole: Probability of the class in the whole image, drawn as a horizontal line.
        title: Above the figure.
        alt: Alt text. Default: composed of the values.
        width: Of a mask, inches.

    Raises:
        ValueError: If there is no objective or no mask, or an iteration of a mask has no value.
    """
    y = torch.as_tensor(objective).detach().cpu().tolist()
    shown = list(masks)
    if not y or not masks:
        raise ValueError("there is nothing to draw: pass the objective and at least one mask")
    if missing := [t for t in shown if not 1 <= t <= len(y) or t not in probabilities]:
        raise ValueError(
            f"iteration {missing[0]} has a mask, but no objective or no probability; the objective "
            f"has iterations 1 to {len(y)}"
        )
    p = dict(sorted(probabilities.items()))
    height = width * image.shape[1] / image.shape[2] + 0.45
    size = (max(6.4, width * len(shown) + 0.7), 2.3 + height + 0.3 * bool(title))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    (above,), (below,) = figure.subfigures(2, 1, squeeze=False, height_ratios=[2.3, height])
    left, right = above.subplots(1, 2)
    left.plot(range(1, len(y) + 1), y, color=COLORS[0])
    left.plot(shown, [y[t - 1] for t in shown], "o", color=COLORS[0], markersize=4)
    left.set(xlabel="iteration", ylabel="objective")
    right.plot(list(p), list(p.values()), color=COLORS[1], linestyle="--", label="masked image")
    right.plot(shown, [p[t] for t in shown], "s", color=COLORS[1], markersize=4)
    right.set(xlabel="iteration", ylabel="probability", ylim=(-0.03, 1.03))
    if whole is not None:
        right.axhline(whole, color="0.4", linewidth=1, linestyle=":", label="whole image")
        right.legend(frameon=False, fontsize=8)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.xaxis.set_major_locator(_whole_numbers())
    axes = below.subplots(1, len(shown), squeeze=False)
    for ax, t in zip(axes[0], shown, strict=True):
        _show(ax, overlay(image, masks[t]))
        ax.set_title(f"iteration {t}", fontsize=9)
        ax.set_xlabel(f"p = {p[t]:.2f}", fontsize=8, labelpad=2)
    _colorbar(below, axes, 1)
    told = f"the objective goes from {y[0]:.3g} to {y[-1]:.3g} in {len(y)} iteration"
    told += "s" if len(y) > 1 else ""
    if whole is not None:
        told += f". The probability of the class is {whole:.2f} in the whole image"
    listed = "; ".join(f"iteration {t} {p[t]:.2f}" for t in shown)
    told += f". Masks on the way and the probability with each: {listed}."
    return _titled(figure, title, alt, told)


def bars(
    values: Mapping[str, float],
    *,
    intervals: Mapping[str, Sequence[float]] | None = None,
    ylabel: str = "",
    title: str = "",
    alt: str | None = None,
    size: tuple[float, float] = (5.5, 3.0),
) -> Picture:
    """Draw one labelled bar for each name, with its value above it.

    Args:
        values: Name → height.
        intervals: Name → lower and upper end of its error bar; none where it is absent or NaN.
        ylabel, title: Texts.
        alt: Alt text. Default: each value, with its interval.
        size: Width and height, inches.
    """
    figure, ax = _chart(size, "", ylabel, title)
    ends = {name: (intervals or {}).get(name, (math.nan, math.nan)) for name in values}
    drawn = ax.bar(
        range(len(values)),
        list(values.values()),
        yerr=np.abs([[v - x for x in ends[name]] for name, v in values.items()]).T
        if intervals
        else None,
        capsize=3,
        color=COLORS[0],
        width=0.65,
    )
    # Three digits of the largest value, but at least one decimal; all are rounded alike.
    largest = max((abs(v) for v in values.values() if math.isfinite(v)), default=0.0)
    decimals = max(1, 2 - math.floor(math.log10(largest))) if largest else 0
    labels = {name: f"{round(value, decimals) + 0.0:g}" for name, value in values.items()}
    ax.bar_label(drawn, labels=list(labels.values()), fontsize=8)
    ax.margins(y=0.12)  # keeps the values below the title
    names = _names(values, 8)
    ax.set_xticks(range(len(names)), names, fontsize=8)
    if sum(map(len, names)) > 12 * size[0]:  # names would overlap
        for label in ax.get_xticklabels():
            label.set(rotation=35, ha="right", rotation_mode="anchor")
    told = "; ".join(
        f"{name} {label}" + ("" if math.isnan(low) else f" ({low:.3g} to {high:.3g})")
        for (name, label), (low, high) in zip(labels.items(), ends.values(), strict=True)
    )
    return Picture(figure, alt or f"Bar chart of {title or ylabel}: {told}.")


def lost_and_won(
    values: Mapping[str, tuple[float, float]],
    *,
    marks: Mapping[str, tuple[float, float]] | None = None,
    marked: str = "",
    lost: str = "lost (AD, %)",
    won: str = "won (AG, %)",
    alt: str | None = None,
    width: float = 6.5,
) -> Picture:
    """Draw each method's loss as a bar to the left, and its gain as a bar to the right.

    Args:
        values: Name → (lost, won) in percent, such as AD and AG.
        marks: Name → (lost, won) of some of these names from another source, drawn as diamonds.
        marked: What the marks are.
        lost, won: Texts below the two sides.
        alt: Alt text. Default: all values.
        width: Inches.
    """
    marks = {name: marks[name] for name in values if name in marks} if marks else {}
    what, below = fitted(marked, width, 9), [fitted(x, width / 2, 9) for x in (lost, won)]
    height = 0.75 + 0.34 * len(values) + _more(below, 9)
    if marks:
        height += 0.3 + _more([what], 9)
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    edge = 1.3 * max([10.0, *(x for v in (values, marks) for pair in v.values() for x in pair)])
    # The values are in a column at the edge, where neither bar nor mark covers them.
    sides = (
        (f"← {below[0]}", (edge, 0), "left", "//"),
        (f"{below[1]} →", (0, edge), "right", ""),
    )
    for side, (label, limits, align, hatch) in enumerate(sides):
        ax, colour = axes[side], COLORS[1 - side]
        for row, pair in enumerate(values.values()):
            ax.barh(row, pair[side], height=0.6, color=colour, hatch=hatch, edgecolor="white")
            text = f"{pair[side]:.1f}"
            ax.text(edge, row, text, ha=align, va="center", size=9, color=colour, weight="bold")
        rows = [list(values).index(name) for name in marks]
        shares = [pair[side] for pair in marks.values()]
        drawn = ax.scatter(
            shares, rows, marker="D", s=26, c="white", edgecolor="black", zorder=3, clip_on=False
        )
        ax.set_xlim(limits)
        ax.set_xlabel(label, fontsize=9)
        ax.tick_params(labelsize=9.5, length=0)
        ax.spines[["top", "right", "left"]].set_visible(False)
    axes[0].set_yticks(range(len(values)), _names(values, 9.5))
    axes[0].invert_yaxis()
    axes[0].tick_params(axis="y", labelleft=False)  # the names stand between the two sides
    axes[1].tick_params(axis="y", labelleft=True, pad=8)
    if marks:
        figure.legend([drawn], [what], fontsize=9, frameon=False, loc="outside upper center")
    told = "; ".join(f"{name} {down:.1f} and {up:.1f}" for name, (down, up) in values.items())
    return Picture(
        figure, alt or f"Bar chart of {lost} to the left and {won} to the right: {told}."
    )


def intervals(
    values: Mapping[str, Mapping[str, tuple[float, float, float]]],
    *,
    xlabel: str = "",
    title: str = "",
    alt: str | None = None,
    width: float = 7.0,
) -> Picture:
    """Draw a point with its interval for each row and series, which have a colour and a marker.

    Args:
        values: Series → row → (value, low, high). A series may lack rows.
        xlabel, title: Texts.
        alt: Alt text. Default: every value with its interval.
        width: Inches.
    """
    rows = list(dict.fromkeys(row for series in values.values() for row in series))
    step = 0.7 / max(1, len(values))
    height = 1.0 + len(rows) * (0.25 + 0.16 * len(values))
    figure, ax = _chart((width, height), xlabel, "", title)
    told = []
    for i, ((name, series), label) in enumerate(zip(values.items(), _names(values), strict=True)):
        y = [rows.index(row) + (i - (len(values) - 1) / 2) * step for row in series]
        points = np.array(list(series.values()), dtype=float).reshape(-1, 3)
        colour = COLORS[i % len(COLORS)]
        ax.hlines(y, points[:, 1], points[:, 2], color=colour, linewidth=1.6)
        ax.scatter(points[:, 0], y, color=colour, marker="osD^vPX"[i % 7], s=28, label=label)
        listed = (f"{row} {v:.2f} ({a:.2f} to {b:.2f})" for row, (v, a, b) in series.items())
        told.append(f"{name}: {', '.join(listed)}")
    ax.axvline(0, color="#9aa3b2", linewidth=0.8, zorder=0)
    ax.set_yticks(range(len(rows)), _names(rows))
    ax.invert_yaxis()
    if len(values) > 1:
        ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return Picture(figure, alt or f"{title or xlabel or 'Intervals'}. {'; '.join(told)}.")
