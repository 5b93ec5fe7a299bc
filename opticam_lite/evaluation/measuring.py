"""Explain the images of a batch with every method and measure the masks with every metric."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..datasets import Sample
from ..methods import explain
from ..metrics import METRICS
from ..metrics.registry import Case
from ..network import Classifier
from .job import Job, Measured, Task
from .loading import load
from .settings import plain


class _Group:
    """Images of one size, with what all methods and metrics share."""

    def __init__(self, job: Job, samples: dict[int, Sample]) -> None:
        self.job, self.samples = job, samples
        device = job.classifier.device
        self.images = torch.stack([s.image for s in samples.values()]).to(device)
        started = _now(job.classifier)
        self.classifier = job.classifier.remember(self.images)
        self.seconds = _now(job.classifier) - started
        probabilities = self.probabilities(self.images)
        self.predicted = probabilities.argmax(1)
        given = [-1 if s.target is None else s.target for s in samples.values()]
        true = torch.tensor(given, device=device)
        self.known = true >= 0
        self.targets = torch.where(self.known, true, self.predicted)
        self.p = probabilities.gather(1, self.targets[:, None])[:, 0]

    def probabilities(self, images: Tensor) -> Tensor:
        return self.job.classifier.probabilities(images, batch_size=self.job.batch_size)

    def measure(self, method: str, metrics: list[str]) -> tuple[float, list[dict[str, Any]]]:
        """Return the method's seconds and the rows of all images."""
        options, classifier = self.job.methods[method], self.classifier
        quiet: dict[str, Any] = {"progress": False, "warn": False}

        def explained(images: Tensor, targets: Tensor) -> Tensor:
            size = self.job.batch_size
            return explain(method, classifier, images, targets, batch_size=size, **quiet, **options)

        recalls, started = classifier.recalls, _now(classifier)
        masks = explained(self.images, self.targets)
        seconds = _now(classifier) - started
        if classifier.recalls > recalls:
            seconds += self.seconds  # as if the method had computed the features itself
        o = self.probabilities(self.images * masks).gather(1, self.targets[:, None])[:, 0]
        case = Case(
            classifier=classifier,
            images=self.images,
            targets=self.targets,
            predicted=self.predicted,
            masks=masks,
            p=self.p,
            o=o,
            boxes=[s.boxes for s in self.samples.values()],
            explain=explained,
            seed=self.job.seed,
            known=self.known,
        )
        images = [
            {
                **_about(self.job, position),
                "image": sample.id,
                "method": method,
                "options": json.dumps(plain(options)),
                "target": target,
                "p": p,
                "o": o,
                "seconds": seconds / len(self.samples),
            }
            for (position, sample), target, p, o in zip(
                self.samples.items(), *(x.tolist() for x in (self.targets, self.p, o)), strict=True
            )
        ]
        rows = []
        for name in metrics:
            metric = METRICS[name]
            values = metric.per_image(case).tolist()
            details = metric.detail(case).tolist() if metric.detail else [None] * len(values)
            rows += [
                {**image, "metric": name, "value": value, "detail": detail}
                for image, value, detail in zip(images, values, details, strict=True)
            ]
        return seconds, rows


@torch.inference_mode(False)
@torch.no_grad()
def measure(job: Job, tasks: Iterable[Task]) -> Generator[Measured, None, None]:
    """Yield the rows of each batch: first those of broken images, then method after method.

    Features and unmasked probabilities are computed once and shared by all methods and metrics.
    A method's seconds include the features if it uses them, as if it were alone.
    """
    for task, found in load(job, tasks):
        yield from _measure_batch(job, task, found)


def _measure_batch(
    job: Job, task: Task, found: Iterable[tuple[int, Sample | str]]
) -> Iterator[Measured]:
    n = len(job.positions(task.batch))
    # Images of a dataset mostly have one size; those of other sizes are grouped by it.
    by_shape: dict[tuple[int, ...], dict[int, Sample]] = {}
    errors: list[dict[str, Any]] = []
    for position, sample in found:
        if isinstance(sample, str):
            image = job.dataset.id(job.chosen[position])
            errors.append({**_about(job, position), "image": image, "error": sample})
        else:
            by_shape.setdefault(tuple(sample.image.shape), {})[position] = sample
    if errors:
        yield Measured(None, n, 0.0, errors)
    groups = [_Group(job, samples) for samples in by_shape.values()]
    for method, metrics in task.wanted.items():
        try:
            parts = [group.measure(method, metrics) for group in groups]
        except Exception as error:
            images = ", ".join(s.id for group in groups for s in group.samples.values())
            error.add_note(f"while {method} was measured on the images {images}")
            raise
        seconds = sum(seconds for seconds, _ in parts)
        yield Measured(method, n, seconds, [row for _, rows in parts for row in rows])


def _about(job: Job, position: int) -> dict[str, Any]:
    return {
        "position": position,
        "dataset": job.dataset.name,
        "network": job.classifier.name,
        "layer": job.classifier.layer,
    }


def _now(classifier: Classifier) -> float:
    if classifier.device.type == "cuda":
        torch.cuda.synchronize(classifier.device)
    return time.perf_counter()
