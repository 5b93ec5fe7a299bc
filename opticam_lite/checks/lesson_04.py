"""Exercises of lesson 04, Opti-CAM."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..masking import normalize
from ..network import Classifier
from .exercise import Exercise, Inputs, Wrong
from .inputs import generator, smooth, tiny, up


def _objectives(seed: int) -> Inputs:
    """Curves that rise, shake, and come down a little in the end, some of them below zero."""
    t = torch.linspace(0, 1, 50)[:, None]
    speed = 2 + 6 * torch.rand(1, 5, generator=generator(seed))
    rise = (1 - (-speed * t).exp()) * torch.linspace(2, 6, 5)
    shake = 0.4 * torch.rand(50, 5, generator=generator(30 + seed)) - 0.6 * t**4
    return (rise + shake + torch.linspace(-5, 3, 5),)


def _first(reached: Tensor) -> Tensor:
    return reached.int().argmax(dim=0)


def _way(objectives: Tensor, share: float = 0.9, end: Tensor | None = None) -> Tensor:
    first = objectives[0]
    end = objectives.amax(dim=0) if end is None else end
    return _first(objectives >= first + share * (end - first))


def _search_inputs(seed: int) -> Inputs:
    """A class whose logit the mean map raises, or for odd seeds lowers, and few iterations."""
    classifier, x = tiny(seed), smooth(seed, 1, 3, 32, 32)
    mean = normalize(up(classifier.features(x).mean(dim=1, keepdim=True), x.shape[2:]))
    rise = (classifier.logits(x * mean) - classifier.logits(x))[0]
    return classifier, x, int(rise.argmin() if seed % 2 else rise.argmax()), 6


Objective = Callable[[Tensor, Tensor, int], Tensor]


def _search(objective: Objective, down: bool = False) -> Callable[..., list[float]]:
    """A search that maximises `(logits, logits of the whole image, c)`, and its objectives."""

    def search(classifier: Classifier, x: Tensor, c: int, iterations: int) -> list[float]:
        A, whole = classifier.features(x), classifier.logits(x)[0]
        u = torch.zeros(1, A.shape[1], requires_grad=True)
        adam, trace = torch.optim.Adam([u], lr=0.1), []
        for _ in range(iterations):
            S = (u.softmax(dim=1)[:, :, None, None] * A).sum(dim=1, keepdim=True)
            F = objective(classifier.logits(x * normalize(up(S, x.shape[2:])))[0], whole, c)
            adam.zero_grad()
            (F if down else -F).backward()
            adam.step()
            trace.append(F.item())
        return trace

    return search


def _diff(y: Tensor, whole: Tensor, c: int) -> Tensor:
    return -(whole[c] - y[c]).abs()


def _maps(seed: int) -> Inputs:
    w = (2 * torch.randn(9, generator=generator(seed))).softmax(dim=0)
    A = torch.rand(1, 9, 4, 5, generator=generator(20 + seed))
    return w, A, 2 + seed, (16, 20)


def _mixture(w: Tensor, A: Tensor, size: tuple[int, int]) -> Tensor:
    return normalize(up(torch.einsum("k,nkhw->nhw", w, A)[:, None], size))


def _kept(w: Tensor, kept: Tensor) -> Tensor:
    some = torch.zeros_like(w)
    some[kept] = w[kept]
    return some


def _ranked(w: Tensor) -> Tensor:
    return w.argsort(descending=True)


EXERCISES = {
    "04.1": Exercise(
        asks="a function (objectives) that returns a number of iterations for each image, (N,)",
        reference=lambda objectives: 1 + _way(objectives),
        inputs=_objectives,
        wrong=(
            Wrong(
                "the iterations are counted from 0",
                "Row 0 is what the first iteration found.",
                _way,
            ),
            Wrong(
                "this is where 90 % of the best value is reached, not 90 % of the way to it",
                "The way begins at the first value, which need not be 0.",
                lambda objectives: 1 + _first(objectives >= 0.9 * objectives.amax(dim=0)),
            ),
            Wrong(
                "this is where the best value itself is reached",
                "90 % of the way.",
                lambda objectives: 1 + objectives.argmax(dim=0),
            ),
            Wrong(
                "the way ends at the last value instead of the best",
                "An objective may come down again.",
                lambda objectives: 1 + _way(objectives, end=objectives[-1]),
            ),
            Wrong(
                "this is where 10 % of the way is made",
                "How much is still missing, or how much is made?",
                lambda objectives: 1 + _way(objectives, 0.1),
            ),
            Wrong(
                "this counts all iterations below, also those after the first one above",
                "The first row that reaches it: what does `argmax` of True and False give?",
                lambda objectives: (
                    1
                    + (
                        objectives < objectives[0] + 0.9 * (objectives.amax(dim=0) - objectives[0])
                    ).sum(dim=0)
                ),
            ),
            Wrong(
                "the images are averaged before it is looked for",
                "Each column is an image of its own.",
                lambda objectives: (1 + _way(objectives.mean(dim=1, keepdim=True))).expand(5),
            ),
        ),
        hint="Draw one curve, and the line that it has to cross.",
        more="`objectives >= line` is True from there on: `argmax` finds the first True.",
    ),
    "04.2": Exercise(
        asks="a function (classifier, x, c, iterations) that returns the objective of each "
        "iteration, a list of numbers",
        reference=_search(_diff),
        inputs=_search_inputs,
        wrong=(
            Wrong(
                "the objective is still that of equation 10",
                "The logit of the whole image plays a part in equation 19.",
                _search(lambda y, whole, c: y[c]),
            ),
            Wrong(
                "the absolute value is missing, so that more is always better",
                "`diff` wants the same as the whole image, no more and no less.",
                _search(lambda y, whole, c: y[c] - whole[c]),
            ),
            Wrong(
                "the sign is wrong: the difference is made large",
                "Equation 19 begins with a minus.",
                _search(lambda y, whole, c: (whole[c] - y[c]).abs()),
            ),
            Wrong(
                "the search goes downhill",
                "PyTorch's optimisers make things smaller: what is handed to `backward`?",
                _search(_diff, down=True),
            ),
            Wrong(
                "the difference is squared",
                "Equation 19 takes the absolute value.",
                _search(lambda y, whole, c: -((whole[c] - y[c]) ** 2)),
            ),
            Wrong(
                "the difference is that of probabilities",
                "g_c picks a logit.",
                _search(lambda y, whole, c: -(whole.softmax(0)[c] - y.softmax(0)[c]).abs()),
            ),
            Wrong(
                "the differences of all classes are added up",
                "g_c picks one logit.",
                _search(lambda y, whole, c: -(whole - y).abs().sum()),
            ),
        ),
        hint="One number more is computed before the loop, and one line of the loop changes.",
        more="`classifier.logits(x)[0, c]` is the logit of the whole image.",
    ),
    "04.3": Exercise(
        asks="a function (w, A, m, size) that returns the mask of the m heaviest maps, "
        "a tensor (1, 1, H, W)",
        reference=lambda w, A, m, size: _mixture(_kept(w, _ranked(w)[:m]), A, size),
        inputs=_maps,
        within=(0, 1),
        wrong=(
            Wrong(
                "the first m maps are kept, whatever their weights",
                "Sort the weights first.",
                lambda w, A, m, size: _mixture(_kept(w, torch.arange(m)), A, size),
            ),
            Wrong(
                "the lightest maps are kept",
                "`argsort` begins with the smallest.",
                lambda w, A, m, size: _mixture(_kept(w, _ranked(w)[-m:]), A, size),
            ),
            Wrong(
                "the heaviest maps are taken away",
                "Which weights become zero?",
                lambda w, A, m, size: _mixture(_kept(w, _ranked(w)[m:]), A, size),
            ),
            Wrong(
                "the kept maps count the same",
                "They keep their weights.",
                lambda w, A, m, size: _mixture(_kept(torch.ones_like(w), _ranked(w)[:m]), A, size),
            ),
            Wrong(
                "sorted weights meet unsorted maps",
                "Which map does the heaviest weight belong to?",
                lambda w, A, m, size: _mixture(w.sort(descending=True).values[:m], A[:, :m], size),
            ),
            Wrong(
                "all maps are kept",
                "m plays no part.",
                lambda w, A, m, size: _mixture(w, A, size),
            ),
            Wrong(
                "the mask is as small as the maps",
                "A mask has the size of the image.",
                lambda w, A, m, size: _mixture(_kept(w, _ranked(w)[:m]), A, A.shape[2:]),
            ),
        ),
        hint="Keep all weights but set those of the other maps to zero, then mix as in equation 8.",
        more="`w.argsort(descending=True)[:m]` names the m heaviest; `ol.to_masks` does the rest.",
    ),
}
