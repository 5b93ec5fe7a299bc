"""The explorer's state: one immutable `State`, which determines the whole view."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from torch import Tensor

from ..methods import METHODS
from .choices import Choices

Phase = Literal[
    "loading", "working", "waiting", "running", "ready", "done", "failed", "cancelled"
]  # fmt: skip
"""Phases of a run: the first four while its worker is busy, the others when it has ended."""


@dataclass(frozen=True)
class Settings:
    """The settings of one run.

    Attributes:
        image: Index of the image.
        network: Name of the network, one of the controller's.
        method: Name of the method.
        target: Index of the class, or None for the class that the network predicts.
        layer: Name of the layer, or None for the network's own.
        options: The method's own options that sliders set, by name; see `choices.tunable`.
    """

    image: int
    network: str
    method: str = "opti-cam"
    target: int | None = None
    layer: str | None = None
    options: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Drawn:
    """A picture: PNG bytes, its size in pixels and its alternative text."""

    png: bytes = field(repr=False)
    width: int
    height: int
    alt: str

    @cached_property
    def url(self) -> str:
        """The picture as a data URL."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode('ascii')}"


@dataclass(frozen=True)
class Result:
    """The result of a finished run.

    Attributes:
        settings: Of the run; `target` and `layer` are never None here.
        image, mask: `(3, H, W)` and `(1, H, W)`, both in [0, 1].
        target_label: Name of the explained class.
        before, after: Probability of the class in the image and in the masked image, in [0, 1].
        drop, gain: Relative drop and gain of this image (inside eqs. 13 and 15), in [0, 1].
        top_before, top_after: The three most probable classes of either, with probabilities.
        objective: The objective after each iteration; empty if the method has none.
        steps: The largest possible number of iterations.
        seconds: Time of the method alone.
    """

    settings: Settings
    image: Tensor = field(repr=False)
    mask: Tensor = field(repr=False)
    target_label: str
    before: float
    after: float
    drop: float
    gain: float
    top_before: tuple[tuple[str, float], ...]
    top_after: tuple[tuple[str, float], ...]
    objective: tuple[float, ...]
    steps: int
    seconds: float


@dataclass(frozen=True)
class Shown:
    """The pictures of a map: a preview while `result` is None.

    `asked` are the settings of the run; only its `target` may be None.
    """

    asked: Settings
    overlay: Drawn
    masked: Drawn
    curve: Drawn | None
    result: Result | None = None


@dataclass(frozen=True)
class Run:
    """The current run, or the last one.

    Attributes:
        number: Counts the runs.
        asked: The settings at its start.
        explains: False if it only loads a network or cuts it at a layer.
        phase: Its current phase, or how it ended.
        step: Steps done and steps at most; zeros before the first.
        note: Why the method was changed, or an empty text.
        message, details: Of an error: one sentence for users, and details for a bug report.
        outdated: Whether a setting was changed after its end.
    """

    number: int
    asked: Settings
    explains: bool = False
    phase: Phase = "ready"
    step: tuple[int, int] = (0, 0)
    note: str = ""
    message: str = ""
    details: str = ""
    outdated: bool = False

    @property
    def busy(self) -> bool:
        """Whether it has not ended."""
        return self.phase in ("loading", "working", "waiting", "running")


@dataclass(frozen=True)
class State:
    """The whole state of the explorer; every change makes a new one.

    Attributes:
        settings: Values of the controls. Its options are all that can be set for its method.
        picture: The chosen image, drawn.
        run: The current run, or the last one.
        choices: What can be chosen for the chosen network and layer.
        preferred: The method that the user chose, whether it applies to the layer or not.
        classes: Name of the given class of each image; empty where none is given.
        tuned: For each method the options that the user has set.
        shown: The preview or result of the run so far; None before the first.
        former: The result of the previous run, which stays visible until it is replaced.
        history: The results of all finished runs.
    """

    settings: Settings
    picture: Drawn
    run: Run
    choices: Choices
    preferred: str
    classes: tuple[str, ...]
    tuned: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    shown: Shown | None = None
    former: Shown | None = None
    history: tuple[Result, ...] = ()

    @property
    def result(self) -> Result | None:
        """The result of the last run; None if it has none, or if it was of another image."""
        return None if self.shown is None else self.shown.result

    @property
    def differs(self) -> bool:
        """Whether the settings differ from those of the map that is shown."""
        if self.shown is None:
            return True
        asked, now = self.shown.asked, self.settings
        if not METHODS[now.method].uses_layer:
            asked = replace(asked, layer=now.layer)
        return asked != now
