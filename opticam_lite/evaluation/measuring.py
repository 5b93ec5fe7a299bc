"""Explain the images of a batch with every method and measure the masks with every metric."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..datasets import Sample
from ..datasets.images import passes
from ..methods import explain
from ..metrics import METRICS
from ..metrics.registry import Case
from ..network import Classifier
from .digests import plain
from .job import Job, Measured, Task
from .loading import load

T = TypeVar("T")


class _NotFiniteError(ValueError):
    """A network or a method gave NaN or infinity."""


class _Group:
    """Images of one size, with what all methods and metrics share.

    Raises:
        _NotFiniteError: If the network's output is not finite for one of them.
    """

    def __init__(self, job: Job, samples: dict[int, Sample]) -> None:
        self.job, self.samples = job, samples
        device = job.classifier.device
        self.images = torch.stack([s.image for s in samples.values()]).to(device)
        started = _now(job.classifier)
        self.classifier = job.classifier.remember(self.images)
        self.seconds = _now(job.classifier) - started
        probabilities = self.probabilities(self.images)
        _check_finite("the network's output", probabilities)
        self.predicted = probabilities.argmax(1)
        given = [-1 if s.target is None else s.target for s in samples.values()]
        true = torch.tensor(given, device=device)
        self.known = true >= 0
        self.targets = torch.where(self.known, true, self.predicted)
        self.p = probabilities.gather(1, self.targets[:, None])[:, 0]

    def probabilities(self, images: Tensor) -> Tensor:
        return self.job.classifier.probabilities(images, batch_size=self.job.batch_size)

    def measure(
        self, method: str, metrics: list[str], samples: dict[int, Sample]
    ) -> tuple[float, list[dict[str, Any]]]:
        """Return the method's seconds and the rows of these images, some or all of the group's."""
        if samples.keys() != self.samples.keys():
            return _Group(self.job, samples).measure(method, metrics, samples)
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
        _check_finite("the mask", masks)
        probabilities = self.probabilities(self.images * masks)
        _check_finite("the network's output for the masked image", probabilities)
        o = probabilities.gather(1, self.targets[:, None])[:, 0]
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
    groups: list[_Group] = []
    for samples in by_shape.values():
        group, failed = _spare(job, None, partial(_Group, job), samples)
        groups += [group] if group is not None else []
        errors += failed
    if errors:
        yield Measured(None, n, 0.0, errors)
    for method, metrics in task.wanted.items():
        seconds, rows = 0.0, list[dict[str, Any]]()
        for group in groups:
            asked = {i: s for i, s in group.samples.items() if i not in task.failed[method]}
            part, failed = _spare(job, method, partial(group.measure, method, metrics), asked)
            took, measured = part or (0.0, [])
            seconds, rows = seconds + took, rows + failed + measured
        yield Measured(method, n, seconds, rows)


def _spare(
    job: Job,
    method: str | None,
    work: Callable[[dict[int, Sample]], T],
    samples: dict[int, Sample],
) -> tuple[T | None, list[dict[str, Any]]]:
    """Return `work(samples)`, without the images on which it fails, and the error rows of these.

    An error is an image's own if the same work succeeds for another image, or at least for a grey
    one. If not, network, method or options are wrong, and the error is raised.
    """
    who = method or "the network"

    def attempt(samples: dict[int, Sample]) -> tuple[T | None, Exception | None]:
        try:
            return (work(samples) if samples else None), None
        except Exception as error:
            named = ", ".join(sample.id for sample in samples.values())
            error.add_note(f"while {who} was measured on the images {named}")
            if isinstance(error, OSError) or passes(error):  # the disk or the memory, no image
                raise
            return None, error

    result, whole = attempt(samples)
    if whole is None:
        return result, []
    errors = {i: e for i, sample in samples.items() if (e := attempt({i: sample})[1])}
    kept = {i: sample for i, sample in samples.items() if i not in errors}
    grey = Sample("grey", torch.full((3, *job.classifier.size), 0.5), None)
    if not errors or (not kept and attempt({-1: grey})[1]):
        raise whole
    rows = []
    for i, e in errors.items():
        raised = "" if isinstance(e, _NotFiniteError) else f"{who} raised {type(e).__name__}: "
        about = {**_about(job, i), "image": samples[i].id, "method": method}
        rows.append({**about, "error": " ".join(f"{raised}{e}".split())})
    return (work(kept) if kept else None), rows


def _check_finite(what: str, values: Tensor) -> None:
    if not values.isfinite().all():
        raise _NotFiniteError(f"{what} is not finite")


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
