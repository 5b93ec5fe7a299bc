"""`evaluate`: check the arguments, plan what remains to be measured, run it, return the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..datasets import Dataset, of_known_classes
from ..datasets.protocol import check_readable
from ..methods import METHODS
from ..metrics import METRICS
from ..network import Classifier, usual
from ..paths import given_path
from ..registry import check_name, check_seed, whole_number
from . import store
from .job import Job, Task
from .measuring import measure
from .on_ray import on_ray
from .progress import Progress, Tracker
from .settings import describe
from .variants import names, variants

ENGINES = ("local", "ray")


@usual()
def evaluate(
    classifier: Classifier,
    dataset: Dataset,
    methods: Sequence[str] | Mapping[str, Mapping[str, Any]],
    metrics: Sequence[str] = ("AD", "AG", "AI"),
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Progress = True,
    out: str | Path | None = None,
    collect: bool = True,
    engine: str = "local",
    workers: int | None = None,
    num_gpus: float | None = None,
    processes: int | None = None,
) -> pd.DataFrame:
    """Measure methods on a dataset.

    With `out`, rows are written there every few seconds, and the same call, repeated after an
    interruption of any kind, computes only what is missing. Methods and metrics can be added
    later in the same way.

    Args:
        classifier: The network, cut at the layer to explain.
        dataset: Images; those without a target are explained for their predicted class.
        methods: Names of `list_methods()`, or a mapping from labels to *variants*: a method, its
            options, and what else differs, such as `{"opti-cam": {"iterations": 50}, "layer 3":
            {"method": "opti-cam", "layer": "layer3"}}`. Keys of a variant beside the options:
            `method` (default: the label), `layer`, `normalize` (the network's input), `exponent`
            (the mask is raised to it) and `class`, whose map is made: `true` (default), or the
            `first`, `second` or `last` of the network's; measured is always the true class. What
            two variants share is computed once: features, maps that differ in their exponent, and
            all numbers of iterations of Opti-CAM.
        metrics: Names of `list_metrics()`.
        limit: Use this many images, drawn at random. Default: all.
        seed: Of that draw, and of metrics that use random numbers; 0 to 2⁶³ − 1.
        batch_size: Images at a time (the paper times batches of 8).
        options: Variants of methods that were given by their names: a mapping as in `methods`.
        progress: True shows a bar for each method after two seconds; False or None shows nothing.
            Or a function, called with (method, images done, images in all) after each batch.
        out: Folder for the rows (Parquet) and the settings. Default: rows are kept in memory.
        collect: False leaves the rows in `out` and returns none, so that memory does not grow with
            the images: `summarize(out)` makes their table.
        engine: `"local"`, or `"ray"`: workers of the Ray cluster given by the environment variable
            RAY_ADDRESS, or else of one on this machine.
        workers: Threads that decode images, in each process; 0 decodes between the batches.
            Default: 1 for a network on a CPU, 4 on a GPU.
        num_gpus: GPUs of each Ray process; may be a fraction. Default: 1 if the classifier is on
            a GPU, else 0.
        processes: How many Ray processes, each with its own network. Default: as many as the
            cluster has GPUs, or CPUs, for.

    Returns:
        A row for each image, variant and metric, in this order: dataset, image, network, layer,
        method (the variant's label), options (JSON; of a variant all that differs), metric, value,
        target, explained (the class of the map), p, o, seconds (this image's share of its batch, as
        if measured alone), detail (a list, where the metric's average needs more than values),
        error. An image that can't be
        read, has a box outside of it, or on which the network fails, has one row, with the reason
        in error. One on which a variant fails has such a row of this variant.

    Raises:
        ValueError: For unknown names, options or limits, or an `out` that holds another run,
            before anything is computed. If none of about 200 images that are spread over all can
            be read. After it, if no image could be measured with a method. Errors of a network,
            method or metric that fails on a grey image, too, are raised as they are.
        OSError: If the disk is full, or the folder of the images is missing; what was written
            stays valid, and the same call continues from there.
    """
    check_name("engine", engine, ENGINES)
    for name, given in {"num_gpus": num_gpus, "processes": processes}.items():
        if given is not None and engine != "ray":
            raise ValueError(f"{name} is {given}; it is for engine='ray', not {engine!r}")
    if not collect and out is None:
        raise ValueError("collect is False, and out names no folder; the rows would be lost")
    out = None if out is None else given_path(out, "out")
    limit = None if limit is None else whole_number("limit", limit, 1)
    processes = None if processes is None else whole_number("processes", processes, 1)
    gpu = classifier.device.type == "cuda"
    seed = check_seed(seed)
    dataset = of_known_classes(classifier, dataset)
    if not len(dataset):
        raise ValueError(f"{dataset.name} has no images")
    job = Job(
        classifier,
        dataset,
        choose(len(dataset), limit, seed),
        variants(methods, options),
        names("metrics", metrics),
        whole_number("batch_size", batch_size, 1),
        seed,
        whole_number("workers", (4 if gpu else 1) if workers is None else workers, 0),
    )
    _check_fit(job)
    check_readable(dataset, job.chosen)
    with ExitStack() as stack:
        rows = store.Memory()
        if out is not None:
            on_gpu = gpu if num_gpus is None else num_gpus > 0
            settings = describe(job, "cuda" if on_gpu else "cpu")
            rows = stack.enter_context(store.Store(out, settings))
        tasks, done = _plan(job, rows)
        if tasks:
            rows.check_writable()
        shown = stack.enter_context(Tracker(progress, done, len(job.chosen)))
        if engine == "ray" and tasks:
            found = on_ray(job, tasks, num_gpus, processes)
        else:
            found = measure(job, tasks)
        for measured in stack.enter_context(closing(found)):
            rows.add(measured.rows)
            if measured.method is not None:
                shown.update(measured.method, measured.images, measured.seconds)
        rows.flush()
        _check_some(job, rows)
        table = rows.table(store.SCHEMA.names) if collect else store.SCHEMA.empty_table()
    return store.to_frame(table, list(job.variants), job.metrics)


def _check_fit(job: Job) -> None:
    """Raise ValueError for a method that can't explain the network, or a metric without boxes."""
    for label, variant in job.variants.items():
        classifier = job.network(variant)  # an unknown layer raises an error
        reason = METHODS[variant.method].unfit(classifier)
        if reason is not None:
            raise ValueError(f"{label} can't explain {classifier.name}: {reason}")
        if variant.explains == "second" and classifier.classes == 1:
            raise ValueError(f"{label} explains the second class, and {classifier.name} has one")
    for metric in job.metrics:
        reason = lacks(job.dataset, metric)
        if reason is not None:
            raise ValueError(f"{metric} can't be measured on {job.dataset.name}: {reason}")


def lacks(dataset: Dataset, metric: str) -> str | None:
    """Return what a metric needs and a dataset does not have, or None if nothing is missing."""
    if METRICS[metric].needs == "boxes" and not dataset.has_boxes:
        return "it has no boxes"
    return None


def choose(n: int, limit: int | None = None, seed: int = 0) -> list[int]:
    """Return `limit` of n indices in ascending order, drawn at random; all of them for None.

    A fixed stride would miss classes where they alternate. The draw for a smaller limit is a subset
    of the draw for a larger one.
    """
    if limit is None or limit >= n:
        return list(range(n))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:limit].tolist())


def _plan(job: Job, rows: store.Memory) -> tuple[list[Task], dict[str, int]]:
    """Return what is left to measure, and for each method how many images are done."""
    table = rows.table(["position", "method", "metric", "error"])
    measured, failed = store.done(table, len(job.chosen), list(job.variants), job.metrics)
    tasks, done = [], dict.fromkeys(job.variants, 0)
    for batch in job.batches:
        positions = job.positions(batch)
        left = ~np.all(measured[positions], axis=0)  # (methods, metrics)
        wanted = {
            method: list(compress(job.metrics, row))
            for method, row in zip(job.variants, left, strict=True)
            if any(row)
        }
        for method in job.variants:
            done[method] += 0 if method in wanted else len(positions)
        if wanted:
            known = {name: errors.keys() & {*positions} for name, errors in failed.items()}
            tasks.append(Task(batch, wanted, known))
    return tasks, done


def _check_some(job: Job, rows: store.Memory) -> None:
    """Raise ValueError for a method that fails on every image, or if every image is broken."""
    table = rows.table(["position", "method", "metric", "error"])
    _, failed = store.done(table, len(job.chosen), list(job.variants), job.metrics)
    for method in job.variants:
        errors = failed[None] | failed[method]
        if len(errors) >= len(job.chosen):
            by = f" with {method}" if failed[method] else ""
            raise ValueError(
                f"none of the {len(job.chosen)} images of {job.dataset.name} can be measured{by}; "
                f"the first says: {next(iter(errors.values()))}"
            )
