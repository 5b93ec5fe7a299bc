"""The view of a state: one function from a `State` to the values of all widgets."""

from __future__ import annotations

from typing import Any

from ..methods import METHODS
from . import panels
from .choices import RANGES, slider_range
from .drawing import subject
from .state import Drawn, State

Traits = dict[str, Any]
"""Values of a widget's traits in the order in which they are set; `classes` are CSS classes that it
has or has not, and `display` is that of its layout."""

_BAR = {"done": "success", "failed": "danger", "cancelled": "warning"}


def look(state: State) -> dict[str, Traits]:
    """Return what each widget of the explorer shows, by its name."""
    return {**_controls(state), **_run(state), **_pictures(state)}


def _controls(state: State) -> dict[str, Traits]:
    settings, choices = state.settings, state.choices
    classes: list[tuple[str, int | None]] = [("the one that the network predicts", None)]
    classes += [(label, index) for index, label in enumerate(choices.labels)]
    images = [(f"{i}: {c}" if c else str(i), i) for i, c in enumerate(state.classes)]
    # Target and layer by index: a dropdown that is set to the value None shows nothing.
    target = 0 if settings.target is None else settings.target + 1
    layers = choices.layers or ("its own",)
    looks: dict[str, Traits] = {
        "image": {"options": images, "value": settings.image},
        "target": {"options": classes, "index": target},
        "network": {"value": settings.network},
        "method": {"options": choices.methods, "value": settings.method},
        "layer": {
            "options": layers,
            "index": layers.index(settings.layer) if settings.layer in layers else 0,
            "disabled": not METHODS[settings.method].uses_layer,
        },
        "layer_note": {"value": panels.layer_note(choices, settings.method)},
    }
    for option in RANGES:
        looks[option] = {"display": "none"}
        if option in settings.options:
            low, high = slider_range(settings.method, option)
            value = settings.options[option]
            looks[option] = {"min": low, "max": high, "value": value, "display": None}
    return looks


def _run(state: State) -> dict[str, Traits]:
    run = state.run
    index, total = run.step
    return {
        "run_button": {"description": "Restart" if run.busy else "Run"},
        "cancel_button": {"disabled": not run.busy},
        "progress": {
            "max": max(total, 1),
            "value": index,
            "bar_style": _BAR.get(run.phase, "info"),
            # The bar is indeterminate until the first step.
            "classes": {"olx-busy": run.busy and not index},
        },
        "status": {"value": panels.status(state)},
        "problem": {"value": panels.problem(run.message, run.details) if run.message else ""},
    }


def _pictures(state: State) -> dict[str, Traits]:
    """Return the pictures of the result, or a text in their place.

    Those of the previous run are faded until they are replaced; those of other settings are paler.
    """
    run, shown, result = state.run, state.shown or state.former, state.result
    if result is None and state.former is not None:
        result = state.former.result
    text = "Press Run"
    if run.busy and run.explains:
        text = "Working …"
    elif run.phase == "failed":
        text = "No result"
    elif shown is not None:
        text = "Not measured"
    pictures: tuple[Drawn | str, ...] = (text, text, text)
    title, of, objective = "Map", "what matters to the network", "what is maximised"
    if shown is not None:
        method = shown.asked.method
        no_curve = f"{method} optimises nothing, so there is no curve."
        pictures = (shown.overlay, shown.masked, shown.curve or no_curve)
        title, of = f"Map of {method}", subject(shown.asked)
        objective = f"what {method} maximises" if shown.curve else ""
    overlay, masked, curve = pictures
    views = {
        "overlay_view": panels.panel(overlay, title, of, below=panels.SCALE),
        "masked_view": panels.panel(masked, "Image × map", "only what the map keeps"),
        "curve_view": panels.panel(curve, "Objective", objective, size=panels.WIDE),
        "scores_view": panels.scores(result, text),
    }
    other = state.shown is not None and state.differs
    looks: dict[str, Traits] = {}
    for name, html in views.items():
        old = state.former is not None and (state.shown is None or name == "scores_view")
        looks[name] = {"value": html, "classes": {"olx-old": old, "olx-other": other}}
    number, label = state.settings.image, state.classes[state.settings.image]
    caption = f"its class: {label}" if label else "as the network gets it"
    looks["image_view"] = {"value": panels.panel(state.picture, f"Image {number}", caption)}
    looks["history_view"] = {"value": panels.history(state.history)}
    return looks
