"""The optimisation loop of the methods that search for a mask by gradient steps.

A method defines its map (parameters → saliency), its objective and its update. The loop repeats
them, keeps the best maps seen, stops each image when it has converged, calls the callback, and on a
GPU records the step once (`RecordedStep`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..network import Classifier, RecordedStep
from .registry import Callback, Step

SELECTORS: dict[str, Callable[[Classifier, Tensor, Tensor], Tensor]] = {
    "logit": lambda f, y, c: y,
    "probability": lambda f, y, c: f.to_probabilities(y),
    "log-probability": lambda f, y, c: f.to_probabilities(y, log=True),
    "margin": lambda f, y, c: y - y.scatter(1, c, -math.inf).amax(1, keepdim=True),
}
"""Selector functions g_c of a classifier f, logits y `(N, C)` and classes c `(N, 1)`.

The margin compares logits, so it is the same for a softmax and a sigmoid: of several labels it asks
what speaks for c more than for the strongest other."""


def search(
    parameters: Tensor,
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    update: Callable[[Tensor], object],
    *,
    start: Tensor,
    steps: int,
    to_masks: Callable[[Tensor], Tensor],
    tolerance: float = 0.0,
    tell_last: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Maximise an objective for each image independently; return the best maps seen.

    Args:
        parameters: `(N, …)`, changed in place.
        evaluate: Parameters → saliency maps S `(N, 1, h, w)`, their objectives F `(N,)`, and the
            function that is differentiated `(N,)`: F, or F minus a penalty.
        update: Takes the gradient `(N, …)` and changes the parameters in place. Neither `update`
            nor `evaluate` may copy a value to the CPU (see `RecordedStep`).
        start: Maps of the initial parameters; returned where every objective is NaN.
        steps: Largest number of steps. The parameters after the last one are evaluated, too.
        to_masks: S → masks, for the callback.
        tolerance: An image stops, independently of the others, once its objective changes by less
            than this from one step to the next.
        tell_last: Whether the callback gets that last evaluation as one more step.
        callback: Called after each step; an exception that it raises ends the search.

    Returns:
        S of the largest F, `(N, 1, h, w)`.
    """
    S, F = start.clone(), start.new_full((len(start),), -math.inf)
    S_best, F_best = S.clone(), F.clone()
    running = torch.ones_like(F, dtype=torch.bool)
    of_images = (-1,) + (1,) * (parameters.ndim - 1)

    def keep(S_new: Tensor, F_new: Tensor) -> None:
        better = F_best < F_new
        S_best.copy_(S_new.where(better[:, None, None, None], S_best))
        F_best.copy_(F_new.where(better, F_best))
        S.copy_(S_new)
        F.copy_(F_new)

    def step() -> None:
        with torch.enable_grad():
            leaf = parameters.detach().clone().requires_grad_()
            S_new, F_new, ascended = evaluate(leaf)
            (g,) = torch.autograd.grad(ascended.sum(), leaf)
        running.logical_and_((F_new.detach() - F).abs() >= tolerance)
        keep(S_new.detach(), F_new.detach())
        update(g)
        parameters.copy_(parameters.where(running.view(of_images), leaf.detach()))

    def tell(index: int) -> None:
        if callback is not None:
            callback(Step(index, steps + tell_last, F.clone(), S.clone(), to_masks))

    recorded = RecordedStep(step, parameters.device)
    # Checking for convergence synchronises with a GPU, so it is done rarely there.
    ask_every = 1 if parameters.device.type == "cpu" else 10
    for index in range(1, steps + 1):
        recorded()
        tell(index)
        if index % ask_every == 0 and not running.any():
            break
    keep(*evaluate(parameters)[:2])
    if tell_last:
        tell(steps + 1)
    return S_best


def select(classifier: Classifier, logits: Tensor, targets: Tensor, selector: str) -> Tensor:
    """Apply the selector function g_c to logits `(N, C)`: one value per image, `(N,)`.

    Raises:
        ValueError: For the margin of a network with one logit.
    """
    if selector == "margin" and classifier.classes == 1:
        raise ValueError(
            f"{classifier.name} has one logit, and a margin needs two; use selector='logit'"
        )
    c = targets[:, None]
    return SELECTORS[selector](classifier, logits, c).gather(1, c)[:, 0]


def check_numbers(condition: str, holds: Callable[[float], bool], **values: float) -> None:
    """Raise ValueError for the first value that violates a condition, which the error states."""
    for name, value in values.items():
        if not holds(value):
            raise ValueError(f"{name} is {value}; {condition} is needed")
