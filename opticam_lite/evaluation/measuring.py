"""Explain the images of a batch with every method and measure the masks with every metric."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..datasets import Sample
from ..methods import explain
from ..metrics import METRICS
from ..metrics.registry import Case
from ..network import Classifier
from .job import Job, Measured
from .loading import Loaded
from .settings import plain


class _Group:
    """Images of one size, with what all methods and metrics share."""

    def __init__(self, job: Job, samples: dict[int, Sample]) -> None:
        self.job, self.samples = job, samples
        self.images = torch.stack([s.image for s in samples.values()]).to(job.classifier.device)
        started = _now(job.classifier)
        self.classifier = job.classifier.remember(self.images)
        self.seconds = _now(job.classifier) - started
        probabilities = self.probabilities(self.images)
        self.predicted = probabilities.argmax(1)
        known = [s.target for s in samples.values()]
        targets = [
            c if t is None else t for t, c in zip(known, self.predicted.tolist(), strict=True)
        ]
        self.targets = torch.tensor(targets, device=self.images.device)
        self.known = torch.tensor([t is not None for t in known], device=self.images.device)
        self.p = probabilities.gather(1, self.targets[:, None])[:, 0]

    def probabilities(self, images: Tensor) -> Tensor:
        return self.job.classifier.probabilities(images, batch_size=self.job.batch_size)

    def measure(self, method: str, metrics: list[str]) -> tuple[float, list[dict[str, Any]]]:
        """Return the method's seconds and the rows of all images."""
        options, classifier = self.job.methods[method], self.classifier

        def explained(images: Tensor, targets: Tensor) -> Tensor:
            size = self.job.batch_size
            return explain(
                method, classifier, images, targets, batch_size=size, progress=False, **options
            )

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
        values = {name: METRICS[name].per_image(case).tolist() for name in metrics}
        details = {
            name: detail(case).tolist()
            for name in metrics
            if (detail := METRICS[name].detail) is not None
        }
        known = zip(
            self.samples.items(), self.targets.tolist(), self.p.tolist(), o.tolist(), strict=True
        )
        rows = [
            {
                **_about(self.job, position),
                "image": sample.id,
                "method": method,
                "options": json.dumps(plain(options)),
                "metric": name,
                "value": values[name][i],
                "target": target,
                "p": p_i,
                "o": o_i,
                "seconds": seconds / len(self.samples),
                "detail": details[name][i] if name in details else None,
                "error": None,
            }
            for i, ((position, sample), target, p_i, o_i) in enumerate(known)
            for name in metrics
        ]
        return seconds, rows


@torch.inference_mode(False)
@torch.no_grad()
def measure(job: Job, loaded: Loaded) -> Iterator[Measured]:
    """Yield the rows of a batch: first those of broken images, then method after method.

    Features and unmasked probabilities are computed once and shared by all methods and metrics.
    A method's seconds include the features if it uses them, as if it were alone.
    """
    n = len(job.positions(loaded.task.batch))
    if loaded.errors:
        rows = [_error_row(job, i, text) for i, text in loaded.errors.items()]
        yield Measured(None, n, 0.0, rows)
    # Images of a dataset mostly have one size; where they don't, those of equal size go together.
    by_shape: dict[tuple[int, ...], dict[int, Sample]] = {}
    for position, sample in loaded.samples.items():
        by_shape.setdefault(tuple(sample.image.shape), {})[position] = sample
    groups = [_Group(job, samples) for samples in by_shape.values()]
    for method, metrics in loaded.task.wanted.items():
        try:
            parts = [group.measure(method, metrics) for group in groups]
        except Exception as error:
            images = ", ".join(s.id for s in loaded.samples.values())
            error.add_note(f"while {method} was measured on the images {images}")
            raise
        yield Measured(
            method, n, sum(seconds for seconds, _ in parts), [r for _, rows in parts for r in rows]
        )


def _about(job: Job, position: int) -> dict[str, Any]:
    return {
        "position": position,
        "dataset": job.dataset.name,
        "network": job.classifier.name,
        "layer": job.classifier.layer,
    }


def _error_row(job: Job, position: int, text: str) -> dict[str, Any]:
    image = job.dataset.id(job.chosen[position])
    return {**_about(job, position), "image": image, "error": text}


def _now(classifier: Classifier) -> float:
    if classifier.device.type == "cuda":
        torch.cuda.synchronize(classifier.device)
    return time.perf_counter()
