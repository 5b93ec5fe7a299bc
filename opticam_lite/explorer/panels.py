"""The explorer's panels as HTML: pictures with alternative texts, scores, a table of runs."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from matplotlib import colormaps

from ..methods import METHODS
from ..plots import COLORMAP
from .drawing import AFTER, BEFORE, TILE
from .events import Drawn, Result

SIDE = 400
"""Width of the two columns of controls, and of the two panels below the pictures, in CSS pixels."""
GAP = 16
"""Between what stands side by side, in CSS pixels."""
CURVE = 240
"""Height of the curve, in CSS pixels."""
LAST = 6
"""How many runs the table keeps in sight."""

_COLOURS = ", ".join(
    "#{:02x}{:02x}{:02x}".format(*(round(255 * c) for c in colormaps[COLORMAP](i / 8)[:3]))
    for i in range(9)
)

HEADER = f"""<style>
.olx {{ max-width: 910px; }}
.olx .widget-html-content {{ font-size: 13px; line-height: 1.45; overflow: visible;
  color: var(--jp-ui-font-color1, #222); }}
.olx h3 {{ margin: 2px 0 0; font-size: 17px; font-weight: 600; }}
.olx p {{ margin: 2px 0; }}
.olx small, .olx .olx-soft {{ color: var(--jp-ui-font-color2, #555); font-size: 12px; }}
.olx figure {{ margin: 0; }}
.olx figcaption b {{ display: block; font-size: 14px; }}
.olx figcaption {{ min-height: 40px; margin-bottom: 4px; }}
.olx img, .olx .olx-empty {{ display: block; border-radius: 4px; background: #fff; }}
.olx .olx-empty {{ display: flex; align-items: center; justify-content: center; text-align: center;
  box-sizing: border-box; border: 1.5px dashed var(--jp-border-color1, #bbb);
  color: var(--jp-ui-font-color2, #555); background: none; padding: 12px; }}
.olx .olx-scale {{ display: flex; align-items: center; gap: 6px; margin-top: 5px; }}
.olx .olx-scale span {{ flex: 1; height: 9px; border-radius: 2px;
  background: linear-gradient(to right, {_COLOURS}); }}
.olx .olx-bar {{ display: grid; grid-template-columns: 94px 1fr 58px; align-items: center;
  gap: 8px; margin: 5px 0; }}
.olx .olx-bar i {{ display: block; height: 15px; border-radius: 2px; min-width: 1px; }}
.olx .olx-bar > span:last-child {{ text-align: right; font-variant-numeric: tabular-nums; }}
.olx .olx-track {{ background: var(--jp-layout-color2, #eee); border-radius: 2px; }}
.olx table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 4px 0; }}
.olx th, .olx td {{ padding: 2px 12px 2px 0; text-align: left; font-size: 12px; border: none; }}
.olx th {{ font-weight: 600; color: var(--jp-ui-font-color2, #555);
  border-bottom: 1px solid var(--jp-border-color2, #ddd); }}
.olx .olx-other {{ opacity: 0.65; }}
.olx .olx-old {{ opacity: 0.4; }}
.olx .olx-under {{ display: block; padding: 0 0 4px 112px; }}
.olx td.n, .olx th.n {{ text-align: right; }}
.olx .olx-error {{ border-left: 4px solid #d55e00; padding: 4px 10px; }}
.olx .olx-busy .progress {{ overflow: hidden; }}
.olx .olx-busy .progress-bar {{ width: 30% !important;
  animation: olx-busy 1.2s ease-in-out infinite alternate; }}
@keyframes olx-busy {{ to {{ transform: translateX(233%); }} }}
@media (prefers-reduced-motion: reduce) {{
  .olx .olx-busy .progress-bar {{ width: 100% !important; animation: none; opacity: 0.4; }}
}}
.olx pre {{ white-space: pre-wrap; font-size: 11px; max-height: 240px; overflow: auto; }}
</style>
<h3>What does the network look at?</h3>
<p class="olx-soft">Choose an image, a class and a method and press <b>Run</b>. Then change one
thing, guess what it does, and run again.</p>"""

SCALE = (
    '<div class="olx-scale"><small>0 unimportant</small><span></span><small>1 important</small>'
    "</div>"
)
"""The colour scale of a map."""


def figure(drawn: Drawn, title: str, caption: str, below: str = "", width: int = TILE) -> str:
    """Return a picture with its title, a line of text and its alternative text."""
    height = round(width * drawn.height / drawn.width)
    data = base64.b64encode(drawn.png).decode("ascii")
    return (
        f"<figure>{_caption(title, caption)}"
        f'<img width="{width}" height="{height}" alt="{escape(drawn.alt)}" '
        f'src="data:image/png;base64,{data}">{below}</figure>'
    )


def place(
    title: str, caption: str, text: str, *, below: str = "", width: int = TILE, height: int = TILE
) -> str:
    """Return an empty place for a picture, of the same size, with a text in it."""
    return (
        f'<figure>{_caption(title, caption)}<div class="olx-empty" '
        f'style="width:{width}px;height:{height}px">{escape(text)}</div>{below}</figure>'
    )


def _caption(title: str, caption: str) -> str:
    return f"<figcaption><b>{escape(title)}</b><small>{escape(caption)}</small></figcaption>"


def status(text: str, strong: str = "") -> str:
    """Return a line that screen readers speak when it changes."""
    return f'<span role="status"><b>{escape(strong)}</b>{escape(text)}</span>'


def problem(message: str, details: str) -> str:
    """Return an error: one sentence, and the details folded."""
    return (
        f'<div class="olx-error" role="alert">{escape(message)}'
        "<details><summary>Details for a report of the problem</summary>"
        f"<pre>{escape(details[-6000:])}</pre></details></div>"
    )


def layer_note(shape: tuple[int, int, int], refused: Mapping[str, str], method: str) -> str:
    """Return what is to know of a layer: its maps, if the method uses them, and who can't."""
    maps, height, width = shape
    note = f"This layer has {maps} feature maps of {height} × {width}."
    if not METHODS[method].uses_layer:
        note = f"{escape(method)} uses no layer's feature maps: its map is the same for any layer."
    if refused:
        reasons = "".join(f"<p><b>{escape(m)}</b>: {escape(r)}</p>" for m, r in refused.items())
        verb = "does" if len(refused) == 1 else "do"
        note += f" <details><summary>{', '.join(refused)} {verb} not fit here: why?</summary>"
        note += f"{reasons}</details>"
    return f'<small class="olx-under">{note}</small>'


def scores(result: Result) -> str:
    """Return the probabilities before and after masking, and what they mean for this image."""
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
        "</b><small>in the image and in image × map</small></figcaption>"
        f"{_bar('image', result.before, BEFORE)}{_bar('image × map', result.after, AFTER)}"
        f"<p>Seeing only what the map keeps, the network is {certainty}.</p>"
        f"<p>drop <b>{result.drop:.1%}</b> (lower is better), "
        f"gain <b>{result.gain:.1%}</b> (higher is better)<br>"
        "<small>AD and AG are the means of these two over many images.</small></p>"
        "<table><tr><th colspan=2>most probable in the image</th>"
        f"<th colspan=2>in image × map</th></tr>{rows}</table></div>"
    )


def probability(value: float) -> str:
    """Return a probability with enough digits to tell 0.99987 from 1."""
    return f"{value:.3f}" if 0.001 <= value <= 0.999 or value in (0, 1) else f"{value:.5f}"


def _bar(name: str, value: float, colour: str) -> str:
    return (
        f'<div class="olx-bar"><span>{name}</span><span class="olx-track">'
        f'<i style="width:{100 * value:.1f}%;background:{colour}"></i></span>'
        f"<span>{probability(value)}</span></div>"
    )


def history(results: Sequence[Result]) -> str:
    """Return a table of the last runs, so that settings can be compared."""
    columns = ["run", "image", "class", "method", "network", "layer", "rate", "steps"]
    columns += ["p before", "p after", "drop ↓", "gain ↑", "seconds"]
    numbers = {"run", "rate", "steps", *columns[-5:]}
    rows = []
    for number, result in list(enumerate(results, start=1))[-LAST:]:
        s, method = result.settings, METHODS[result.settings.method]
        steps = next((n for n in ("iterations", "passes") if n in method.options), None)
        rows.append(
            (
                str(number),
                str(s.image),
                result.target_label,
                s.method,
                s.network,
                str(s.layer) if method.uses_layer else "–",
                f"{s.learning_rate:.2g}" if "learning_rate" in method.options else "–",
                str(getattr(s, steps)) if steps else "–",
                probability(result.before),
                probability(result.after),
                f"{result.drop:.1%}",
                f"{result.gain:.1%}",
                f"{result.seconds:.1f}",
            )
        )
    classes = [" class=n" if name in numbers else "" for name in columns]
    head = "".join(f"<th{c}>{n}</th>" for c, n in zip(classes, columns, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{c}>{escape(v)}</td>" for c, v in zip(classes, row, strict=True))
        for row in rows
    )
    return f"<b>Your last runs</b><table><tr>{head}</tr>{body}</table>"
