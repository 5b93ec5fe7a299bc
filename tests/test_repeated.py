"""A step that is repeated: as usual on a CPU, from a recording on a GPU."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from opticam_lite.methods.repeated import Found, Repeated

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
    again = Repeated(lambda: count.add_(1), CPU)
    for _ in range(5):
        again()
    assert count == 5


def test_a_gpu_records_the_third_step_and_replays_it(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    told = recorder(monkeypatch, lambda: done.append("replayed"))
    again = Repeated(lambda: done.append("done" if told != ["begin"] else "recorded"), GPU)
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

    again = Repeated(step, GPU)
    for _ in range(5):
        again()
    assert len(done) == 5
    assert told == ["begin", "failed"]  # and not tried again


def test_the_best_is_kept() -> None:
    S = torch.zeros(2, 1, 1, 1)
    found = Found.at(S)
    for F in ([1.0, 5.0], [3.0, 4.0], [2.0, float("nan")]):
        found.keep(torch.tensor(F).view(2, 1, 1, 1), torch.tensor(F))
    assert found.F_best.tolist() == [3, 5]
    assert found.S_best.flatten().tolist() == [3, 5]
    assert found.F[0] == found.S[0] == 2
    assert not S.any()  # the start is not changed
