"""Exercises of lesson 05, Metrics."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .exercise import Exercise, Inputs, Outputs, Wrong
from .inputs import generator

P, Q = torch.tensor([0.6, 0.9, 0.5, 0.2]), torch.tensor([0.8, 0.45, 0.5, 0.0])  # of exercise 1


def _drops(p: Tensor, o: Tensor) -> Tensor:
    return (p - o).clamp(min=0)


def _three(AD: Tensor, AI: Tensor, AG: Tensor, factor: float = 100) -> dict[str, float]:
    return {"AD": factor * float(AD), "AG": factor * float(AG), "AI": factor * float(AI)}


_AD, _AI = (_drops(P, Q) / P).mean(), (P < Q).float().mean()
_AG = (_drops(Q, P) / (1 - P)).mean()


def _probabilities(seed: int) -> Inputs:
    p = 0.05 + 0.9 * torch.rand(15, generator=generator(seed))
    return p, torch.rand(15, generator=generator(20 + seed))


def _gains(seed: int) -> Inputs:
    """Gains of two methods on 40 images: what is hard for one is hard for the other."""
    images = 60 * torch.rand(40, generator=generator(seed))
    noise = 8 * torch.randn(2, 40, generator=generator(40 + seed))
    return images + 5 + noise[0], images + noise[1]


def _middle(means: Tensor, share: float = 0.95) -> tuple[Tensor, Tensor]:
    low, high = means.quantile(torch.tensor([(1 - share) / 2, (1 + share) / 2], dtype=means.dtype))
    return low, high


def _drawn(values: Tensor, seed: int = 1, draws: int = 4000) -> Tensor:
    """Means of samples that are drawn from values, with replacement."""
    places = torch.randint(len(values), (draws, len(values)), generator=generator(seed))
    return values[places].mean(dim=1)


def _same_intervals(given: list[Outputs], expected: list[Outputs]) -> bool:
    """Whether both ends lie where they should, up to chance, on average over all inputs."""
    if any(len(some) != 1 or some[0].shape != (2,) for some in given + expected):
        return False
    a, b = (torch.stack([some[0] for some in every]).double() for every in (given, expected))
    width = (b[:, 1:] - b[:, :1]).clamp(min=1e-9) / 2
    return bool((((a - b) / width).mean(dim=0).abs() < 0.08).all())


Means = Callable[[Tensor, Tensor], Tensor]


def _interval(means: Means, share: float = 0.95) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda first, second: _middle(means(first, second), share)


EXERCISES = {
    "05.1": Exercise(
        asks='a dictionary of three numbers, in percent: {"AD": …, "AI": …, "AG": …}',
        reference=_three(_AD, _AI, _AG),
        inputs=None,
        wrong=(
            Wrong(
                "these are fractions",
                "A metric is given in percent.",
                _three(_AD, _AI, _AG, 1),
            ),
            Wrong(
                "the shares are added up, but not averaged",
                "N images, and 1/N in front of the sum.",
                _three(_AD, _AI, _AG, 400),
            ),
            Wrong(
                "the drop is not divided by p",
                "What share of *its* probability does an image lose?",
                _three(_drops(P, Q).mean(), _AI, _AG),
            ),
            Wrong(
                "the gain is divided by p",
                "What could be won at most?",
                _three(_AD, _AI, (_drops(Q, P) / P).mean()),
            ),
            Wrong(
                "an image that stays the same counts as an increase",
                "`<` or `≤` in equation 14?",
                _three(_AD, (P <= Q).float().mean(), _AG),
            ),
            Wrong(
                "AD and AG are exchanged",
                "Which of the two is about what is lost?",
                _three(_AG, _AI, _AD),
            ),
            Wrong(
                "losses and gains cancel in AD: the relu is missing",
                "$[a]_+$ is 0 where a is negative.",
                _three(((P - Q) / P).mean(), _AI, _AG),
            ),
            Wrong(
                "only the images that change are averaged over",
                "N is the number of all images.",
                {"AD": 75.0, "AG": 50.0, "AI": 100 / 3},
            ),
        ),
        hint="One column for each metric, one row for each image, as in the table *By hand*.",
        more="For each image: is it a drop or a gain, and how much was there to lose or to win?",
    ),
    "05.2": Exercise(
        asks="a function (p, o) that returns the total drop in percent, a number",
        reference=lambda p, o: 100 * _drops(p, o).sum() / p.sum(),
        inputs=_probabilities,
        wrong=(
            Wrong(
                "this is AD, the mean of shares",
                "Sum first, then divide.",
                lambda p, o: 100 * (_drops(p, o) / p).mean(),
            ),
            Wrong(
                "gains cancel losses",
                "$[a]_+$ is 0 where a is negative.",
                lambda p, o: 100 * (p - o).sum() / p.sum(),
            ),
            Wrong(
                "this is a fraction",
                "In percent.",
                lambda p, o: _drops(p, o).sum() / p.sum(),
            ),
            Wrong(
                "the sum of the losses is divided by the number of images",
                "By what do you divide to get a share of what was there?",
                lambda p, o: 100 * _drops(p, o).mean(),
            ),
            Wrong(
                "gains count as losses",
                "`abs` or `clamp(min=0)`?",
                lambda p, o: 100 * (p - o).abs().sum() / p.sum(),
            ),
            Wrong(
                "only the images that lose are in the divisor",
                "The sum of p runs over all images.",
                lambda p, o: 100 * _drops(p, o).sum() / p[p > o].sum(),
            ),
            Wrong(
                "the losses are compared with what is left",
                "p is what was there before.",
                lambda p, o: 100 * _drops(p, o).sum() / o.sum(),
            ),
            Wrong(
                "p and o are exchanged",
                "Which comes first?",
                lambda p, o: 100 * _drops(o, p).sum() / o.sum(),
            ),
        ),
        hint="Two sums and one division, in the order of the formula.",
        more="`(p - o).clamp(min=0)` holds what each image loses.",
    ),
    "05.3": Exercise(
        asks="a function (first, second) that returns the two ends (low, high) of the range",
        reference=_interval(lambda first, second: _drawn(first - second)),
        inputs=_gains,
        fresh=16,
        random=True,
        same=_same_intervals,
        wrong=(
            Wrong(
                "images are drawn for each method by itself",
                "Both methods saw the same images: draw once, or draw from the differences.",
                _interval(lambda first, second: _drawn(first, 1) - _drawn(second, 2)),
            ),
            Wrong(
                "this is the range of the differences, not that of their average",
                "How far apart are the averages of drawn samples?",
                _interval(lambda first, second: first - second),
            ),
            Wrong(
                "the range holds the middle 90 %, not 95 %",
                "How much is cut off at each end?",
                _interval(lambda first, second: _drawn(first - second), share=0.9),
            ),
            Wrong(
                "each sample holds all images once, so all averages are the same",
                "With replacement: some twice, some not at all.",
                _interval(lambda first, second: (first - second).mean().expand(9)),
            ),
            Wrong(
                "the second method minus the first",
                "Which of the two is positive if the first wins more?",
                _interval(lambda first, second: _drawn(second - first)),
            ),
            Wrong(
                "the least and the greatest of all averages are taken",
                "The middle 95 %: `quantile`.",
                lambda first, second: _drawn(first - second, draws=1000).aminmax(),
            ),
            Wrong(
                "this is one standard deviation to each side, which holds 68 %",
                "The middle 95 %.",
                _interval(lambda first, second: _drawn(first - second), share=0.6827),
            ),
            Wrong(
                "this is the range of the first method's average alone",
                "What is asked is the difference of the two.",
                _interval(lambda first, second: _drawn(first)),
            ),
        ),
        hint="How wide is the range for one image in place of 40, and for equal methods?",
        more="`difference[torch.randint(n, (1000, n))]` holds a thousand samples, one a row.",
    ),
}
