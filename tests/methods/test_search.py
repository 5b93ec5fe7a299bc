"""The engine of searches: the best maps, which image stops when, what the callback is told."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from conftest import make_classifier
from torch import Tensor

from opticam_lite.methods import Step
from opticam_lite.methods.search import search, select


def follow(F: Tensor, steps: int, **options: Any) -> tuple[Tensor, list[Step], Tensor]:
    """Search along a given path: parameter t of each row stands for its objective F[t]."""
    t = torch.zeros(F.shape[1], 1)

    def evaluate(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index = t.detach()[:, 0].long()
        S = index.float().view(-1, 1, 1, 1)
        values = F[index, torch.arange(F.shape[1])] + 0 * t[:, 0]
        return S, values, values

    told: list[Step] = []
    best = search(
        t, evaluate, lambda g: t.add_(1),
        start=torch.full((F.shape[1], 1, 1, 1), -1.0), steps=steps,
        to_masks=lambda S: S, callback=told.append, **options,
    )  # fmt: skip
    return best.flatten(), told, t[:, 0]


NAN = float("nan")


def test_the_best_is_kept_for_each_image_and_the_last_is_judged() -> None:
    F = torch.tensor([[1.0, 5.0, NAN], [3.0, 4.0, NAN], [2.0, NAN, NAN], [9.0, 1.0, NAN]])
    best, told, _ = follow(F, 3)
    assert best.tolist() == [3, 0, -1]  # -1: the start
    assert [step.index for step in told] == [1, 2, 3]
    assert {step.total for step in told} == {3}
    assert [step.objective[0].item() for step in told] == [1, 3, 2]
    assert [step.saliency[0].item() for step in told] == [0, 1, 2]
    _, told, _ = follow(F, 3, tell_last=True)
    assert [(step.index, step.total) for step in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert told[-1].objective[0] == 9


def test_an_image_stops_by_itself() -> None:
    F = torch.tensor([[1.0, 1.0], [2.0, 3.0], [2.05, 4.0], [9.0, 5.0], [9.0, 6.0]])
    best, told, t = follow(F, 4, tolerance=0.1)
    assert t.tolist() == [2, 4]  # the first image's objective changed by 0.05 only
    assert best.tolist() == [2, 4]
    assert len(told) == 4
    _, told, t = follow(F[:, :1], 4, tolerance=0.1)
    assert t.tolist() == [2]
    assert len(told) == 3  # and nothing is left to do


def test_the_first_of_equals_is_kept_and_a_change_of_the_tolerance_goes_on() -> None:
    F = torch.tensor([[1.0, 1.0], [3.0, 1.0], [3.0, 1.5], [3.0, 2.0]])
    best, told, t = follow(F, 3)  # no tolerance: what does not change goes on, too
    assert best.tolist() == [1, 3]
    assert t.tolist() == [3, 3]
    assert len(told) == 3
    _, told, t = follow(F[1:], 2, tolerance=0.5)
    assert t.tolist() == [1, 2]


def test_parameters_of_any_shape() -> None:
    """The image that stops is the first, whatever its parameters' shape."""
    heights = torch.tensor([0.0, 1.0])

    def evaluate(m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        F = heights * m.mean((1, 2, 3))
        return m, F, F

    m = torch.zeros(2, 1, 3, 2)
    search(
        m, evaluate, lambda g: m.add_(1), start=m.clone(), steps=4, to_masks=lambda S: S,
        tolerance=0.1,
    )  # fmt: skip
    assert torch.equal(m, torch.tensor([1.0, 4.0]).view(2, 1, 1, 1).expand(2, 1, 3, 2))


def test_a_step_without_a_map_has_no_masks() -> None:
    S = torch.rand(1, 1, 2, 2)
    for step in (Step(1, 2), Step(1, 2, saliency=S), Step(1, 2, to_masks=lambda S: S)):
        assert step.masks() is None
    assert torch.equal(Step(1, 2, saliency=S, to_masks=lambda S: 2 * S).masks(), 2 * S)
    with pytest.raises(FrozenInstanceError):
        Step(1, 2).index = 2


def test_an_exception_of_the_callback_ends_the_search() -> None:
    def cancel(step: Step) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        search(
            torch.zeros(1, 1), lambda t: (t.view(1, 1, 1, 1), t[:, 0], t[:, 0]), lambda g: None,
            start=torch.zeros(1, 1, 1, 1), steps=2, to_masks=lambda S: S, callback=cancel,
        )  # fmt: skip


def test_the_margin_is_over_the_largest_other_logit() -> None:
    """Also where that is negative."""
    y = torch.tensor([[3.0, -1.0, -2.0], [-4.0, -1.0, -2.0]])
    found = select(make_classifier("cnn"), y, torch.tensor([0, 2]), "margin")
    assert found.tolist() == [4, -1]
