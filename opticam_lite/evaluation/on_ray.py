"""The same evaluation by workers of a Ray cluster, each with its own copy of the network.

The driver distributes batches and writes the results; workers have no state. If a worker fails,
only the batches of its last call are lost, and another worker repeats them.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..network import Classifier
from .job import Job, Measured, Task
from .measuring import measure

if TYPE_CHECKING:
    from types import ModuleType

SECONDS_A_CALL = 5.0
LOSSES = 3  # after so many failed workers a batch is considered the cause
NO_BATCH = -1


class Worker:
    """Measures batches in a separate process.

    Args:
        job: Its network is moved to the GPU that Ray assigns, if any.
        gpu: Whether it assigns one.
    """

    def __init__(self, job: Job, gpu: bool) -> None:
        if gpu and job.classifier.device.type == "cpu":
            arguments = {**job.classifier.rebuild_arguments(), "device": "cuda", "copy": False}
            job = replace(job, classifier=Classifier(**arguments))
        self._job = job

    def ready(self) -> None:
        """Return once the network is loaded."""

    def measure(self, tasks: Sequence[Task]) -> tuple[list[Measured], float]:
        """Return what was measured, and the seconds it took."""
        started = time.monotonic()
        return list(measure(self._job, tasks)), time.monotonic() - started


def on_ray(
    job: Job, tasks: Sequence[Task], num_gpus: float | None = None, processes: int | None = None
) -> Generator[Measured, None, None]:
    """Measure the tasks on a cluster; results are yielded when they are ready, not in order.

    Args:
        job: What to measure.
        tasks: What is left of it.
        num_gpus: GPUs of each worker. Default: 1 if the network is on one, else 0.
        processes: How many workers. Default: as many as the cluster has GPUs, or CPUs, for.

    Raises:
        ImportError: If Ray is not installed.
        ConnectionError: If it can't start, or there is no such cluster.
        ValueError: If the cluster has too few GPUs, or the dataset can't be sent to it.
        RuntimeError: If one worker after another fails with the same batches.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            "engine='ray' needs Ray, which is not installed: pip install 'opticam-lite[ray]'"
        ) from error
    if num_gpus is None:
        num_gpus = 0.0 if job.classifier.device.type == "cpu" else 1.0
    with _cluster(ray):
        has = ray.cluster_resources()
        fitting = int(has.get("GPU", 0) / num_gpus) if num_gpus else int(has.get("CPU", 1))
        if fitting < 1:
            raise ValueError(
                f"num_gpus is {num_gpus:g}, and the Ray cluster has {has.get('GPU', 0):g} GPUs; "
                "start it with GPUs, or pass num_gpus=0"
            )
        count = min(processes or fitting, fitting, len(tasks))
        try:
            sent = ray.put(job)
        except Exception as error:
            raise ValueError(
                f"{job.dataset.name} or {job.classifier.name} can't be sent to Ray's workers "
                f"({type(error).__name__}: {error}); make them of classes that can be pickled"
            ) from error
        start = ray.remote(Worker).options(num_gpus=num_gpus, num_cpus=1).remote
        yield from _drive(ray, lambda: start(sent, num_gpus > 0), count, tasks)


def _drive(ray: ModuleType, start: Any, count: int, tasks: Sequence[Task]) -> Iterator[Measured]:
    """Distribute the tasks and yield the results, those of each task once."""
    waiting, lost = deque(tasks), Counter[int]()
    seconds_a_task = SECONDS_A_CALL  # so the first call has one batch
    asked: dict[Any, tuple[Any, list[Task]]] = {}  # call → worker, its tasks

    def begin() -> None:
        worker = start()
        asked[worker.ready.remote()] = worker, []

    for _ in range(count):
        begin()
    while waiting or any(chunk for _, chunk in asked.values()):
        (call,), _ = ray.wait(list(asked), num_returns=1)
        worker, given = asked.pop(call)
        try:
            result = ray.get(call)
        except ray.exceptions.RayTaskError as error:
            # An error of the method is raised itself, with Ray's error as its cause.
            raise (error.cause if isinstance(error.cause, Exception) else error) from error
        except ray.exceptions.RayError as error:
            if getattr(error, "actor_init_failed", False):
                raise RuntimeError(f"Ray's workers can't start: {error}") from error
            lost.update([task.batch for task in given] or [NO_BATCH])
            if max(lost.values()) >= LOSSES:
                what = f"batch {given[0].batch} lost" if given else "while starting, Ray lost"
                raise RuntimeError(
                    f"{what} {LOSSES} workers, one after the other ({error}); perhaps they had too "
                    "little memory: try a smaller batch_size or fewer processes"
                ) from error
            waiting.extendleft(reversed(given))
            begin()
            continue
        if given:
            measured, seconds = result
            seconds_a_task = seconds / len(given)
            yield from measured
        # Calls of a few seconds, and shorter ones towards the end, so that workers finish together.
        size = min(SECONDS_A_CALL / max(seconds_a_task, 1e-3), len(waiting) / (2 * count))
        chunk = [waiting.popleft() for _ in range(min(max(1, int(size)), len(waiting)))]
        if chunk:
            asked[worker.measure.remote(chunk)] = worker, chunk
    for worker, _ in asked.values():
        ray.kill(worker)


@contextmanager
def _cluster(ray: ModuleType) -> Iterator[None]:
    """Join the running cluster (RAY_ADDRESS), or start one on this machine for this run."""
    if ray.is_initialized():
        yield
        return
    address, handler = os.environ.get("RAY_ADDRESS"), signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address or "local",
            include_dashboard=None if address else False,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except Exception as error:
        what = f"no Ray cluster at {address!r}" if address else "Ray can't start here"
        raise ConnectionError(
            f"{what} ({' '.join(str(error).split())}); try again, or use engine='local'"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray sets one of its own
    try:
        yield
    finally:
        ray.shutdown()
