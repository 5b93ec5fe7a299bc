"""What can be chosen for a network: its layers, the applicable methods, and their options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import log10

from torch import nn

from ..methods import METHODS, applicable
from ..network import Classifier

MAX_LAYERS = 24
"""Largest number of layers of the slider, so that it can be set with a mouse."""
RANGES: dict[str, tuple[float, float]] = {
    "learning_rate": (0.01, 1.0),
    "iterations": (1, 300),
    "passes": (2, 100),
    "samples": (10, 1000),
}
"""The options of methods that have a slider, and its range; wider where a default lies outside.
An option added here has a slider for every method that takes it: linear for whole numbers,
logarithmic for others."""


@dataclass(frozen=True)
class Choices:
    """What can be chosen for a network that is cut at a layer.

    Attributes:
        labels: Names of the classes.
        methods: The methods that can explain it.
        refused: Why the other methods can't.
        layers: The layers of the slider; none while the network isn't loaded.
        shape: (K, h, w) of the layer's feature maps; None while the network isn't loaded.
    """

    labels: tuple[str, ...]
    methods: tuple[str, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    shape: tuple[int, int, int] | None = None


def choices_of(classifier: Classifier) -> Choices:
    """Return what can be chosen for a classifier; needs a pass of the network."""
    reasons = applicable(classifier)
    return Choices(
        labels=tuple(classifier.labels),
        methods=tuple(method for method, reason in reasons.items() if reason is None),
        refused={method: reason for method, reason in reasons.items() if reason is not None},
        layers=tuple(block_layers(classifier)),
        shape=classifier.layer_shape(),
    )


def tunable(method: str) -> dict[str, float]:
    """Return the options of a method that have a slider, with their default values."""
    defaults = METHODS[method].defaults
    return {o: defaults[o] for o in RANGES if isinstance(defaults.get(o), int | float)}


def is_whole(option: str) -> bool:
    """Return whether an option is a whole number."""
    return isinstance(RANGES[option][0], int)


def slider_range(method: str, option: str) -> tuple[float, float]:
    """Return the limits of an option's slider; for a logarithmic one their exponents of ten."""
    (low, high), default = RANGES[option], tunable(method)[option]
    low, high = min(low, default), max(high, default)
    return (low, high) if is_whole(option) else (log10(low), log10(high))


def block_layers(classifier: Classifier) -> list[str]:
    """Return the layers of the slider, in forward order: outputs of blocks.

    These are numbered modules that contain others (`layer4.1`, `blocks.11`), the activations of a
    plain sequence such as VGG's, and always the classifier's current layer. A stage with the same
    output as its last block is left out. At most `MAX_LAYERS` evenly spaced ones are kept (and the
    current one).
    """
    modules = dict(classifier.network.named_modules())

    def is_block(name: str) -> bool:
        module = modules[name]
        children = list(module.named_children())
        if not children:
            in_sequence = name.rpartition(".")[2].isdigit()
            return in_sequence and type(module).__module__.endswith(".activation")
        if isinstance(module, nn.Sequential) and f"{name}.{children[-1][0]}" in blocks:
            return False
        return name[-1].isdigit()

    blocks: set[str] = set()
    for name in sorted(classifier.layers, key=lambda n: -n.count(".")):  # the innermost first
        if is_block(name):
            blocks.add(name)
    # Blocks inside blocks (the branches of a residual unit) are left out.
    outer = {b for b in blocks if not any(b.startswith(f"{a}.") for a in blocks)}
    kept = [name for name in classifier.layers if name in outer]
    if len(kept) < 3:  # a network without such blocks: its top-level modules
        kept = [name for name in classifier.layers if "." not in name] or classifier.layers
    if len(kept) > MAX_LAYERS:
        last = len(kept) - 1
        kept = [kept[round(i * last / (MAX_LAYERS - 1))] for i in range(MAX_LAYERS)]
    return [name for name in classifier.layers if name in kept or name == classifier.layer]
