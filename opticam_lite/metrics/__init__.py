"""Metrics of explanations: functions on probabilities, masks and boxes.

| name | what it measures | better |
|---|---|---|
| AD | average drop: probability lost by masking, relative to p (eq. 13) | ↓ |
| AG | average gain: probability gained, relative to 1 − p (eq. 15) | ↑ |
| AI | average increase: share of images whose probability rises (eq. 14) | ↑ |
| I | insertion: area under the probability while pixels are put back (5.3.2) | ↑ |
| D | deletion: area under the probability while pixels are blackened (5.3.2) | ↓ |
| AOPC | mean fall of the probability while ten patches are blackened (5.3.3) | ↑ |
| MS | max-sensitivity: relative change of the map under small noise; a ratio (5.3.3) | ↓ |
| ADCC | harmonic mean of coherency, 1 − complexity and 1 − drop, predicted class (5.3.3) | ↑ |
| ADCC-target | the same of the class explained | ↑ |
| OM | official metric: localisation error where the class is right, else 1 (eq. A1) | ↓ |
| LE | localisation error: what the predicted box lacks of the true one (eq. A2) | ↓ |
| F1 | harmonic mean of precision and recall of pixels (eqs. A3, A4) | ↑ |
| BA | box accuracy: share of objects found at the best threshold (eq. A5) | ↑ |
| SP | standard pointing game: whether the peak hits the object (eq. A6) | ↑ |
| EP | energy pointing game: share of the mass on the object (eq. A3) | ↑ |
| SM | saliency metric: log of the predicted box's area and of p; unbounded (eq. A7) | ↓ |

AD, AG, AI, I and D measure faithfulness to the network; OM to EP need boxes and measure
localisation of the object; OM also needs the true class. Functions return a fraction for each
image, `average_…` percent. `METRICS[name]` is what `ol.evaluate` uses: values as tables print them,
in percent except for MS and SM.
"""

# The order of these is that of METRICS and of tables.
# isort: off
from .registry import METRICS, Case, Metric
from .faithfulness import (
    average_drop,
    average_gain,
    average_increase,
    drop,
    gain,
    increase,
)
from .curves import Curves, aopc, deletion, insertion, replacement
from .robustness import max_sensitivity
from .coherence import adcc, coherency, complexity
from .localization import (
    average_box_accuracy,
    box_accuracy,
    box_overlaps,
    energy_pointing_game,
    f1_score,
    localization_error,
    official_metric,
    pointing_game,
    predicted_boxes,
    saliency_metric,
)
# isort: on

__all__ = [
    "METRICS",
    "Case",
    "Curves",
    "Metric",
    "adcc",
    "aopc",
    "average_box_accuracy",
    "average_drop",
    "average_gain",
    "average_increase",
    "box_accuracy",
    "box_overlaps",
    "coherency",
    "complexity",
    "deletion",
    "drop",
    "energy_pointing_game",
    "f1_score",
    "gain",
    "increase",
    "insertion",
    "list_metrics",
    "localization_error",
    "max_sensitivity",
    "official_metric",
    "pointing_game",
    "predicted_boxes",
    "replacement",
    "saliency_metric",
]


def list_metrics() -> list[str]:
    """Return the names of all metrics; `METRICS[name]` has a metric's title and source."""
    return list(METRICS)
