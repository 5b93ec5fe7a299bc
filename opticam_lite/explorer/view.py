"""The widget: values of controls become settings, events become values of controls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ipywidgets as widgets
from torch import Tensor

from ..methods import METHODS, list_methods
from ..network import Classifier
from ..plots import Picture
from . import panels
from .controller import Controller, block_layers
from .drawing import draw_image, draw_snapshot, subject
from .events import (
    Cancelled,
    Done,
    Event,
    Failed,
    Prepared,
    Preview,
    Progress,
    Result,
    Settings,
    Started,
    Waiting,
)

_CHANGED = "Settings changed: press Run to see their effect."


def _what_counts(settings: Settings) -> Settings:
    """Return settings without those that make no difference to their method."""
    method = METHODS[settings.method]
    options = [o for o in ("learning_rate", "iterations", "passes") if o not in method.options]
    settings = replace(settings, **{option: getattr(Settings, option) for option in options})
    return settings if method.uses_layer else replace(settings, layer=None)


class Explorer(widgets.VBox):
    """The widget that `ol.explore` returns; display it to use it.

    In code: `start()`, `cancel()`, `join(timeout)`, `result`, and `snapshot()`, a static picture
    for readers without a kernel. The controls are attributes (`method`, `layer`, `iterations`, …)
    whose `value` may be set.
    """

    def __init__(
        self,
        networks: Mapping[str, Classifier | str],
        images: Tensor,
        targets: Tensor | None = None,
    ) -> None:
        self._targets = targets
        self._muted = False  # the view is setting values itself; guarded by the controller's lock
        self._previewed = False
        self._result: Result | None = None
        self._asked: Settings | None = None  # the settings of the run that found it
        self._chosen = ""  # the method that the user chose, whether it fits just now or not
        self._prepared: Prepared | None = None  # the network and layer that the controls offer
        # What the sliders were set to for each method: (method, option) → value.
        self._tuned: dict[tuple[str, str], float] = {}
        self.controller = Controller(networks, images, self._show)
        first = self.controller.loaded(next(iter(networks)))
        if first is None:
            raise TypeError("the first network must be a Classifier, not a name")
        self._labels = self._first_labels = tuple(first.labels)
        # The given class of each image; empty where none is given.
        self._truths = (
            [""] * len(images) if targets is None else [first.labels[t] for t in targets.tolist()]
        )
        self._build(first)
        super().__init__(
            [
                widgets.HTML(panels.HEADER),
                self._row(
                    self._column(self.image, self.target, self.network),
                    self._column(
                        self.method,
                        self.layer,
                        self.layer_note,
                        self.learning_rate,
                        self.iterations,
                        self.passes,
                    ),
                ),
                self._row(self.run_button, self.cancel_button, self.progress, self.status),
                self.problem,
                self._row(self.image_view, self.overlay_view, self.masked_view),
                self._row(self.curve_view, self.scores_view),
                self.history_view,
            ]
        )
        self.add_class("olx")
        self._observe()
        self._show_image()
        self._clear("Press Run")
        # Wait: a method chosen in code while the worker exchanges the list would be another one.
        self.prepare()
        self.join()

    # ------------------------------------ for notebooks

    @property
    def settings(self) -> Settings:
        """What the controls say now."""
        return Settings(
            image=self.image.value,
            network=self.network.value,
            method=self.method.value,
            target=self.target.value,
            layer=self.layer.value or None,
            learning_rate=float(self.learning_rate.value),
            iterations=int(self.iterations.value),
            passes=int(self.passes.value),
        )

    @property
    def result(self) -> Result | None:
        """What the last finished run found; None before the first and after a change of image."""
        return self._result

    def prepare(self) -> int:
        """Load and cut the chosen network in a worker, without a run."""
        return self.controller.prepare(self.settings)

    def start(self) -> int:
        """Do what the run button does; return the number of the run. Does not wait."""
        return self.controller.start(self.settings)

    def cancel(self) -> bool:
        """Do what the cancel button does; return False if nothing was running."""
        return self.controller.cancel()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until nothing runs any more; return False if `timeout` seconds were not enough."""
        return self.controller.join(timeout)

    def snapshot(self) -> Picture:
        """Return what the present settings give, as a static picture with alternative text.

        Waits for the run under way; runs if that, or the last one, had other settings.

        Raises:
            RuntimeError: If the run failed or was cancelled; the message says why.
        """
        self.join()
        if self._result is None or self._differs():
            self.start()
            self.join()
        if self._result is None:
            raise RuntimeError(self.controller.error or "The run was cancelled; start it again.")
        return draw_snapshot(self._result)

    def close(self) -> None:
        """Stop what runs and remove the widget."""
        self.controller.shut()
        super().close()

    def __repr__(self) -> str:
        s = self.settings
        return f"Explorer({s.method} on {s.network}, image {s.image})"

    # ------------------------------------ building

    def _build(self, classifier: Classifier) -> None:
        wide = {"style": {"description_width": "104px"}}
        names = self.controller.networks
        images = [(f"{i}: {t}" if t else str(i), i) for i, t in enumerate(self._truths)]
        self.image = widgets.Dropdown(options=images, description="Image", **wide)
        self.target = widgets.Dropdown(options=[("", None)], description="Class", **wide)
        self.network = widgets.Dropdown(options=names, description="Network", **wide)
        methods = list_methods()
        first = self._chosen = "opti-cam" if "opti-cam" in methods else methods[0]
        self.method = widgets.Dropdown(options=methods, value=first, description="Method", **wide)
        self.layer = widgets.SelectionSlider(
            options=block_layers(classifier),
            value=classifier.layer,
            description="Layer",
            continuous_update=False,
            **wide,
        )
        self.learning_rate = widgets.FloatLogSlider(
            value=0.1, base=10, min=-2, max=0, step=0.1, readout_format=".2g",
            description="Learning rate", continuous_update=False, **wide,
        )  # fmt: skip
        self.iterations = widgets.IntSlider(
            value=100, min=1, max=300, description="Iterations", continuous_update=False, **wide
        )
        self.passes = widgets.IntSlider(
            value=20, min=2, max=100, description="Passes", continuous_update=False, **wide
        )
        self._sliders = {
            "learning_rate": self.learning_rate,
            "iterations": self.iterations,
            "passes": self.passes,
        }
        for control in (
            *(self.image, self.target, self.network, self.method, self.layer),
            *self._sliders.values(),
        ):
            control.layout.width = f"{panels.SIDE - 6}px"
        self._tune()
        self.layer_note = widgets.HTML()
        self.run_button = widgets.Button(description="Run", icon="play", button_style="primary")
        self.cancel_button = widgets.Button(description="Cancel", icon="stop", disabled=True)
        for button in (self.run_button, self.cancel_button):
            button.layout = widgets.Layout(width="96px")
        self.progress = widgets.IntProgress(
            value=0, min=0, max=1, layout=widgets.Layout(width="200px")
        )
        self.status = widgets.HTML(layout=widgets.Layout(flex="1 1 320px"))
        self.problem = widgets.HTML()
        self.image_view, self.overlay_view, self.masked_view = (widgets.HTML() for _ in range(3))
        self.curve_view, self.scores_view, self.history_view = (widgets.HTML() for _ in range(3))
        self._offer_targets()

    def _row(self, *children: widgets.Widget) -> widgets.HBox:
        layout = widgets.Layout(
            flex_flow="row wrap",
            grid_gap=f"6px {panels.GAP}px",
            align_items="flex-start",
            margin="6px 0",
        )
        if self.progress in children:
            layout.align_items, layout.grid_gap = "center", "4px 10px"
        return widgets.HBox(children, layout=layout)

    def _column(self, *children: widgets.Widget) -> widgets.VBox:
        return widgets.VBox(children, layout=widgets.Layout(width=f"{panels.SIDE}px"))

    def _observe(self) -> None:
        self.run_button.on_click(lambda button: self.start())
        self.cancel_button.on_click(lambda button: self.cancel())
        for control, react in (
            (self.image, self._on_image),
            (self.network, self._on_network),
            (self.layer, self._on_layer),
            (self.method, self._on_method),
            (self.target, self._on_setting),
            *((slider, self._on_slider) for slider in self._sliders.values()),
        ):
            control.observe(self._reaction(react), names="value")

    def _reaction(self, react: Callable[[], object]) -> Callable[[Any], None]:
        def on_change(change: Any) -> None:
            with self.controller.lock:
                if not self._muted:
                    react()

        return on_change

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """Set values without reacting to them; callers hold the controller's lock."""
        before, self._muted = self._muted, True
        try:
            yield
        finally:
            self._muted = before

    # ------------------------------------ reactions to the controls

    def _on_image(self) -> None:
        with self._quietly():
            self._offer_targets()
        self._show_image()
        self._clear("Press Run")
        self.prepare()  # ends a run of the former image

    def _on_network(self) -> None:
        with self._quietly():
            # Another network has other layers: its own is chosen when it is there.
            self.layer.options = [("its own", "")]
        self._prepared = None
        self._clear("Press Run")
        self.prepare()

    def _on_layer(self) -> None:
        self.prepare()

    def _on_method(self) -> None:
        self._chosen = self.method.value
        with self._quietly():
            self._tune()
        self._enable()
        self._on_setting()

    def _on_slider(self) -> None:
        for option, slider in self._sliders.items():
            self._tuned[self.method.value, option] = slider.value
        self._on_setting()

    def _on_setting(self) -> None:
        if not self.controller.running:
            self._mark()
            if text := self._compared():
                self._say(text)

    def _compared(self) -> str:
        """Say whether the result in sight is that of the controls; nothing if there is none."""
        if self._result is None:
            return ""
        return _CHANGED if self._differs() else "These settings gave this map."

    def _differs(self) -> bool:
        """Say whether the controls ask for something else than what the last run was asked."""
        return self._asked is None or _what_counts(self._asked) != _what_counts(self.settings)

    # ------------------------------------ what the controls offer

    def _tune(self) -> None:
        """Set the sliders to what they were for this method, or else to its defaults."""
        method = METHODS[self.method.value]
        for option, slider in self._sliders.items():
            if option in method.defaults:
                default = method.defaults[option]
                if option == "iterations":
                    slider.max = max(300, default)
                slider.value = self._tuned.get((method.name, option), default)

    def _offer_targets(self) -> None:
        """Offer all classes; choose the image's own, or else the predicted one."""
        options: list[tuple[str, int | None]] = [("the one that the network predicts", None)]
        options += [(label, index) for index, label in enumerate(self._labels)]
        self.target.options = options
        # Targets count the classes of the first network; another may have others.
        target = None
        if self._targets is not None and self._labels == self._first_labels:
            target = int(self._targets[self.image.value])
        self.target.value = target

    def _offer(self, event: Prepared) -> str:
        """Offer what fits the network at this layer, keeping what was chosen where it fits.

        A method that did not fit for a while comes back, but never in the middle of a run.

        Returns:
            What is to be said if another method is chosen now, or nothing.
        """
        before = self.method.value
        chosen = before if event.explains else self._chosen
        fits = chosen in event.methods
        with self._quietly():
            if event.labels != self._labels:
                self._labels = event.labels
                self._offer_targets()
            if tuple(self.layer.options) != event.layers:
                self.layer.options = event.layers
            self.layer.value = event.layer
            if tuple(self.method.options) != event.methods:
                self.method.options = event.methods
            fallback = "opti-cam" if "opti-cam" in event.methods else event.methods[-1]
            self.method.value = chosen if fits else fallback
            self._tune()
        self._prepared = event
        if self.method.value == before:
            return ""
        if fits:
            return f"{chosen} fits this layer and is chosen again."
        return f"{before} does not fit this layer; {self.method.value} is chosen now."

    def _enable(self) -> None:
        """Show and switch on the controls that make a difference now."""
        busy, method = self.controller.running, METHODS[self.method.value]
        for option, slider in self._sliders.items():
            slider.layout.display = None if option in method.options else "none"
        self.layer.disabled = not method.uses_layer
        self.layer_note.value = ""
        if (now := self._prepared) is not None:
            self.layer_note.value = panels.layer_note(now.shape, now.refused, method.name)
        self.cancel_button.disabled = not busy
        self.run_button.description = "Restart" if busy else "Run"
        # Until a first step is told, the bar moves to and fro.
        waits = busy and self.progress.value == 0
        (self.progress.add_class if waits else self.progress.remove_class)("olx-busy")

    # ------------------------------------ showing

    def _show(self, event: Event) -> None:
        """Show an event. Called under the controller's lock, mostly from a worker."""
        match event:
            case Started(explains=explains, settings=settings):
                self.problem.value = ""
                self.progress.value, self.progress.max = 0, 1
                self.progress.bar_style = "info"
                loaded = self.controller.loaded(settings.network) is not None
                self._say("Working …" if loaded else f"Loading {settings.network} …")
                if explains:
                    self._asked = settings
                    self._age()
            case Waiting():
                self._say("Waiting for another run to let go of the network …")
            case Prepared(explains=explains):
                note = self._offer(event)
                self._mark()
                self._say(note or self._compared() or "Ready: press Run.")
                if explains and self._asked is not None:
                    if self._asked.layer is None:
                        self._asked = replace(self._asked, layer=event.layer)
                    self._say(f"Running {self._asked.method} …")
            case Progress(index=index, total=total):
                self.progress.max, self.progress.value = total, index
                self._say(f"Step {index} of {total}")
            case Preview():
                self._previewed = True
                self._show_maps(event)
            case Done(result=result):
                self._result = result
                self.progress.value, self.progress.bar_style = self.progress.max, "success"
                changed = " Settings changed meanwhile: press Run to see their effect."
                hint = changed if self._differs() else ""
                self._say(f" in {result.seconds:.1f} s.{hint}", strong="Done")
                self._show_maps(event)
                self.scores_view.value = panels.scores(result)
                self.scores_view.remove_class("olx-old")
                self.history_view.value = panels.history(self.controller.history)
                self._mark()
            case Failed(message=message, details=details):
                self.progress.bar_style = "danger"
                self._say("", strong="Stopped by an error.")
                self._clear("No result")
                self.problem.value = panels.problem(message, details)
            case Cancelled(explains=False):
                self._say(".", strong="Cancelled")
                self._mark()
            case Cancelled(index=index, total=total):
                self.progress.bar_style = "warning"
                text = f" after {index} of {total} steps" if total else ""
                if self._previewed:
                    text += "; the map is the last one drawn"
                    self._clear_scores("Not measured")
                else:
                    self._clear("Press Run")
                self._say(f"{text}.", strong="Cancelled")
                self._mark()
        self._enable()

    def _say(self, text: str, strong: str = "") -> None:
        self.status.value = panels.status(text, strong)

    def _show_image(self) -> None:
        index = self.image.value
        truth = self._truths[index]
        drawn = draw_image(
            self.controller.images[index], f"Image {index}" + (f": {truth}" if truth else "")
        )
        caption = f"its class: {truth}" if truth else "as the network gets it"
        self.image_view.value = panels.figure(drawn, f"Image {index}", caption)

    def _clear(self, text: str) -> None:
        """Empty the places of a result."""
        self._result, self._previewed = None, False
        self.overlay_view.value = panels.place(
            "Map", "what matters to the network", text, below=panels.SCALE
        )
        self.masked_view.value = panels.place("Image × map", "only what the map keeps", text)
        self.curve_view.value = panels.place(
            "Objective", "what is maximised", text, width=panels.SIDE, height=panels.CURVE
        )
        self._clear_scores(text)
        self._age(False)

    def _clear_scores(self, text: str) -> None:
        self.scores_view.value = panels.place(
            "Probability of the class",
            "in the image and in image × map",
            text,
            width=panels.SIDE,
            height=panels.CURVE,
        )
        self.scores_view.remove_class("olx-old")

    def _age(self, old: bool = True) -> None:
        """Let what is shown fade, until the run that has begun replaces it."""
        if old:
            if self._result is None:
                self._clear("Working …")
            self._result, self._previewed = None, False
        for view in self._found():
            (view.add_class if old else view.remove_class)("olx-old")
            view.remove_class("olx-other")

    def _mark(self) -> None:
        """Let what is shown fade a little while the controls say something else."""
        shown = self._result is not None or self._previewed
        for view in self._found():
            other = shown and self._differs()
            (view.add_class if other else view.remove_class)("olx-other")

    def _found(self) -> tuple[widgets.HTML, ...]:
        """Return the places of what a run finds."""
        return self.overlay_view, self.masked_view, self.curve_view, self.scores_view

    def _show_maps(self, event: Preview | Done) -> None:
        settings = event.result.settings if isinstance(event, Done) else event.settings
        self.overlay_view.value = panels.figure(
            event.overlay,
            f"Map of {settings.method}",
            subject(settings),
            below=panels.SCALE,
        )
        self.masked_view.value = panels.figure(
            event.masked, "Image × map", "only what the map keeps"
        )
        for view in (self.overlay_view, self.masked_view, self.curve_view):
            view.remove_class("olx-old")
        if event.curve is None:
            text = f"{settings.method} optimises nothing, so there is no curve."
            self.curve_view.value = panels.place(
                "Objective", "", text, width=panels.SIDE, height=panels.CURVE
            )
        else:
            self.curve_view.value = panels.figure(
                event.curve, "Objective", f"what {settings.method} maximises", width=panels.SIDE
            )
