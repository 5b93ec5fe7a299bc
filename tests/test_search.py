"""The engine of searches: the best maps, who stops when, what is told; the recorded step."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from opticam_lite.methods import Step
from opticam_lite.methods.search import search
from opticam_lite.network import RecordedStep

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Graph:
    """A recording that does what was recorded, as a GPU's."""

    recorded: list[Any]

    def replay(self) -> None:
        self.recorded[0]()


def recorder(monkeypatch: pytest.MonkeyPatch, step: Any) -> list[str]:
    """Put a recorder in place of the GPU's, whose context notes the step that runs in it."""
    told: list[str] = []

    @contextlib.contextmanager
    def graph(made: Graph, **options: Any) -> Any:
        assert options == {"capture_error_mode": "thread_local"}
        told.append("begin")
        made.recorded = [step]
        yield
        told.append("end")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return told


def test_a_cpu_does_the_step() -> None:
    count = torch.zeros(1)
    again = RecordedStep(lambda: count.add_(1), CPU)
    for _ in range(5):
        again()
    assert count == 5


def test_a_gpu_records_the_third_step_and_replays_it(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    told = recorder(monkeypatch, lambda: done.append("replayed"))
    again = RecordedStep(lambda: done.append("done" if told != ["begin"] else "recorded"), GPU)
    for _ in range(5):
        again()
    assert done == ["done", "done", "recorded", "replayed", "replayed", "replayed"]
    assert told == ["begin", "end"]


def test_what_cannot_be_recorded_is_done_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    told = recorder(monkeypatch, None)

    def step() -> None:
        if told == ["begin"] and len(done) == 2:
            told.append("failed")
            raise RuntimeError("operation not permitted when stream is capturing")
        done.append(1)

    again = RecordedStep(step, GPU)
    for _ in range(5):
        again()
    assert len(done) == 5
    assert told == ["begin", "failed"]  # and not tried again


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


def test_an_exception_of_the_callback_ends_the_search() -> None:
    def cancel(step: Step) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        search(
            torch.zeros(1, 1), lambda t: (t.view(1, 1, 1, 1), t[:, 0], t[:, 0]), lambda g: None,
            start=torch.zeros(1, 1, 1, 1), steps=2, to_masks=lambda S: S, callback=cancel,
        )  # fmt: skip
