"""What a run is asked, what it finds, and what it tells while it goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """What one run explains, and how.

    Attributes:
        image: Index of the image.
        network: Name of the network, one of the controller's.
        method: Name of the method.
        target: Index of the class, or None for the class that the network predicts.
        layer: Name of the layer, or None for the network's own.
        learning_rate, iterations, passes: Of a method that takes them, such as Opti-CAM; > 0, ≥ 0
            and ≥ 2.
    """

    image: int
    network: str
    method: str = "opti-cam"
    target: int | None = None
    layer: str | None = None
    learning_rate: float = 0.1
    iterations: int = 100
    passes: int = 20


@dataclass(frozen=True)
class Drawn:
    """A picture: PNG bytes, its size in pixels and its words for who can't see it."""

    png: bytes
    width: int
    height: int
    alt: str


@dataclass(frozen=True)
class Result:
    """What a finished run found.

    Attributes:
        settings: What was asked; `target` and `layer` are never None here.
        image, mask: `(3, H, W)` and `(1, H, W)`, both in [0, 1].
        target_label: Name of the explained class.
        before, after: Probability of the class in the image and in the masked image, in [0, 1].
        drop, gain: Relative drop and gain of this image (inside eqs. 13 and 15), in [0, 1].
        top_before, top_after: The three most probable classes of either, with probabilities.
        objective: The objective after each iteration; empty if the method optimises nothing.
        steps: How many iterations there would have been at most.
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
class Event:
    """Something that happened in the run of that number."""

    run: int


@dataclass(frozen=True)
class Started(Event):
    """A run began; `explains` is False if it only loads a network or cuts it at a layer."""

    settings: Settings
    explains: bool


@dataclass(frozen=True)
class Waiting(Event):
    """The network is still in use by another run."""


@dataclass(frozen=True)
class Prepared(Event):
    """The network is loaded and cut; what can be chosen with it.

    `methods` are those that can explain it at this layer, `refused` says why the others can't.
    `shape` is (K, h, w) of the layer's maps.
    """

    network: str
    layer: str
    layers: tuple[str, ...]
    shape: tuple[int, int, int]
    labels: tuple[str, ...]
    methods: tuple[str, ...]
    refused: Mapping[str, str]
    explains: bool


@dataclass(frozen=True)
class Progress(Event):
    """Step `index` of at most `total` is done."""

    index: int
    total: int


@dataclass(frozen=True)
class Preview(Event):
    """The present state of an optimisation, drawn."""

    settings: Settings
    overlay: Drawn
    masked: Drawn
    curve: Drawn


@dataclass(frozen=True)
class Done(Event):
    """A run ended well."""

    result: Result
    overlay: Drawn
    masked: Drawn
    curve: Drawn | None


@dataclass(frozen=True)
class Failed(Event):
    """A run ended with an error: one sentence for everybody, and details for a bug report."""

    message: str
    details: str


@dataclass(frozen=True)
class Cancelled(Event):
    """A run was cancelled after `index` of at most `total` steps (0 if it had not begun)."""

    index: int
    total: int
    explains: bool
