"""What is to be measured: the whole job, and the remaining task of each batch."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from ..datasets import Dataset
from ..network import Classifier


@dataclass(frozen=True)
class Job:
    """One call of `evaluate`, checked.

    Attributes:
        classifier: The network, cut at the layer to explain.
        dataset: Where the images come from.
        chosen: Their indices, in ascending order. A *position* is an index into this list.
        methods: Name → options.
        metrics: Names.
        batch_size: Images at a time; batch b has the positions from b · batch_size on.
        seed: Of metrics that use random numbers.
        workers: Threads that decode images; 0 decodes them between the batches.
    """

    classifier: Classifier
    dataset: Dataset
    chosen: list[int]
    methods: dict[str, dict[str, Any]]
    metrics: list[str]
    batch_size: int
    seed: int
    workers: int

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
        wanted: Method → metrics.
        failed: Method → positions at which it is known to fail; None → those of broken images.
    """

    batch: int
    wanted: dict[str, list[str]]
    failed: dict[str | None, set[int]] = field(default_factory=lambda: defaultdict(set))


@dataclass(frozen=True)
class Measured:
    """All rows of one batch and method.

    Attributes:
        method: Its name; None for the rows of broken images.
        images: How many images the batch has, broken ones included.
        seconds: Time that the method took.
        rows: As `store.SCHEMA` names them.
    """

    method: str | None
    images: int
    seconds: float
    rows: list[dict[str, Any]]
