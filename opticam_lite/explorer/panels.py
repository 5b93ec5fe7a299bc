"""The explorer's panels as HTML: pictures with alternative texts, scores, a table of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from matplotlib import colormaps

from ..methods import METHODS
from ..plots import COLORMAP
from .choices import Choices, is_whole
from .drawing import AFTER, BEFORE, TILE
from .state import Drawn, Result, State

SIDE = 400
"""Width of the two columns of controls, and of the two panels below the pictures, in CSS pixels."""
GAP = 16
"""Gap between columns and panels, in CSS pixels."""
WIDE = (SIDE, 240)
"""Width and height of these two panels, in CSS pixels."""
LAST = 6
"""Number of runs in the table."""

_COLOURS = ", ".join(
    "#{:02x}{:02x}{:02x}".format(*(round(255 * c) for c in colormaps[COLORMAP](i / 8)[:3]))
    for i in range(9)
)

HEADER = f"""<style>
.olx {{ --olx-colours: {_COLOURS}; }}
{Path(__file__).with_name("style.css").read_text("utf-8")}</style>
<h3>What does the network look at?</h3>
<p class="olx-soft">Choose an image, a class and a method and press <b>Run</b>. Then change one
thing, guess what it does, and run again.</p>"""

SCALE = (
    '<div class="olx-scale"><small>0 unimportant</small><span></span><small>1 important</small>'
    "</div>"
)
"""The colour scale of a map."""
COMPARED = "in the image and in image × map"


def panel(
    content: Drawn | str,
    title: str,
    caption: str,
    below: str = "",
    size: tuple[int, int] = (TILE, TILE),
) -> str:
    """Return a picture, or an empty box with a text, under a title and a line of text.

    A picture has the width of that size, and its height follows from its aspect ratio.
    """
    width, height = size
    if isinstance(content, Drawn):
        height = round(width * content.height / content.width)
        inside = (
            f'<img width="{width}" height="{height}" alt="{escape(content.alt)}" '
            f'src="{content.url}">'
        )
    else:
        inside = (
            f'<div class="olx-empty" style="width:{width}px;height:{height}px">'
            f"{escape(content)}</div>"
        )
    return (
        f"<figure><figcaption><b>{escape(title)}</b><small>{escape(caption)}</small></figcaption>"
        f"{inside}{below}</figure>"
    )


def status(state: State) -> str:
    """Return a line that screen readers read out when it changes."""
    strong, text = _status(state)
    return f'<span role="status"><b>{strong}</b>{escape(text)}</span>'


def _status(state: State) -> tuple[str, str]:
    run, result = state.run, state.result
    index, total = run.step
    changed = "Settings changed: press Run to see their effect."
    compared = result and (changed if state.differs else "These settings gave this map.")
    if compared and run.outdated:
        return "", compared
    match run.phase:
        case "loading":
            return "", f"Loading {run.asked.network} …"
        case "working":
            return "", "Working …"
        case "waiting":
            return "", "Waiting for another run to release the network …"
        case "running":
            return "", f"Step {index} of {total}" if total else f"Running {run.asked.method} …"
        case "failed":
            return "Stopped by an error.", ""
        case "cancelled":
            steps = f" after {index} of {total} steps" if total else ""
            preview = "; the map is the last one drawn" if state.shown and not result else ""
            return "Cancelled", f"{steps}{preview}."
        case "done" if result is not None:
            hint = " Settings changed meanwhile: press Run to see their effect."
            return "Done", f" in {result.seconds:.1f} s.{hint if state.differs else ''}"
    return "", run.note or compared or "Ready: press Run."


def problem(message: str, details: str) -> str:
    """Return an error: one sentence, and the details collapsed."""
    return (
        f'<div class="olx-error" role="alert">{escape(message)}'
        "<details><summary>Details for a report of the problem</summary>"
        f"<pre>{escape(details[-6000:])}</pre></details></div>"
    )


def layer_note(choices: Choices, method: str) -> str:
    """Return the shape of the layer's feature maps, if it matters, and which methods don't fit."""
    if choices.shape is None:
        return ""
    refused = choices.refused
    maps, height, width = choices.shape
    note = f"This layer has {maps} feature maps of {height} × {width}."
    if not METHODS[method].uses_layer:
        note = f"{escape(method)} uses no layer's feature maps: its map is the same for any layer."
    if refused:
        reasons = "".join(f"<p><b>{escape(m)}</b>: {escape(r)}</p>" for m, r in refused.items())
        verb = "does" if len(refused) == 1 else "do"
        note += f" <details><summary>{', '.join(refused)} {verb} not fit here: why?</summary>"
        note += f"{reasons}</details>"
    return f'<small class="olx-under">{note}</small>'


def scores(result: Result | None, text: str) -> str:
    """Return the probabilities before and after masking with their meaning, or else a text."""
    if result is None:
        return panel(text, "Probability of the class", COMPARED, size=WIDE)
    change = result.after - result.before
    if abs(change) < 0.005:
        certainty = "<b>about as</b> certain"
    else:
        certainty = f"<b>{'more' if change > 0 else 'less'}</b> certain"
    rows = "".join(
        f"<tr><td>{escape(a)}</td><td class=n>{probability(p)}</td>"
        f"<td>{escape(b)}</td><td class=n>{probability(o)}</td></tr>"
        for (a, p), (b, o) in zip(result.top_before, result.top_after, strict=True)
    )
    return (
        f'<div style="width:{SIDE}px"><figcaption><b>Probability of “{escape(result.target_label)}”'
        f"</b><small>{COMPARED}</small></figcaption>"
        f"{_bar('image', result.before, BEFORE)}{_bar('image × map', result.after, AFTER)}"
        f"<p>Seeing only what the map keeps, the network is {certainty}.</p>"
        f"<p>drop <b>{result.drop:.1%}</b> (lower is better), "
        f"gain <b>{result.gain:.1%}</b> (higher is better)<br>"
        "<small>AD and AG are the means of these two over many images.</small></p>"
        "<table><tr><th colspan=2>most probable in the image</th>"
        f"<th colspan=2>in image × map</th></tr>{rows}</table></div>"
    )


def probability(value: float) -> str:
    """Return a probability with enough digits to distinguish 0.99987 from 1."""
    return f"{value:.3f}" if 0.001 <= value <= 0.999 or value in (0, 1) else f"{value:.5f}"


def _bar(name: str, value: float, colour: str) -> str:
    return (
        f'<div class="olx-bar"><span>{name}</span><span class="olx-track">'
        f'<i style="width:{100 * value:.1f}%;background:{colour}"></i></span>'
        f"<span>{probability(value)}</span></div>"
    )


def history(results: Sequence[Result]) -> str:
    """Return a table of the last runs, so that settings can be compared."""
    if not results:
        return ""
    rows = []
    for number, result in list(enumerate(results, start=1))[-LAST:]:
        s = result.settings
        whole = [str(value) for option, value in s.options.items() if is_whole(option)]
        other = [f"{v:.2g}" for option, v in s.options.items() if not is_whole(option)]
        rows.append(
            {
                "run": number,
                "image": s.image,
                "class": result.target_label,
                "method": s.method,
                "network": s.network,
                "layer": s.layer if METHODS[s.method].uses_layer else "–",
                "rate": ", ".join(other) or "–",
                "steps": ", ".join(whole) or "–",
                "p before": probability(result.before),
                "p after": probability(result.after),
                "drop ↓": f"{result.drop:.1%}",
                "gain ↑": f"{result.gain:.1%}",
                "seconds": f"{result.seconds:.1f}",
            }
        )
    lines = [_line("th", dict(zip(rows[0], rows[0], strict=True)))]
    lines += [_line("td", row) for row in rows]
    return f"<b>Your last runs</b><table>{''.join(lines)}</table>"


def _line(tag: str, cells: Mapping[str, object]) -> str:
    """Return a line of the table; all but names are right-aligned."""
    names = ("image", "class", "method", "network", "layer")
    classes = ["" if column in names else " class=n" for column in cells]
    both = zip(classes, cells.values(), strict=True)
    return f"<tr>{''.join(f'<{tag}{c}>{escape(str(text))}</{tag}>' for c, text in both)}</tr>"
