"""Decodes images in threads while the network computes; a broken one becomes an error message."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from ..datasets import Sample
from ..datasets.images import passes
from ..metrics.localization import check_boxes
from .job import Job, Task

Batch = tuple[Task, Iterator[tuple[int, Sample | str]]]
"""A task with position → sample, or why the image can't be measured."""


def load(job: Job, tasks: Iterable[Task]) -> Iterator[Batch]:
    """Yield the batches of `tasks`, in their order, decoded ahead by `job.workers` threads.

    Pillow and torch release the GIL while they decode and resize, so threads are sufficient; and
    unlike processes they work with any dataset, even one defined in a notebook.
    """
    pool = ThreadPoolExecutor(job.workers or 1, thread_name_prefix="decode")
    start = pool.map if job.workers else map  # `map` decodes an image when it is asked for
    ahead = 1 + -(-2 * job.workers // job.batch_size) if job.workers else 0
    waiting: deque[Batch] = deque()
    try:
        for task in tasks:
            readable = [i for i in job.positions(task.batch) if i not in task.failed[None]]
            samples = start(partial(_sample, job), readable)
            waiting.append((task, zip(readable, samples, strict=True)))
            if len(waiting) > ahead:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _sample(job: Job, position: int) -> Sample | str:
    """Return the sample at a position, or a line that says why it can't be measured."""
    try:
        sample = job.dataset[job.chosen[position]]
        job.classifier.check_images(sample.image[None])
        if sample.target is not None:
            job.classifier.check_targets(sample.target, 1)
        # Checked for all metrics: those that are added later must use the same images.
        if job.dataset.has_boxes:
            check_boxes(sample.boxes, *sample.image.shape[1:])
        return sample
    except Exception as error:  # nearly all errors concern this image only
        if passes(error):
            raise
        return " ".join(f"{type(error).__name__}: {error}".split())
