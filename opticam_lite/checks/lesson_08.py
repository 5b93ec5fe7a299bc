"""Exercises of lesson 08, the sanity check."""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy import stats
from torch import Tensor, nn

from ..masking import to_masks
from ..methods import explain
from ..network import Classifier
from ..studies.sanity import edges, similarities
from .exercise import Exercise, Inputs, Wrong
from .inputs import generator, smooth, tiny


def _signed(seed: int) -> Inputs:
    """Two maps with negative values and ties, which are opposite for some seeds."""
    a, b = torch.randn(2, 7, 7, generator=generator(seed))
    return tuple((2 * x).round() / 2 for x in (a, b - (1.0, -0.5, 0.7)[seed % 3] * a))


def _rank(a: Tensor, b: Tensor) -> float:
    return float(stats.spearmanr(a.flatten(), b.flatten()).statistic)


def _pearson(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1])


def _ranks(a: Tensor) -> Tensor:
    return torch.as_tensor(stats.rankdata(a.flatten()))


def _order(a: Tensor) -> Tensor:
    return a.flatten().argsort(stable=True).argsort(stable=True)


def _two_networks(seed: int) -> Inputs:
    classifier, x = tiny(seed), smooth(seed, 4, 3, 32, 32)
    network = tiny(seed).network
    assert isinstance(network, nn.Sequential)
    last = network[-1]
    assert isinstance(last, nn.Linear)
    last.weight.data = last.weight.data.flip(0) + 0.4 * torch.randn(
        last.weight.shape, generator=generator(40 + seed)
    )
    return classifier, classifier.with_network(network), x, classifier.predict(x)


def _maps(classifier: Classifier, images: Tensor, targets: Tensor) -> Tensor:
    found: Tensor = explain("grad-cam", classifier, images, targets, warn=False, progress=False)
    return found


Measure = Callable[[Tensor, Tensor], float]


def _per_image(measure: Measure) -> Callable[[Tensor, Tensor], Tensor]:
    def values(first: Tensor, second: Tensor) -> Tensor:
        pairs = zip(first, second, strict=True)
        return torch.tensor([measure(a, b) for a, b in pairs], dtype=torch.float64)

    return values


def _minded(
    compare: Callable[[Tensor, Tensor], Tensor | float],
    classes: Callable[[Classifier, Tensor, Tensor], Tensor] = lambda network, x, c: c,
) -> Callable[..., float]:
    """A function that compares Grad-CAM's maps of two networks."""

    def minded(classifier: Classifier, other: Classifier, images: Tensor, targets: Tensor) -> float:
        first, second = (_maps(f, images, classes(f, images, targets)) for f in (classifier, other))
        return float(compare(first, second))

    return minded


def _ssim(first: Tensor, second: Tensor) -> float:
    values = similarities(first, second)["SSIM"]
    return sum(values) / len(values)


def _to_crisp(seed: int) -> Inputs:
    classifier, x = tiny(seed), smooth(seed, 4, 3, 32, 32)
    return classifier, x, classifier.predict(x)


def _crisp(join: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A function that joins Grad-CAM's masks and the edges of the images."""

    def crisp(classifier: Classifier, images: Tensor, targets: Tensor) -> Tensor:
        return join(_maps(classifier, images, targets), edges(images))

    return crisp


EXERCISES = {
    "08.1": Exercise(
        asks="a function (a, b) that returns the rank correlation of the absolute values, a number",
        reference=lambda a, b: _rank(a.abs(), b.abs()),
        inputs=_signed,
        wrong=(
            Wrong(
                "the sign of a pixel still counts",
                "−3 and 3 are to have the same rank.",
                _rank,
            ),
            Wrong(
                "this is the absolute value of the correlation, not the correlation of absolute "
                "values",
                "First the absolute values, then the ranks.",
                lambda a, b: abs(_rank(a, b)),
            ),
            Wrong(
                "the values are correlated, not their ranks",
                "How does it change if the largest value becomes ten times as large?",
                lambda a, b: _pearson(a.abs(), b.abs()),
            ),
            Wrong(
                "only the first map has absolute values",
                "Both maps may be negative.",
                lambda a, b: _rank(a.abs(), b),
            ),
            Wrong(
                "only the second map has absolute values",
                "Both maps may be negative.",
                lambda a, b: _rank(a, b.abs()),
            ),
            Wrong(
                "the absolute values are taken of the ranks",
                "First the absolute values, then the ranks.",
                lambda a, b: _pearson(*((r - r.mean()).abs() for r in (_ranks(a), _ranks(b)))),
            ),
            Wrong(
                "equal values have different ranks",
                "Equal values share the mean of their ranks, as in `ranks` above.",
                lambda a, b: _pearson(_order(a.abs()).double(), _order(b.abs()).double()),
            ),
        ),
        hint="`rank_correlation` of the lesson does the rest.",
        more="What is to be done with a and b before they are ranked?",
        within=(-1.0, 1.0),
    ),
    "08.2": Exercise(
        asks="a function (classifier, other, images, targets) that returns the mean rank "
        "correlation of Grad-CAM's maps of both networks, a number",
        reference=_minded(lambda a, b: _per_image(_rank)(a, b).mean()),
        inputs=_two_networks,
        wrong=(
            Wrong(
                "each network explains the class that it predicts itself",
                "Both explain `targets`, else the class changes with the network.",
                _minded(lambda a, b: _per_image(_rank)(a, b).mean(), lambda f, x, c: f.predict(x)),
            ),
            Wrong(
                "the pixels of all images are ranked together",
                "One correlation an image, then their mean.",
                _minded(_rank),
            ),
            Wrong(
                "the values are correlated, not their ranks",
                '`rank_correlation`, or `sanity.similarities(…)["rank"]`.',
                _minded(lambda a, b: _per_image(_pearson)(a, b).mean()),
            ),
            Wrong(
                "this is the median over the images",
                "The mean is asked for.",
                _minded(lambda a, b: _per_image(_rank)(a, b).median()),
            ),
            Wrong(
                "the images are summed up, not averaged",
                "How many images are there?",
                _minded(lambda a, b: _per_image(_rank)(a, b).sum()),
            ),
            Wrong(
                "this is how different they are: 1 minus the correlation",
                "1 is to say: the same map.",
                _minded(lambda a, b: 1 - _per_image(_rank)(a, b).mean()),
            ),
            Wrong(
                "this is SSIM",
                "`sanity.similarities` returns four measures.",
                _minded(_ssim),
            ),
        ),
        hint="Two calls of `ol.explain`, with the same images and targets.",
        more="`alike` of the lesson takes the two results.",
        within=(-1.0, 1.0),
    ),
    "08.3": Exercise(
        asks="a function (classifier, images, targets) that returns Grad-CAM's masks times the "
        "edges of the images, a tensor (N, 1, H, W)",
        reference=_crisp(lambda mask, edge: mask * edge),
        inputs=_to_crisp,
        batched=(1, 2),
        within=(0.0, 1.0),
        wrong=(
            Wrong("these are the masks alone", "Times what?", _crisp(lambda mask, edge: mask)),
            Wrong(
                "these are the edges alone",
                "Where does the network come in?",
                _crisp(lambda mask, edge: edge),
            ),
            Wrong(
                "masks and edges are averaged, not multiplied",
                "A pixel is to be bright only where both are.",
                _crisp(lambda mask, edge: (mask + edge) / 2),
            ),
            Wrong(
                "the larger one of both is taken",
                "A product.",
                _crisp(torch.maximum),
            ),
            Wrong(
                "the edges are dark, not bright",
                "1 is an edge in what `sanity.edges` returns.",
                _crisp(lambda mask, edge: mask * (1 - edge)),
            ),
            Wrong(
                "the edges are those of the mask",
                "`sanity.edges` takes the images.",
                _crisp(lambda mask, edge: mask * edges(mask.expand(-1, 3, -1, -1))),
            ),
            Wrong(
                "the product is scaled once more",
                "The product itself, for the sake of comparison.",
                _crisp(lambda mask, edge: to_masks(mask * edge, mask.shape[2:])),
            ),
        ),
        hint="`ol.explain` and `sanity.edges`, and one sign between them.",
        more="Both are tensors (N, 1, H, W).",
    ),
}
