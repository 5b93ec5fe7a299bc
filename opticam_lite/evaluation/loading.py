"""Images are decoded in threads while the network computes; a broken one becomes an error."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from ..datasets import Sample
from ..datasets.images import SourceError
from ..metrics.localization import check_boxes
from .job import Job, Task

# The system's, not the file's: too many open files, no memory, a place on the network that is gone.
PASSING = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT}
)


@dataclass(frozen=True)
class Loaded:
    """A batch in memory: position → sample, and position → why it can't be measured."""

    task: Task
    samples: dict[int, Sample]
    errors: dict[int, str]


def load(job: Job, tasks: Iterable[Task]) -> Iterator[Loaded]:
    """Yield the batches of `tasks`, in their order, decoded ahead by `job.workers` threads.

    Pillow and torch let other threads run while they decode and resize, so threads are enough; and
    they take any dataset, one defined in a notebook, too.
    """
    if not job.workers:
        for task in tasks:
            yield _gather(task, {i: _sample(job, i) for i in _readable(job, task)})
        return
    ahead = 1 + -(-2 * job.workers // job.batch_size)
    waiting: deque[tuple[Task, dict[int, Future[Sample | str]]]] = deque()
    pool = ThreadPoolExecutor(job.workers, thread_name_prefix="decode")
    try:
        for task in tasks:
            waiting.append((task, {i: pool.submit(_sample, job, i) for i in _readable(job, task)}))
            if len(waiting) > ahead:
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _readable(job: Job, task: Task) -> list[int]:
    return [i for i in job.positions(task.batch) if i not in task.broken]


def _result(task: Task, futures: dict[int, Future[Sample | str]]) -> Loaded:
    return _gather(task, {i: future.result() for i, future in futures.items()})


def _gather(task: Task, found: dict[int, Sample | str]) -> Loaded:
    samples = {i: s for i, s in found.items() if isinstance(s, Sample)}
    return Loaded(task, samples, {i: s for i, s in found.items() if isinstance(s, str)})


def _sample(job: Job, position: int) -> Sample | str:
    """Return the sample at a position, or in one line why it can't be measured."""
    try:
        sample = job.dataset[job.chosen[position]]
        job.classifier.check_images(sample.image[None])
        if sample.target is not None:
            job.classifier.check_targets(sample.target, 1)
        # Whatever the metrics are: those that are added later shall find the same images.
        if job.dataset.has_boxes:
            check_boxes(sample.boxes, *sample.image.shape[1:])
        return sample
    except Exception as error:  # nearly all are this image's fault and stop no other
        if _passes(error):
            raise
        return " ".join(f"{type(error).__name__}: {error}".split())


def _passes(error: BaseException) -> bool:
    """Whether an error may be gone when the image is read again: it must not count as broken."""
    return any(
        isinstance(e, MemoryError | SourceError) or (isinstance(e, OSError) and e.errno in PASSING)
        for e in (error, error.__cause__)
    )
