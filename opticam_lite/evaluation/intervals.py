"""How sure an average over images is: 95 % intervals that hold for few images, too.

The bootstrap asks how the average would vary with other images, by weighting those at hand at
random. Of eight images that all have AD 0 it makes "0 to 0", which is not what eight images can
show. Where the values have limits, as percentages have, the weighted images are therefore joined by
one at the limit: `Gaffke's bound (2005; Learned-Miller and Thomas 2020)
<https://arxiv.org/abs/1905.06208>`_. For shares, such as AI, it is the interval of Clopper and
Pearson; for all zeros of n images it ends at 1 − 0.025^(1/n), 37 % for eight.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from scipy import stats
from torch import Tensor

DRAWS = 2000
FEWEST = 6
"""Images on which two methods must differ to be told apart: if both are equally good, all of five
favour the same one in 2 · 2⁻⁵ = 6 % of the cases."""
ENDS = (0.025, 0.975)


Average = Callable[[Tensor, Tensor], float]


def interval(values: Tensor, limits: tuple[float, float] | None = None) -> tuple[float, float]:
    """Return the 95 % interval of the mean of values.

    Args:
        values: `(N,)`; NaN where an image has none.
        limits: The least and the largest value that an image can have. Without limits: the
            bootstrap with Bayesian weights (Rubin 1981), its quantiles widened for few images as
            Student's t is (Hesterberg 2015, section 4.5); NaN for fewer than two images.

    Returns:
        Lower and upper end; NaN for no images.
    """
    values = values[~values.isnan()].double()
    n = len(values)
    if n < 1 + (limits is None):
        return math.nan, math.nan
    if limits is None:
        tail = float(stats.norm.cdf(math.sqrt(n / (n - 1)) * stats.t.ppf(ENDS[0], n - 1)))
        averages = _weights(n) @ values
        return averages.quantile(tail).item(), averages.quantile(1 - tail).item()
    ends = []
    for limit, end in zip(limits, ENDS, strict=True):
        joined = torch.cat([values, values.new_tensor([limit])])
        # Rounding leads beyond the limits.
        ends.append((_weights(n + 1) @ joined).quantile(end).clamp(*limits).item())
    return ends[0], ends[1]


def interval_of_average(values: Tensor, details: Tensor, average: Average) -> tuple[float, float]:
    """Return the 95 % interval of an average that is no mean of values, such as box accuracy.

    Args:
        values, details, average: As of `redrawn`. Details are fractions of which larger ones are
            better: an image of zeros is at the lower limit, one of ones at the upper.
    """
    ends = []
    for limit, end in zip((0.0, 1.0), ENDS, strict=True):
        at_limit = details.new_full((1, details.shape[1]), limit)
        joined = torch.cat([values, values.new_zeros(1)]), torch.cat([details, at_limit])
        ends.append(redrawn(*joined, average, size=len(values)).nanquantile(end).item())
    return ends[0], ends[1]


def redrawn(values: Tensor, details: Tensor, average: Average, size: int | None = None) -> Tensor:
    """Return an average of random samples of the images, `(draws,)`, float64.

    Args:
        values: `(N,)`.
        details: `(N, T)`.
        average: (values, details) → that average.
        size: Images in a sample, drawn with replacement. Default: N.
    """
    n = len(values)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(n, (DRAWS // 10, size or n), generator=generator)
    return torch.tensor([average(values[i], details[i]) for i in drawn], dtype=torch.float64)


def surely_better(better: Tensor, other: Tensor) -> bool:
    """Return whether the 95 % interval of the mean difference of two methods is above 0.

    Args:
        better, other: `(N,)`, the values of both on the same images, larger ones being better.
            Images of which one is NaN are left out.
    """
    difference = better - other
    if int((difference.nan_to_num() != 0).sum()) < FEWEST:  # ties favour neither
        return False
    return interval(difference)[0] > 0


def _weights(n: int) -> Tensor:
    """Return random weights of n images, `(DRAWS, n)`, uniform among those that sum to 1."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.empty(DRAWS, n, dtype=torch.float64).exponential_(generator=generator)
    return draws / draws.sum(1, keepdim=True)
