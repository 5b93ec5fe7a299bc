"""Average drop, average increase and average gain (paper, section 4, eqs. 13-15).

All three take the probability `p` of the target class for each image and `o` for the same image
multiplied by its mask, both `(N,)` in [0, 1]. Averages are in percent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..network import usual
from ..registry import some_of
from .registry import METRICS

Probabilities = Tensor | Sequence[float]


def drop(p: Probabilities, o: Probabilities) -> Tensor:
    """Return the relative drop of each image, [p − o]₊ / p, in [0, 1] (inside eq. 13).

    For p = 0 the drop is defined as 0.

    Raises:
        ValueError: If p and o are not vectors of the same length, of values in [0, 1].
    """
    p, o = _check(p, o)
    return (p - o).clamp(min=0) / p.where(p > 0, torch.ones_like(p))


def gain(p: Probabilities, o: Probabilities) -> Tensor:
    """Return the relative gain of each image, [o − p]₊ / (1 − p), in [0, 1] (inside eq. 15).

    For p = 1, which softmax in float32 does reach, the gain is defined as 0.

    Raises:
        ValueError: If p and o are not vectors of the same length, of values in [0, 1].
    """
    p, o = _check(p, o)
    room = 1 - p
    return (o - p).clamp(min=0) / room.where(room > 0, torch.ones_like(room))


def increase(p: Probabilities, o: Probabilities) -> Tensor:
    """Return 1 for each image with p < o, else 0 (inside eq. 14).

    Raises:
        ValueError: If p and o are not vectors of the same length, of values in [0, 1].
    """
    p, o = _check(p, o)
    return (p < o).to(p.dtype)


@METRICS.register(
    "AD",
    title="Average drop",
    source="Zhang et al. 2024, eq. 13",
    better="lower",
    of_case=lambda _, case: 100 * drop(case.p, case.o),
)
def average_drop(p: Probabilities, o: Probabilities) -> float:
    """Return AD in percent: how much of the probability masking loses; lower is better (eq. 13).

    >>> average_drop([0.5, 0.8], [0.25, 0.9])  # half is lost, nothing is lost
    25.0
    """
    return _percent(drop(p, o))


@METRICS.register(
    "AG",
    title="Average gain",
    source="Zhang et al. 2024, eq. 15",
    better="higher",
    of_case=lambda _, case: 100 * gain(case.p, case.o),
)
def average_gain(p: Probabilities, o: Probabilities) -> float:
    """Return AG in percent: the share of 1 − p that masking gains; higher is better (eq. 15).

    >>> average_gain([0.5, 0.75], [0.25, 1.0])  # nothing is gained, all is gained
    50.0
    """
    return _percent(gain(p, o))


@METRICS.register(
    "AI",
    title="Average increase",
    source="Zhang et al. 2024, eq. 14",
    better="higher",
    of_case=lambda _, case: 100 * increase(case.p, case.o),
)
def average_increase(p: Probabilities, o: Probabilities) -> float:
    """Return AI in percent: the share of images whose probability rises; higher is better (eq. 14).

    >>> average_increase([0.5, 0.75], [0.25, 1.0])
    50.0
    """
    return _percent(increase(p, o))


def _percent(values: Tensor) -> float:
    if not len(values):
        raise ValueError("an average over no images is not defined; pass at least one p and o")
    return 100 * float(values.mean())


def _check(p: Any, o: Any) -> tuple[Tensor, Tensor]:
    p = check_probabilities("p", p)
    return p, check_probabilities("o", o, len(p)).to(p.device)


@usual()
def check_probabilities(name: str, values: Any, n: int | None = None) -> Tensor:
    """Return probabilities as float64 `(N,)`, so that 1 − p is accurate for p near 1.

    Raises:
        ValueError: Unless they are a vector of fractions in [0, 1], of length `n` if given.
    """
    values = torch.as_tensor(values, dtype=torch.float64).detach()
    if values.ndim != 1 or n not in (None, len(values)):
        length = "" if n is None else f" of {n} values"
        raise ValueError(
            f"{name} must be a vector{length}, one an image; it has shape {tuple(values.shape)}"
        )
    inside = (values >= 0) & (values <= 1)  # False for NaN
    if bad := (~inside).nonzero()[:, 0].tolist():
        unfit = "not percent" if values[bad[0]].isfinite() else "and this output is not finite"
        raise ValueError(
            f"{name} holds {float(values[bad[0]]):.4g} (image {some_of(bad)}); probabilities are "
            f"fractions in [0, 1], {unfit}"
        )
    return values
