"""Findings: sentences of the paper that can be true or false of what was measured.

A finding *holds* if the measured images show it, *does not hold* if they show the opposite, and
otherwise they are *too few to say*. What images show is decided by 95 % intervals of averages, and
of differences of two variants on the same images (`evaluation/intervals.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from ..evaluation.intervals import FEWEST, interval, surely_better
from ..metrics import METRICS

LIMITS = (0.0, 100.0)  # of AD, AG and AI, percent
Verdict = bool | None
VERDICTS: dict[Verdict, str] = {
    True: "holds",
    False: "does not hold",
    None: "too few images to say",
}


@dataclass(frozen=True)
class Finding:
    """A sentence, its verdict, and the figures that decide it."""

    claim: str
    verdict: Verdict
    figures: str


def all_hold(verdicts: Iterable[Verdict]) -> Verdict:
    """Return whether all of some statements hold: False if one surely doesn't."""
    found = list(verdicts)
    return False if False in found else None if None in found else True


class Values:
    """The values of variants on the images that all of them have.

    Args:
        rows: What `evaluate` returned.

    Attributes:
        labels: Of the variants, in their order.
    """

    def __init__(self, rows: pd.DataFrame) -> None:
        rows = rows[rows["error"].isna()]
        self.labels = list(rows["method"].unique())
        table = rows.pivot(index="image", columns=["metric", "method"], values="value")
        self._table = table.dropna()

    def __contains__(self, label: str) -> bool:
        return label in self.labels

    def of(self, metric: str, label: str) -> Tensor:
        """Return the values of a variant, `(N,)`, in percent."""
        return torch.tensor(self._table[metric, label].to_numpy(float))

    def mean(self, metric: str, label: str) -> float:
        """Return the average of a variant."""
        return float(self.of(metric, label).mean())

    def show(self, metric: str, *labels: str) -> str:
        """Return averages as text, such as `AG: mask 66.3; diff 18.5`."""
        told = (f"{label} {self.mean(metric, label):.1f}" for label in labels)
        return f"{metric}: {'; '.join(told)}"

    def better(self, metric: str, label: str, other: str) -> Verdict:
        """Return whether a variant is better than another, by the sign of the metric."""
        sign = 1 if METRICS[metric].better == "higher" else -1
        return above(sign * self.of(metric, label), sign * self.of(metric, other))

    def within(self, metric: str, label: str, low: float, high: float) -> Verdict:
        """Return whether the average of a variant lies between two limits."""
        return _inside(interval(self.of(metric, label), LIMITS), low, high)

    def close(self, metric: str, label: str, other: str, by: float) -> Verdict:
        """Return whether the averages of two variants differ by at most `by`."""
        return between(self.of(metric, label) - self.of(metric, other), -by, by)


def above(values: Tensor, others: Tensor) -> Verdict:
    """Return whether values `(N,)` are larger on average than others of the same images."""
    if surely_better(values, others):
        return True
    return False if surely_better(others, values) else None


def between(differences: Tensor, low: float, high: float) -> Verdict:
    """Return whether the mean of differences `(N,)` lies between two limits."""
    if len(differences) < FEWEST:  # of two or three images an interval says little
        return None
    if not differences.any():  # equal on every image
        return low <= 0 <= high
    return _inside(interval(differences), low, high)


def _inside(ends: tuple[float, float], low: float, high: float) -> Verdict:
    if low <= ends[0] and ends[1] <= high:
        return True
    return False if ends[1] < low or high < ends[0] else None
