"""A GPU records a step once and replays it; a CPU does it."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

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
