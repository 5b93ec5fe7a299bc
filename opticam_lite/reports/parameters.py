"""The parameters of reports: a frozen dataclass for each, and how it is read from text.

    Parameters ──▶ OneNetwork ──▶ Saliency, Benchmark
               └─▶ Boxes

Each parameter is stated once, in its dataclass: name, type (that of its default), default,
explanation and lower bound. The command line and its help are made from these, and the parameters
cell of the report's notebook is tested against them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, Self

from ..registry import LARGEST_SEED

NAMES = "separated by commas, or all"
_TYPES = {str: "a text", int: "a whole number", float: "a number", bool: "yes or no"}
_TRUTH = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


class ReportError(ValueError):
    """A report that can't be made as asked for; the message says why in one sentence."""


def parameter(
    default: Any, explanation: str, least: float = -math.inf, most: float = math.inf
) -> Any:
    """Return a field of a report's dataclass.

    Args:
        default: Its type is the parameter's: str, int, float or bool.
        explanation: Shown by `make help`, and a comment in the notebook.
        least, most: The smallest and the largest number that are allowed.
    """
    return field(default=default, metadata={"explanation": explanation, "limits": (least, most)})


@dataclass(frozen=True, kw_only=True)
class Parameters(ABC):
    """The parameters of every report; a report adds its own and `prepare`."""

    methods: str = parameter("", NAMES)
    iterations: int = parameter(100, "of Opti-CAM; the paper has 100", least=1)
    limit: int = parameter(8, "measure at most this many images, drawn at random", least=1)
    seed: int = parameter(0, "of the draw", least=0, most=LARGEST_SEED)
    device: str = parameter("auto", "auto, cpu or cuda")

    def __post_init__(self) -> None:
        for known in fields(self):
            value, (least, most) = getattr(self, known.name), known.metadata["limits"]
            if isinstance(value, int | float) and not least <= value <= most:
                upper = "" if math.isinf(most) else f" and at most {most}"
                raise ReportError(
                    f"{known.name.upper()} is {value}; it must be at least {least}{upper}"
                )

    @classmethod
    def known(cls) -> list[Field[Any]]:
        """Return the report's parameters, its own before those that every report takes."""
        shared = {known.name for known in fields(Parameters)}
        return sorted(fields(cls), key=lambda known: known.name in shared)

    @classmethod
    def of(cls, variables: Mapping[str, Any]) -> Self:
        """Take the parameters from variables, such as a notebook's `globals()`."""
        return cls(**{known.name: variables[known.name] for known in fields(cls)})

    def settings(self) -> dict[str, Any]:
        """Return name → value, in the order of `known`."""
        return {known.name: getattr(self, known.name) for known in self.known()}

    @abstractmethod
    def prepare(self) -> Any:
        """Check the values and load what they name, before anything is computed.

        Raises:
            ReportError, ValueError, FileNotFoundError, ConnectionError: For the first wrong value.
        """


@dataclass(frozen=True, kw_only=True)
class OneNetwork(Parameters):
    """The parameters of reports on one network; see `load_model`, where an empty text is None."""

    model: str = parameter("scenes_resnet", "an embedded, torchvision or timm network")
    checkpoint: str = parameter(
        "", "file of its weights (.safetensors, state dict); empty: its own"
    )
    weights: str = parameter("hub", "without a checkpoint: hub or random")
    layer: str = parameter("", "layer whose maps are combined; empty: the network's default")
    normalize: bool = parameter(True, "no: without input normalisation (paper, Appendix H)")
    activation: str = parameter("softmax", "sigmoid for a network with several labels an image")


def convert(name: str, text: str, kind: type) -> Any:
    """Return the value that a text stands for.

    Raises:
        ReportError: If it is not of this type.
    """
    try:
        return _TRUTH[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError) as error:
        raise ReportError(f"{name.upper()} is {text!r}; it must be {_TYPES[kind]}") from error
