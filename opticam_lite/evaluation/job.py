"""What is to be measured: the whole job, and the remaining task of each batch."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..datasets import Dataset
from ..network import Classifier
from .variants import Variant


@dataclass(frozen=True)
class Job:
    """One call of `evaluate`, checked.

    Attributes:
        classifier: The network, cut at the layer to explain.
        dataset: Where the images come from.
        chosen: Their indices, in ascending order. A *position* is an index into this list.
        variants: Label → what is measured.
        metrics: Names.
        batch_size: Images at a time; batch b has the positions from b · batch_size on.
        seed: Of metrics that use random numbers.
        workers: Threads that decode images; 0 decodes them between the batches.
    """

    classifier: Classifier
    dataset: Dataset
    chosen: list[int]
    variants: dict[str, Variant]
    metrics: list[str]
    batch_size: int
    seed: int
    workers: int

    def network(self, variant: Variant) -> Classifier:
        """Return the network that a variant explains, cut where it says."""
        key = variant.layer, variant.normalize
        if key not in self._networks:
            found = self.classifier
            found = found if variant.normalize is None else found.normalizing(variant.normalize)
            self._networks[key] = found if variant.layer is None else found.at(variant.layer)
        return self._networks[key]

    @cached_property
    def _networks(self) -> dict[tuple[str | None, bool | None], Classifier]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        # Each cut would be sent to a worker with all weights.
        return {name: value for name, value in vars(self).items() if name != "_networks"}

    def positions(self, batch: int) -> range:
        """Return the positions of a batch."""
        start = batch * self.batch_size
        return range(start, min(start + self.batch_size, len(self.chosen)))

    @property
    def batches(self) -> range:
        """The numbers of all batches."""
        return range(-(-len(self.chosen) // self.batch_size))


@dataclass(frozen=True)
class Task:
    """What is left to measure in one batch.

    Attributes:
        batch: Its number.
        wanted: Label of a variant → metrics.
        failed: Label → positions at which it is known to fail; None → those of broken images.
    """

    batch: int
    wanted: dict[str, list[str]]
    failed: dict[str | None, set[int]] = field(default_factory=lambda: defaultdict(set))


@dataclass(frozen=True)
class Measured:
    """All rows of one batch and variant.

    Attributes:
        method: The variant's label; None for the rows of broken images.
        images: How many images the batch has, broken ones included.
        seconds: Time that it took.
        rows: As `store.SCHEMA` names them.
    """

    method: str | None
    images: int
    seconds: float
    rows: list[dict[str, Any]]
