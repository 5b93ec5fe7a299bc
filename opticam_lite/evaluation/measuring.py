"""Explain the images of a batch by every variant and measure the masks with every metric."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..datasets import Sample
from ..datasets.images import passes
from ..methods import Step, explain
from ..metrics import METRICS
from ..metrics.registry import Case
from ..network import Classifier
from .job import Job, Measured, Task
from .loading import load
from .variants import RANKS, Variant

T = TypeVar("T")


class _NotFiniteError(ValueError):
    """A network or a method gave NaN or infinity."""


class _View:
    """What a network, cut at a layer, says of images: shared by all variants that explain it.

    Raises:
        _NotFiniteError: If the network's output is not finite for one of the images.
    """

    def __init__(self, classifier: Classifier, images: Tensor, true: Tensor) -> None:
        started = _now(classifier)
        self.classifier, self.logits = classifier.remembering(images)
        self.seconds = _now(classifier) - started
        probabilities = classifier.to_probabilities(self.logits)
        _check_finite("the network's output", probabilities)
        self.predicted = probabilities.argmax(1)
        self.targets = torch.where(true >= 0, true, self.predicted)
        self.p = probabilities.gather(1, self.targets[:, None])[:, 0]

    def explained(self, which: str) -> Tensor:
        """Return the class of each image that is explained, `(N,)`."""
        if which == "true":
            return self.targets
        return self.logits.argsort(stable=True, dim=1, descending=True)[:, RANKS[which]]


class _Group:
    """Images of one size, with what all variants and metrics share.

    Args:
        job: What is measured.
        labels: Of the variants that are still to be measured.
        samples: Position → image.

    Raises:
        _NotFiniteError: If the network's output is not finite for one of them.
    """

    def __init__(self, job: Job, labels: Sequence[str], samples: dict[int, Sample]) -> None:
        self.job, self.labels, self.samples = job, labels, samples
        device = job.classifier.device
        self.images = torch.stack([s.image for s in samples.values()]).to(device)
        given = [-1 if s.target is None else s.target for s in samples.values()]
        self.true = torch.tensor(given, device=device)
        self._views = {job.classifier: _View(job.classifier, self.images, self.true)}
        self._runs: dict[str, dict[int | None, tuple[Tensor, float]]] = {}

    def view(self, variant: Variant) -> _View:
        network = self.job.network(variant)
        if network not in self._views:
            self._views[network] = _View(network, self.images, self.true)
        return self._views[network]

    def masks(self, variant: Variant) -> tuple[Tensor, float]:
        """Return a variant's masks, before they are raised to its exponent, and their seconds."""
        if variant.run not in self._runs:
            known = self.job.variants
            same = [known[label] for label in self.labels if known[label].run == variant.run]
            self._runs[variant.run] = self._run({v.iterations: v for v in [*same, variant]})
        return self._runs[variant.run][variant.iterations]

    def _run(self, wanted: dict[int | None, Variant]) -> dict[int | None, tuple[Tensor, float]]:
        """Run a method once; return masks and seconds for each of the wanted iterations."""
        longest = wanted[max(wanted, key=lambda count: count or 0)]
        view, options = self.view(longest), {}
        recalls, started = view.classifier.recalls, _now(view.classifier)
        shorter = _Shorter(wanted.keys() - {longest.iterations}, view.classifier)
        if shorter.wanted:
            options["callback"] = shorter
        targets = view.explained(longest.explains)
        masks = self._explain(longest, view, self.images, targets, **options)
        # As if the method had computed the features itself.
        own = view.seconds if view.classifier.recalls > recalls else 0.0
        seconds = _now(view.classifier) - started + own
        found: dict[int | None, tuple[Tensor, float]] = dict.fromkeys(wanted, (masks, seconds))
        return found | {t: (m, s - started + own) for t, (m, s) in shorter.found.items()}

    def _explain(
        self, variant: Variant, view: _View, images: Tensor, targets: Tensor, **more: Any
    ) -> Tensor:
        more |= {"batch_size": self.job.batch_size, "progress": False, "warn": False}
        return explain(
            variant.method, view.classifier, images, targets, **{**variant.options, **more}
        )

    def measure(
        self, label: str, metrics: list[str], samples: dict[int, Sample]
    ) -> tuple[float, list[dict[str, Any]]]:
        """Return a variant's seconds and the rows of these images, some or all of the group's."""
        if samples.keys() != self.samples.keys():
            return _Group(self.job, self.labels, samples).measure(label, metrics, samples)
        variant = self.job.variants[label]
        view = self.view(variant)
        classes, others = view.explained(variant.explains), variant.explains != "true"

        def explained(images: Tensor, targets: Tensor) -> Tensor:
            masks = self._explain(variant, view, images, classes if others else targets)
            return masks**variant.exponent

        masks, seconds = self.masks(variant)
        masks = masks**variant.exponent
        _check_finite("the mask", masks)
        probabilities = view.classifier.probabilities(
            self.images * masks, batch_size=self.job.batch_size
        )
        _check_finite("the network's output for the masked image", probabilities)
        o = probabilities.gather(1, view.targets[:, None])[:, 0]
        case = Case(
            classifier=view.classifier,
            images=self.images,
            targets=view.targets,
            predicted=view.predicted,
            masks=masks,
            p=view.p,
            o=o,
            boxes=[s.boxes for s in self.samples.values()],
            explain=explained,
            seed=self.job.seed,
            known=self.true >= 0,
            others=others,
        )
        images = [
            {
                **_about(self.job, position, label),
                "image": sample.id,
                "options": json.dumps(variant.settings),
                "target": target,
                "explained": explained_class,
                "p": p,
                "o": o,
                "seconds": seconds / len(self.samples),
            }
            for (position, sample), target, explained_class, p, o in zip(
                self.samples.items(),
                *(x.tolist() for x in (view.targets, classes, view.p, o)),
                strict=True,
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


class _Shorter:
    """Takes from a run the masks that runs of fewer steps would have given.

    They are those of the largest objective seen. Step t + 1 evaluates where t steps have led. What
    `found` lacks at the end is what a run had when it stopped because nothing changed any more.

    Args:
        wanted: Numbers of steps.
        classifier: The network.
    """

    def __init__(self, wanted: Collection[int | None], classifier: Classifier) -> None:
        self.wanted, self.classifier = wanted, classifier
        self.found: dict[int | None, tuple[Tensor, float]] = {}

    def __call__(self, step: Step) -> None:
        F, S = step.objective, step.saliency
        assert F is not None
        assert S is not None
        assert step.to_masks is not None
        if step.index == 1:
            self.F, self.S = torch.full_like(F, -math.inf), S
        better = self.F < F
        self.F, self.S = F.where(better, self.F), S.where(better[:, None, None, None], self.S)
        if step.index - 1 in self.wanted:
            self.found[step.index - 1] = step.to_masks(self.S), _now(self.classifier)


@torch.inference_mode(False)
@torch.no_grad()
def measure(job: Job, tasks: Iterable[Task]) -> Generator[Measured, None, None]:
    """Yield the rows of each batch: first those of broken images, then variant after variant.

    Features and unmasked probabilities are computed once and shared by all variants and metrics.
    A variant's seconds include all that it would need if it were alone.
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
            errors.append({**_about(job, position, None), "image": image, "error": sample})
        else:
            by_shape.setdefault(tuple(sample.image.shape), {})[position] = sample
    groups: list[_Group] = []
    for samples in by_shape.values():
        group, failed = _spare(job, None, partial(_Group, job, list(task.wanted)), samples)
        groups += [group] if group is not None else []
        errors += failed
    if errors:
        yield Measured(None, n, 0.0, errors)
    for label, metrics in task.wanted.items():
        seconds, rows = 0.0, list[dict[str, Any]]()
        for group in groups:
            asked = {i: s for i, s in group.samples.items() if i not in task.failed[label]}
            part, failed = _spare(job, label, partial(group.measure, label, metrics), asked)
            took, measured = part or (0.0, [])
            seconds, rows = seconds + took, rows + failed + measured
        yield Measured(label, n, seconds, rows)


def _spare(
    job: Job,
    label: str | None,
    work: Callable[[dict[int, Sample]], T],
    samples: dict[int, Sample],
) -> tuple[T | None, list[dict[str, Any]]]:
    """Return `work(samples)`, without the images on which it fails, and the error rows of these.

    An error is an image's own if the same work succeeds for another image, or at least for a grey
    one. If not, network, variant or options are wrong, and the error is raised.
    """
    who = label or "the network"

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
        about = {**_about(job, i, label), "image": samples[i].id}
        rows.append({**about, "error": " ".join(f"{raised}{e}".split())})
    return (work(kept) if kept else None), rows


def _check_finite(what: str, values: Tensor) -> None:
    if not values.isfinite().all():
        raise _NotFiniteError(f"{what} is not finite")


def _about(job: Job, position: int, label: str | None) -> dict[str, Any]:
    network = job.classifier if label is None else job.network(job.variants[label])
    return {
        "position": position,
        "dataset": job.dataset.name,
        "network": network.name,
        "layer": network.layer,
        "method": label,
    }


def _now(classifier: Classifier) -> float:
    if classifier.device.type == "cuda":
        torch.cuda.synchronize(classifier.device)
    return time.perf_counter()
