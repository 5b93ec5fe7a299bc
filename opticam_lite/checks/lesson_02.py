"""Exercises of lesson 02, Grad-CAM."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..masking import normalize
from ..network import Classifier
from .exercise import Exercise, Inputs, Wrong
from .inputs import generator, smooth, tiny, up


def _gradients(
    classifier: Classifier, images: Tensor, pick: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Feature maps, and the gradient of what `pick` takes from the logits, both (N, K, h, w)."""
    A, rest = classifier.split(images)
    A = A.detach().requires_grad_()
    (g,) = torch.autograd.grad(pick(classifier.head(A, rest)).sum(), A)
    return A.detach(), g


def _map(
    classifier: Classifier, images: Tensor, c: Tensor, probability: bool = False, relu: bool = True
) -> Tensor:
    """Grad-CAM's map, enlarged."""

    def pick(y: Tensor) -> Tensor:
        return (y.softmax(1) if probability else y).gather(1, c[:, None])

    A, g = _gradients(classifier, images, pick)
    S = torch.einsum("nk,nkhw->nhw", g.mean(dim=(2, 3)), A)[:, None]
    return up(S.relu() if relu else S, images.shape[2:])


def _two(
    classifier: Classifier,
    images: Tensor,
    second: int = 1,
    *,
    probability: bool = False,
    relu: bool = True,
) -> list[Tensor]:
    """Grad-CAM's maps for the most probable class and for another rank."""
    order = classifier.probabilities(images).argsort(dim=1, descending=True)
    return [_map(classifier, images, order[:, rank], probability, relu) for rank in (0, second)]


def _masks(
    classifier: Classifier, images: Tensor, probability: bool = False, relu: bool = True
) -> list[Tensor]:
    S = _two(classifier, images, probability=probability, relu=relu)
    return [normalize(s) for s in S]


def _apart(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).abs().mean(dim=(1, 2, 3))


def _over_the_batch(classifier: Classifier, images: Tensor) -> Tensor:
    S = _two(classifier, images)
    return _apart(*((s - s.min()) / (s.max() - s.min()).clamp(min=1e-12) for s in S))


def _images(seed: int) -> Inputs:
    return tiny(seed), smooth(seed, 4, 3, 32, 32)


def _classes(seed: int) -> Inputs:
    return *_images(seed), torch.randint(4, (4,), generator=generator(seed))


def _weights(
    pick: Callable[[Tensor, Tensor], Tensor], pool: Callable[[Tensor], Tensor] | None = None
) -> Callable[[Classifier, Tensor, Tensor], Tensor]:
    """A function that returns the pooled gradient of what `pick` takes from logits and classes."""

    def weights(classifier: Classifier, images: Tensor, c: Tensor) -> Tensor:
        _, g = _gradients(classifier, images, lambda y: pick(y, c[:, None]))
        return g.mean(dim=(2, 3)) if pool is None else pool(g)

    return weights


def _of_probability(y: Tensor, c: Tensor) -> Tensor:
    return y.softmax(1).gather(1, c)


def _window(g: Tensor) -> Tensor:
    return F.avg_pool2d(g, 2)


EXERCISES = {
    "02.1": Exercise(
        asks="a function (classifier, images) that returns for each image the mean absolute "
        "difference of two masks of Grad-CAM, a tensor (N,)",
        reference=lambda classifier, images: _apart(*_masks(classifier, images)),
        inputs=_images,
        batched=(1,),
        wrong=(
            Wrong(
                "the masks are those of maps whose negative cells were kept",
                "What is h in equation (2)?",
                lambda classifier, images: _apart(*_masks(classifier, images, relu=False)),
            ),
            Wrong(
                "the gradient is that of the probability, not that of the logit",
                "What is differentiated in equation (2)? Leave the softmax out.",
                lambda classifier, images: _apart(*_masks(classifier, images, probability=True)),
            ),
            Wrong(
                "the maps are compared before they are masks",
                "Two maps have two scales. What does equation (4) do about it?",
                lambda classifier, images: _apart(*_two(classifier, images)),
            ),
            Wrong(
                "the least and the most probable class are compared",
                "Which column of `order` belongs to the second?",
                lambda classifier, images: _apart(
                    *map(normalize, _two(classifier, images, second=-1))
                ),
            ),
            Wrong(
                "the differences have signs, so that they cancel",
                "More here and less there is a difference, too.",
                lambda classifier, images: (
                    torch.stack(_masks(classifier, images)).diff(dim=0)[0].mean(dim=(1, 2, 3)).neg()
                ),
            ),
            Wrong(
                "the differences are added up over the pixels",
                "How would the number change for images twice as high?",
                lambda classifier, images: 32 * 32 * _apart(*_masks(classifier, images)),
            ),
            Wrong(
                "the maps are normalised over the whole batch",
                "Least and greatest value of which pixels? Think of `dim=` and `keepdim=`.",
                _over_the_batch,
            ),
            Wrong(
                "the mean runs over the images, too",
                "One number an image is needed: name the axes in `mean`.",
                lambda classifier, images: _apart(*_masks(classifier, images)).mean(),
            ),
        ),
        hint="First the two masks of each image, then the mean over the axes 1, 2 and 3.",
        more="`grad_cam(classifier, images, order[:, 0])` is the first of the two masks.",
    ),
    "02.2": Exercise(
        asks="a function (classifier, images, c) that returns the weights w, a tensor (N, K)",
        reference=_weights(_of_probability),
        inputs=_classes,
        batched=(1, 2),
        wrong=(
            Wrong(
                "these are the weights of the logit",
                "Between the logits and the gradient a step is missing.",
                _weights(lambda y, c: y.gather(1, c)),
            ),
            Wrong(
                "the gradient is that of the logarithm of the probability",
                "`softmax` or `log_softmax`?",
                _weights(lambda y, c: y.log_softmax(1).gather(1, c)),
            ),
            Wrong(
                "the softmax runs over the images of the batch",
                "Which numbers add up to 1: those of an image, or those of a class?",
                _weights(lambda y, c: y.softmax(0).gather(1, c)),
            ),
            Wrong(
                "all probabilities are added before the gradient is taken: their sum is always 1",
                "Of which class is the probability that is meant?",
                _weights(lambda y, c: y.softmax(1)),
            ),
            Wrong(
                "the gradients are added up over the cells",
                "GAP in equation (2) stands for global *average* pooling.",
                _weights(_of_probability, lambda g: g.sum(dim=(2, 3))),
            ),
            Wrong(
                "the gradient of the most probable class is taken, whatever c is",
                "`gather` picks the columns that c names.",
                _weights(lambda y, c: y.softmax(1).amax(dim=1)),
            ),
            Wrong(
                "the gradients are not averaged over the cells",
                "Equation (2) gives each channel one number.",
                _weights(_of_probability, lambda g: g),
            ),
            Wrong(
                "negative gradients are left out",
                "The relu of equation (2) stands outside the sum.",
                _weights(_of_probability, lambda g: g.relu().mean(dim=(2, 3))),
            ),
        ),
        hint="Only what is differentiated is different from `weights_and_maps`.",
        more="Logits become probabilities by a softmax over the classes, that is over axis 1.",
    ),
    "02.3": Exercise(
        asks="a function (g) that returns gradients of the same shape (N, K, h, w)",
        reference=lambda g: F.interpolate(_window(g), scale_factor=2, mode="nearest"),
        inputs=lambda seed: (torch.randn(2, 3, 6, 8, generator=generator(seed)),),
        batched=(0,),
        wrong=(
            Wrong(
                "the gradient is returned as it was",
                "What holds for the four cells of a window afterwards?",
                lambda g: g.clone(),
            ),
            Wrong(
                "each cell of a window gets the whole gradient of the window",
                "To divide something among four means that each gets how much of it?",
                lambda g: F.interpolate(4 * _window(g), scale_factor=2, mode="nearest"),
            ),
            Wrong(
                "each window gets its largest gradient",
                "Which pooling shares, and which one chooses?",
                lambda g: F.interpolate(F.max_pool2d(g, 2), scale_factor=2, mode="nearest"),
            ),
            Wrong(
                "cells of different windows are mixed when the windows are enlarged",
                "All four cells of a window are to hold the same: look at `mode=`.",
                lambda g: F.interpolate(_window(g), scale_factor=2, mode="bilinear"),
            ),
            Wrong(
                "the windows overlap",
                "Max pooling takes steps of two cells: `stride=`.",
                lambda g: F.avg_pool2d(g, 3, stride=1, padding=1),
            ),
            Wrong(
                "the result has one cell for each window",
                "It is multiplied with the feature maps afterwards: it needs as many cells.",
                _window,
            ),
            Wrong(
                "the average is over all cells: that is Grad-CAM",
                "Share within windows of 2 × 2 cells only.",
                lambda g: g.mean(dim=(2, 3), keepdim=True).expand_as(g),
            ),
            Wrong(
                "the channels are averaged, too",
                "Each channel has its own pooling.",
                lambda g: (
                    F.interpolate(_window(g), scale_factor=2, mode="nearest")
                    .mean(dim=1, keepdim=True)
                    .expand_as(g)
                ),
            ),
        ),
        hint="Take a gradient of 2 × 2 cells, 8 0 / 0 0, and write down what is to come out.",
        more="`F.avg_pool2d(g, 2)` gives the share of each window; `F.interpolate` copies it.",
    ),
}
