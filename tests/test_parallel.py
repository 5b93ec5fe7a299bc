"""Passes side by side: the same results, in order, and the processor's threads as they were."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch
from conftest import make_classifier, make_images
from torch import Tensor

import opticam_lite as ol
from opticam_lite import parallel
from opticam_lite.parallel import in_parallel, threads_for


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def count_of_a_new_thread() -> int:
    counts: list[int] = []

    def ask() -> None:
        torch.ones(2) + 1  # PyTorch sets a thread up at its first work
        torch.rand(300, 300) @ torch.rand(300, 300)
        counts.append(torch.get_num_threads())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return counts[0]


def test_results_come_in_order_from_threads_that_work_at_the_same_time() -> None:
    together = threading.Barrier(2)

    def work(part: int) -> tuple[int, int, bool]:
        together.wait(timeout=30)  # breaks unless two are at work
        return part, torch.get_num_threads(), torch.is_grad_enabled()

    with closing(in_parallel(work, range(6), 2)) as results:
        first = next(results)
        assert torch.get_num_threads() == 2
        assert count_of_a_new_thread() == 2  # while others are at work with one
        assert [first, *results] == [(i, 1, False) for i in range(6)]
    assert torch.get_num_threads() == 2
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("parts", "threads"), [(3, 1), (1, 2), (0, 2)])
def test_what_is_not_for_several_threads_stays_in_this_one(parts: int, threads: int) -> None:
    def work(part: int) -> tuple[int, threading.Thread]:
        return part, threading.current_thread()

    here = threading.current_thread()
    assert list(in_parallel(work, range(parts), threads)) == [(i, here) for i in range(parts)]


def test_who_leaves_early_waits_only_for_what_has_begun() -> None:
    begun: list[int] = []
    go_on = threading.Event()

    def work(part: int) -> int:
        begun.append(part)
        if part > 0:
            go_on.wait(timeout=30)
        return part

    before = threading.active_count()
    with closing(in_parallel(work, range(100), 2)) as results:
        assert next(results) == 0
        threading.Timer(0.2, go_on.set).start()
    assert len(begun) <= 4
    assert torch.get_num_threads() == 2
    assert threading.active_count() <= before + 1  # the timer may still end


def test_an_interrupt_while_threads_start_leaves_none_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Interrupted(threading.Barrier):
        def wait(self, timeout: float | None = None) -> int:
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            return super().wait(timeout)

    before = threading.active_count()
    monkeypatch.setattr(threading, "Barrier", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(in_parallel(abs, range(4), 2))
    assert threading.active_count() == before
    assert torch.get_num_threads() == count_of_a_new_thread() == 2


def test_an_error_within_is_raised_here() -> None:
    def work(part: int) -> int:
        if part == 2:
            raise ValueError("part 2")
        return part

    with pytest.raises(ValueError, match="part 2"):
        list(in_parallel(work, range(50), 2))
    assert torch.get_num_threads() == count_of_a_new_thread() == 2


def test_threads_are_for_quick_networks_on_a_cpu_and_enough_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    classifier = make_classifier("cnn")
    quick = classifier.at_precision("float32")
    assert [threads_for(quick, n) for n in (1, 3, 4, 100)] == [1, 1, 2, 2]
    assert threads_for(classifier, 100) == 1  # it may have hooks of the user's
    with monkeypatch.context() as patch:
        patch.setattr(quick, "device", torch.device("cuda"))
        assert threads_for(quick, 100) == 1
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "_own_counts", lambda: False)
        assert threads_for(quick, 100) == 1
    with monkeypatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "ACTIVE")
        assert threads_for(quick, 100) == 1
    assert threads_for(quick, 100) == 2
    torch.set_num_threads(1)
    assert threads_for(quick, 100) == 1


def score_cam(classifier: ol.Classifier, images: Tensor) -> Tensor:
    return ol.explain("score-cam", classifier, images, [0, 1], chunk=8, progress=False)


def lime(classifier: ol.Classifier, images: Tensor) -> Tensor:
    options: dict[str, Any] = {"samples": 50, "chunk": 8}
    return ol.explain("lime", classifier, images[:1], [0], progress=False, **options)


def deletion(classifier: ol.Classifier, images: Tensor) -> Tensor:
    masks = images.mean(1, keepdim=True)
    return ol.metrics.curves.deletion(classifier, images, masks, [0, 1], batch_size=8).values


@pytest.mark.parametrize("function", [score_cam, lime, deletion])
def test_several_threads_find_the_same(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, images = make_classifier("cnn"), make_images(2)
    run, names = ol.Classifier._run, set[str]()

    def watched(self: ol.Classifier, x: Tensor) -> Tensor:
        if self.precision is not None:
            names.add(threading.current_thread().name)
            assert len(x) <= 4  # half of a batch
        return run(self, x)

    torch.set_num_threads(1)
    expected = function(classifier, images)
    monkeypatch.setattr(ol.Classifier, "_run", watched)
    torch.set_num_threads(2)
    found = function(classifier, images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found, function(classifier, images))
    assert names
    assert threading.main_thread().name not in names
