"""Variants: a label → a method with its options, and how its maps are made and measured.

A method by its name is the simplest variant. A study, such as the paper's Table 6, is a mapping
from labels to variants.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..methods import METHODS
from ..registry import check_name
from .digests import plain

RANKS = {"first": 0, "second": 1, "last": -1}
"""Classes in the order of the network's logits."""
CLASSES = ("true", *RANKS)
# Beside these a variant has options of its method.
KEYS = ("method", "layer", "normalize", "exponent", "class")


@dataclass(frozen=True)
class Variant:
    """One entry of what is measured, checked.

    Attributes:
        label: Its name in rows and tables.
        method: Of `list_methods()`.
        options: Of the method.
        layer: Where the network is cut. Default: where the classifier is.
        normalize: Whether the network normalises its input. Default: as the classifier does.
        exponent: The mask is raised to it before it is measured (paper, Fig. A4).
        explains: The class whose map is made, one of `CLASSES` (Table A9); it is measured for the
            true class, whatever it explains.
    """

    label: str
    method: str
    options: dict[str, Any]
    layer: str | None = None
    normalize: bool | None = None
    exponent: float = 1.0
    explains: str = "true"

    @classmethod
    def of(cls, label: str, spec: Mapping[str, Any]) -> Variant:
        """Check a variant as users write it: `KEYS`, the method's options, and their values.

        Raises:
            TypeError, ValueError: For the first that is wrong.
        """
        if not isinstance(label, str) or not isinstance(spec, Mapping):
            raise TypeError(
                f"{label!r}: {spec!r} is no variant; a name and a mapping are needed, such as "
                "'early': {'method': 'opti-cam', 'layer': 'layer3'}"
            )
        given = {"method": label, "exponent": 1.0, "class": "true", **spec}
        method, exponent, explains = (given[key] for key in ("method", "exponent", "class"))
        options = {key: value for key, value in spec.items() if key not in KEYS}
        if "method" not in spec and spec and label not in METHODS:
            raise ValueError(
                f"the variant {label!r} names no method; add one, such as 'method': 'opti-cam'"
            )
        METHODS[method].check_options(options, KEYS)
        number = isinstance(exponent, int | float) and not isinstance(exponent, bool)
        if not number or not 0 < exponent < math.inf:
            raise ValueError(f"exponent of {label} is {exponent!r}; a positive number is needed")
        check_name("class", explains, CLASSES)
        normalize = spec.get("normalize")
        if not isinstance(normalize, bool | None):
            raise TypeError(f"normalize of {label} is {normalize!r}; True or False is needed")
        return cls(label, method, options, spec.get("layer"), normalize, float(exponent), explains)

    @property
    def settings(self) -> dict[str, Any]:
        """What makes it another than the method of its label with its defaults, as JSON values."""
        own = {
            "method": self.method if self.method != self.label else None,
            "layer": self.layer,
            "normalize": self.normalize,
            "exponent": self.exponent if self.exponent != 1 else None,
            "class": self.explains if self.explains != "true" else None,
        }
        return {key: value for key, value in own.items() if value is not None} | plain(self.options)

    @property
    def iterations(self) -> int | None:
        """Steps of a method of which a run holds all shorter runs; None for other methods."""
        name = METHODS[self.method].anytime
        if name is None or any(map(callable, self.options.values())):
            return None
        return self.options.get(name, METHODS[self.method].defaults[name])

    @cached_property
    def run(self) -> str:
        """Names the run that makes the map; the same for variants that take theirs from one run."""
        steps = METHODS[self.method].anytime if self.iterations else None
        options = {name: value for name, value in self.options.items() if name != steps}
        own = self.label if any(map(callable, options.values())) else None  # each has its callback
        parts = [self.method, self.layer, self.normalize, self.explains, plain(options), own]
        return json.dumps(parts)


def variants(
    methods: Sequence[str] | Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Variant]:
    """Return label → variant.

    Args:
        methods: Names of methods, or label → variant.
        options: Of methods that are given by their names.

    Raises:
        TypeError, ValueError: For the first that is wrong.
    """
    if isinstance(methods, Mapping):
        if options:
            raise ValueError("options are given twice: with the methods, and as options")
        options = methods
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise TypeError(f"options is {options!r}; a mapping, method → its options, is needed")
    labels = names("methods", methods)
    found = {label: Variant.of(label, options.get(label, {})) for label in labels}
    for label in options:
        if label not in found:
            METHODS[label]  # an unknown name raises the error that lists the close ones
            raise ValueError(
                f"options are given for {label}, which is not among the methods: "
                f"{', '.join(labels)}"
            )
    return found


def names(what: str, values: Iterable[str]) -> list[str]:
    """Return names once each, in their order; a single one may be given as a string."""
    found = list(dict.fromkeys([values] if isinstance(values, str) else values))
    if not found:
        raise ValueError(f"{what} names none; choose at least one")
    return found
