"""Metrics of explanations: functions on probabilities, masks and boxes.

| name | what it measures | better |
|---|---|---|
| AD | average drop: probability lost by masking, relative to p (eq. 13) | lower |
| AI | average increase: share of images whose probability rises (eq. 14) | higher |
| AG | average gain: probability gained, relative to 1 − p (eq. 15) | higher |
"""

from .faithfulness import (
    average_drop,
    average_gain,
    average_increase,
    drop,
    gain,
    increase,
)
from .registry import METRICS, Case, Metric

__all__ = [
    "METRICS",
    "Case",
    "Metric",
    "average_drop",
    "average_gain",
    "average_increase",
    "drop",
    "gain",
    "increase",
    "list_metrics",
]


def list_metrics() -> list[str]:
    """Return the names of all metrics."""
    return list(METRICS)
