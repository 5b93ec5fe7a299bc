"""Many passes without gradients side by side, each on one thread of the processor."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from .classifier import Classifier

Part = TypeVar("Part")
Result = TypeVar("Result")


def threads_for(classifier: Classifier, at_once: int) -> int:
    """Return over how many threads to spread so many images that may be computed at once.

    PyTorch shares each layer of a batch among all threads, who then wait for the slowest, layer by
    layer. With some images for each they need not wait: 1.1 to 1.4 times as fast on two cores. One
    image a thread is no quicker, and a GPU has its own way. Threads that wait in busy loops, as
    OMP_WAIT_POLICY=active has it, would take the processor from those at work (0.7 times as fast).

    Args:
        classifier: At a precision. The untouched network may have hooks that one does not expect
            to be called by two threads at a time, so it gets 1.
        at_once: How many images there is memory for.
    """
    if classifier.device.type != "cpu" or classifier.precision is None or not _own_counts():
        return 1
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "active":
        return 1
    threads = torch.get_num_threads()
    return threads if at_once >= 2 * threads else 1


@cache
def _own_counts() -> bool:
    """Whether `torch.set_num_threads` is about the thread that calls it."""
    return "parallel backend: OpenMP" in torch.__config__.parallel_info()


def in_parallel(
    work: Callable[[Part], Result], parts: Sequence[Part], threads: int
) -> Generator[Result]:
    """Yield `work(part)` for each part, in their order, so many at a time; without gradients.

    Close the iterator (`contextlib.closing`) where it may be left early: parts that have not begun
    are then dropped, and those that have are waited for.
    """
    threads = min(threads, len(parts))
    if threads < 2:
        yield from map(work, parts)
        return
    before = torch.get_num_threads()
    started = threading.Barrier(threads + 1)

    def start() -> None:
        torch.get_num_threads()  # PyTorch sets a thread up when first asked, and would undo this:
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, initializer=start)
    try:
        try:
            results = pool.map(torch.no_grad()(work), parts)
            started.wait()
        except BaseException:  # interrupted: those that wait for the others would wait for ever
            started.abort()
            raise
        torch.set_num_threads(before)  # else threads that start from now on would have one, too
        yield from results
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
