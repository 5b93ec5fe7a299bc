"""The widget: a changed control changes the settings, and every state changes the widgets."""

from __future__ import annotations

from typing import Any

import ipywidgets as widgets

from ..plots import Picture
from . import panels
from .choices import RANGES, is_whole
from .controller import Controller
from .drawing import draw_snapshot
from .look import Traits, look
from .state import Result, Settings, State


class Explorer(widgets.VBox):
    """The widget that `ol.explore` returns; display it to use it.

    In code: `start()`, `cancel()`, `join(timeout)`, `result`, and `snapshot()`, a static picture
    for readers without a kernel. The controls are attributes (`method`, `layer`, `iterations`, …)
    whose `value` may be set.
    """

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self._rendering = False  # values are being set by `_render`; guarded by the lock
        self._rendered: dict[str, Traits] = {}
        self.image = _control(widgets.Dropdown, "Image")
        self.target = _control(widgets.Dropdown, "Class")
        self.network = _control(widgets.Dropdown, "Network", options=list(controller.sources))
        self.method = _control(widgets.Dropdown, "Method")
        self.layer = _slider(widgets.SelectionSlider, "Layer", options=[""])
        self.layer_note, self.problem = widgets.HTML(), widgets.HTML()
        for option in RANGES:
            label = option.replace("_", " ").capitalize()
            if is_whole(option):
                slider = _slider(widgets.IntSlider, label)
            else:
                slider = _slider(widgets.FloatLogSlider, label, step=0.1, readout_format=".2g")
            setattr(self, option, slider)
        narrow = {"width": "96px"}
        self.run_button = widgets.Button(icon="play", button_style="primary", layout=narrow)
        self.cancel_button = widgets.Button(description="Cancel", icon="stop", layout=narrow)
        self.progress = widgets.IntProgress(layout={"width": "200px"})
        self.status = widgets.HTML(layout={"flex": "1 1 320px"})
        self.image_view, self.overlay_view, self.masked_view = (widgets.HTML() for _ in range(3))
        self.curve_view, self.scores_view, self.history_view = (widgets.HTML() for _ in range(3))
        controller.listener = self._render
        self._render(controller.state)
        self._observe()
        sliders = [getattr(self, option) for option in RANGES]
        super().__init__(
            [
                widgets.HTML(panels.HEADER),
                _row(
                    _column(self.image, self.target, self.network),
                    _column(self.method, self.layer, self.layer_note, *sliders),
                ),
                _row(
                    *(self.run_button, self.cancel_button, self.progress, self.status),
                    align_items="center",
                    grid_gap="4px 10px",
                ),
                self.problem,
                _row(self.image_view, self.overlay_view, self.masked_view),
                _row(self.curve_view, self.scores_view),
                self.history_view,
            ]
        )
        self.add_class("olx")
        # Wait: a method set in code while the worker replaces the list could be another one.
        controller.start(explains=False)
        self.join()

    # ------------------------------------ for notebooks

    @property
    def settings(self) -> Settings:
        """The current values of the controls."""
        return self.controller.state.settings

    @property
    def result(self) -> Result | None:
        """The result of the last finished run; None before it and after a change of image."""
        return self.controller.state.result

    def start(self) -> int:
        """Start a run, as the run button does, without waiting; return its number."""
        return self.controller.start()

    def cancel(self) -> bool:
        """Cancel the run, as the cancel button does; return False if nothing was running."""
        return self.controller.cancel()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until no run is active; return False if `timeout` seconds were not enough."""
        return self.controller.join(timeout)

    def snapshot(self) -> Picture:
        """Return the result of the current settings as a static picture with alternative text.

        Waits for the current run; starts another if that, or the last one, had other settings.

        Raises:
            RuntimeError: If the run failed or was cancelled; the message says why.
        """
        self.join()
        if self.result is None or self.controller.state.differs:
            self.start()
            self.join()
        state = self.controller.state
        if state.result is None:
            raise RuntimeError(state.run.message or "The run was cancelled; start it again.")
        return draw_snapshot(state.result)

    def close(self) -> None:
        """Stop all runs and remove the widget."""
        self.controller.shut()
        super().close()

    def __repr__(self) -> str:
        s = self.settings
        return f"Explorer({s.method} on {s.network}, image {s.image})"

    # ------------------------------------ widgets → settings, state → widgets

    def _observe(self) -> None:
        self.run_button.on_click(lambda button: self.start())
        self.cancel_button.on_click(lambda button: self.cancel())
        for name in ("image", "target", "network", "method", "layer", *RANGES):
            control = getattr(self, name)
            control.observe(lambda change, n=name: self._choose(n, change["new"]), "value")

    def _choose(self, name: str, value: Any) -> None:
        """Change a setting, unless the control was set by `_render`."""
        with self.controller.lock:
            if not self._rendering:
                change = {"options": {name: value}} if name in RANGES else {name: value}
                self.controller.choose(**change)

    def _render(self, state: State) -> None:
        """Update the widgets to a state. Called under the lock, mostly from a worker.

        Widgets whose values in the state are unchanged are not set: the user may just have set
        one, and `_choose` has not yet entered it into the settings.
        """
        new = look(state)
        self._rendering = True
        try:
            for name, traits in new.items():
                if traits != self._rendered.get(name):
                    _apply(getattr(self, name), traits)
        finally:
            self._rendering = False
        self._rendered = new


def _apply(widget: widgets.DOMWidget, traits: Traits) -> None:
    with widget.hold_sync():
        for name, value in traits.items():
            if name == "classes":
                for css, has in value.items():
                    (widget.add_class if has else widget.remove_class)(css)
            elif name == "display":
                widget.layout.display = value
            else:
                setattr(widget, name, value)


def _control(kind: type, label: str, **traits: Any) -> Any:
    return kind(
        description=label,
        style={"description_width": "104px"},
        layout={"width": f"{panels.SIDE - 6}px"},
        **traits,
    )


def _slider(kind: type, label: str, **traits: Any) -> Any:
    return _control(kind, label, continuous_update=False, **traits)


def _row(*children: widgets.Widget, **layout: str) -> widgets.HBox:
    wrapped = {"flex_flow": "row wrap", "margin": "6px 0", "align_items": "flex-start"}
    gap = {"grid_gap": f"6px {panels.GAP}px"}
    return widgets.HBox(children, layout={**wrapped, **gap, **layout})


def _column(*children: widgets.Widget) -> widgets.VBox:
    return widgets.VBox(children, layout={"width": f"{panels.SIDE}px"})
