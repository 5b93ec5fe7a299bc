"""Exercises of lesson 03, Score-CAM."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..masking import normalize
from ..network import Classifier
from .exercise import Exercise, Inputs, Wrong
from .inputs import generator, smooth, tiny, up


def _image(seed: int) -> Inputs:
    classifier, x = tiny(seed), smooth(seed, 1, 3, 32, 32)
    return classifier, x, int(classifier.logits(x)[0].argsort()[1])  # not the favourite class


def _masks(classifier: Classifier, x: Tensor) -> Tensor:
    """The feature maps of one image as masks, (K, 1, H, W)."""
    return normalize(up(classifier.features(x)[0][:, None], x.shape[2:]))


def _logits(classifier: Classifier, x: Tensor) -> Tensor:
    """The logits behind each channel's mask, (K, C)."""
    return classifier.logits(x * _masks(classifier, x))


def _through(channel: Callable[[Classifier, Tensor, int], Tensor]) -> Callable[..., Tensor]:
    """A function that returns the image as one channel lets it through."""

    def seen(classifier: Classifier, x: Tensor, c: int) -> Tensor:
        return x * _masks(classifier, x)[channel(classifier, x, c)]

    return seen


def _scores(classifier: Classifier, x: Tensor, c: int) -> Tensor:
    return _logits(classifier, x)[:, c]


def _gradient(classifier: Classifier, x: Tensor, c: int) -> Tensor:
    A, rest = classifier.split(x)
    A = A.detach().requires_grad_()
    (g,) = torch.autograd.grad(classifier.head(A, rest)[0, c], A)
    return g[0].mean(dim=(1, 2))


def _rough(classifier: Classifier, x: Tensor, c: int) -> Tensor:
    """The winner's map, enlarged, but not normalised."""
    k = _scores(classifier, x, c).argmax()
    return x * up(classifier.features(x)[:, [int(k)]], x.shape[2:])


def _some_scores(seed: int) -> Inputs:
    """Scores, feature maps whose mean and variation have other orders, and a number of channels."""
    u = 2 * torch.randn(12, generator=generator(seed))
    scale = 0.2 + torch.rand(12, 1, 1, 1, generator=generator(20 + seed))
    A = scale * torch.rand(12, 1, 5, 6, generator=generator(40 + seed))
    return u, A + torch.rand(12, 1, 1, 1, generator=generator(60 + seed)), 3 + seed


def _by_variation(A: Tensor) -> Tensor:
    return A.std(dim=(1, 2, 3)).argsort(descending=True)


def _only(u: Tensor, kept: Tensor, rest: float = -torch.inf) -> Tensor:
    some = torch.full_like(u, rest)
    some[kept] = u[kept]
    return some.softmax(dim=0)


def _cut_afterwards(u: Tensor, A: Tensor, M: int) -> Tensor:
    weights = torch.zeros_like(u)
    kept = _by_variation(A)[:M]
    weights[kept] = u.softmax(dim=0)[kept]
    return weights


def _as_ranked(u: Tensor, A: Tensor, M: int) -> Tensor:
    weights = torch.zeros_like(u)
    weights[:M] = u[_by_variation(A)[:M]].softmax(dim=0)
    return weights


EXERCISES = {
    "03.1": Exercise(
        asks="a function (classifier, x, c) that returns the image x as the channel of the largest "
        "score lets it through, a tensor (1, 3, H, W)",
        reference=_through(lambda *given: _scores(*given).argmax()),
        inputs=_image,
        fresh=5,
        within=(0, 1),
        wrong=(
            Wrong(
                "this is the image through the channel of the lowest score",
                "The largest weight belongs to the largest score.",
                _through(lambda *given: _scores(*given).argmin()),
            ),
            Wrong(
                "the most active channel is taken",
                "Score-CAM asks what the network says behind the mask.",
                _through(lambda net, x, c: net.features(x)[0].mean(dim=(1, 2)).argmax()),
            ),
            Wrong(
                "the channel of the largest gradient is taken, as Grad-CAM would",
                "No gradient is needed here: use each channel as a mask.",
                _through(lambda *given: _gradient(*given).argmax()),
            ),
            Wrong(
                "the scores are those of the class that the network likes best, whatever c is",
                "Which column of the logits?",
                _through(lambda net, x, c: _scores(net, x, int(net.predict(x))).argmax()),
            ),
            Wrong(
                "the scores are the mean of all classes' logits",
                "Which column of the logits?",
                _through(lambda net, x, c: _logits(net, x).mean(dim=1).argmax()),
            ),
            Wrong(
                "this is the mask, not the image behind it",
                "Multiply.",
                lambda net, x, c: _masks(net, x)[[int(_scores(net, x, c).argmax())]],
            ),
            Wrong(
                "the channel is not brought into [0, 1]",
                "Equation (4).",
                _rough,
            ),
        ),
        hint="First the scores of all channels, then the place of the largest, then its mask.",
        more="`u, A = scores(classifier, x, c)` has all that is needed: `u.argmax()`, `n(up(…))`.",
    ),
    "03.2": Exercise(
        asks="a function (classifier, x, c) that returns the channels' weights, a tensor (K,)",
        reference=lambda net, x, c: _logits(net, x).softmax(dim=1)[:, c].softmax(dim=0),
        inputs=_image,
        within=(0, 1),
        wrong=(
            Wrong(
                "these are Score-CAM's own weights, of the logits",
                "A step lies between the logits behind a mask and the probability of c.",
                lambda net, x, c: _scores(net, x, c).softmax(dim=0),
            ),
            Wrong(
                "these are the probabilities: they are scores, not yet weights",
                "Weights add up to 1 over the channels.",
                lambda net, x, c: _logits(net, x).softmax(dim=1)[:, c],
            ),
            Wrong(
                "the probabilities are divided by their sum",
                "Score-CAM makes weights of scores by a softmax.",
                lambda net, x, c: torch.nn.functional.normalize(
                    _logits(net, x).softmax(dim=1)[:, c], p=1, dim=0
                ),
            ),
            Wrong(
                "the softmax over the classes runs over the channels",
                "Behind each mask the probabilities of all classes add up to 1: that is axis 1.",
                lambda net, x, c: _logits(net, x).softmax(dim=0)[:, c].softmax(dim=0),
            ),
            Wrong(
                "the probabilities are those of the network's favourite class, whatever c is",
                "Which column?",
                lambda net, x, c: (
                    _logits(net, x).softmax(dim=1)[:, int(net.predict(x))].softmax(dim=0)
                ),
            ),
            Wrong(
                "the feature maps are used as masks before they are brought into [0, 1]",
                "Equation (4).",
                lambda net, x, c: net.probabilities(
                    x * up(net.features(x)[0][:, None], x.shape[2:])
                )[:, c].softmax(dim=0),
            ),
        ),
        hint="One softmax over classes makes probabilities, another over channels makes weights.",
        more="`classifier.probabilities` of the K masked images, then column c.",
    ),
    "03.3": Exercise(
        asks="a function (u, A, M) that returns the weights of all channels, a tensor (K,)",
        reference=lambda u, A, M: _only(u, _by_variation(A)[:M]),
        inputs=_some_scores,
        within=(0, 1),
        wrong=(
            Wrong(
                "the softmax still runs over all channels, so the weights add up to less than 1",
                "The channels that are left out must not take part in the softmax.",
                _cut_afterwards,
            ),
            Wrong(
                "channels that are left out have the score 0, and so a weight",
                "Which score has the weight 0 after a softmax?",
                lambda u, A, M: _only(u, _by_variation(A)[:M], rest=0.0),
            ),
            Wrong(
                "the channels that vary least are kept",
                "`argsort(descending=True)`?",
                lambda u, A, M: _only(u, _by_variation(A)[-M:]),
            ),
            Wrong(
                "the most active channels are kept",
                "How much a map varies is its standard deviation, not its mean.",
                lambda u, A, M: _only(u, A.mean(dim=(1, 2, 3)).argsort(descending=True)[:M]),
            ),
            Wrong(
                "the channels of the highest scores are kept",
                "To know the scores all channels would have to be tried: choose before that.",
                lambda u, A, M: _only(u, u.argsort(descending=True)[:M]),
            ),
            Wrong(
                "the weights are in the order of the ranking, not in that of the channels",
                "Weight k belongs to channel k: put it there.",
                _as_ranked,
            ),
            Wrong(
                "only the weights of the kept channels are returned",
                "All K channels have a weight, most of them 0.",
                lambda u, A, M: u[_by_variation(A)[:M]].softmax(dim=0),
            ),
            Wrong(
                "the kept channels have equal weights",
                "What do the scores `u` say about them?",
                lambda u, A, M: _only(torch.zeros_like(u), _by_variation(A)[:M]),
            ),
        ),
        hint="Begin with a vector of K scores that all give the weight 0; fill in those you keep.",
        more="`softmax` makes 0 of `-torch.inf`.",
    ),
}
