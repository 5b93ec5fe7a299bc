"""The registry of saliency methods, and the `Step` that slow methods pass to their callback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..network import Classifier
from ..registry import Entry, Registry


@dataclass(frozen=True)
class Method(Entry):
    """A registered saliency method."""

    unfit: Callable[[Classifier], str | None] = lambda classifier: None
    """Returns why the method can't explain a classifier, or None if it can."""

    uses_layer: bool = True
    """Whether the map depends on the layer at which the classifier is cut."""

    anytime: str | None = None
    """The option that is the number of steps, if a run holds the maps of all shorter runs: the best
    seen after so many steps."""


METHODS = Registry("method", Method)


@dataclass(frozen=True)
class Step:
    """One step of a slow method, given to its `callback`.

    Attributes:
        index: 1 for the first step.
        total: The number of steps at most; a run whose images all stop early has fewer.
        objective: The objective of each image `(N,)`, or None if the method optimises nothing.
        saliency: The current saliency maps `(N, 1, h, w)`, or None.
        to_masks: Turns `saliency` into masks.
    """

    index: int
    total: int
    objective: Tensor | None = None
    saliency: Tensor | None = None
    to_masks: Callable[[Tensor], Tensor] | None = None

    def masks(self) -> Tensor | None:
        """Return the current masks `(N, 1, H, W)`, or None if there are none yet."""
        if self.saliency is None or self.to_masks is None:
            return None
        return self.to_masks(self.saliency)


Callback = Callable[[Step], object]
