"""Classifier × dataset × methods × metrics → a tidy table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from .classifier import Classifier
from .datasets import Dataset
from .masking import masked_probabilities
from .methods import METHODS, explain
from .metrics import METRICS, drop, gain, increase

# One number an image, in percent, whose mean over the images is the metric.
_PER_IMAGE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "AD": drop,
    "AG": gain,
    "AI": increase,
}


def evaluate(
    classifier: Classifier,
    dataset: Dataset,
    methods: Sequence[str],
    metrics: Sequence[str] = ("AD", "AG", "AI"),
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    options: dict[str, dict[str, Any]] | None = None,
    progress: Callable[[str, int, int], object] | None = None,
) -> pd.DataFrame:
    """Measure methods on a dataset.

    Args:
        classifier: The network, cut at the layer to explain.
        dataset: Images; those without a target are explained for their predicted class.
        methods: Names of `list_methods()`.
        metrics: Names of `list_metrics()`.
        limit: Use this many images, drawn at random. Default: all.
        seed: Of that draw.
        batch_size: Images at a time (the paper times batches of 8).
        options: Options of methods, such as `{"opti-cam": {"iterations": 50}}`.
        progress: Called with (method, images done, images in all) after each batch.

    Returns:
        A row for each image, method and metric: dataset, image, network, layer, method, options
        (JSON), metric, value (percent), target, p, o, seconds (this image's share of its batch).
        The images' order is the dataset's.

    Raises:
        ValueError: For unknown names, options or limits, before anything is computed.
    """
    options = options or {}
    for method in [*methods, *options]:
        METHODS[method].check_options(options.get(method, {}))
    for method in methods:
        reason = METHODS[method].unfit(classifier)
        if reason is not None:
            raise ValueError(f"{method} can't explain {classifier.name}: {reason}")
    for metric in metrics:
        METRICS[metric]
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1, or None for all images")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    rows: list[dict[str, Any]] = []
    chosen = choose(len(dataset), limit, seed)
    for start in range(0, len(chosen), batch_size):
        samples = [dataset[i] for i in chosen[start : start + batch_size]]
        images = torch.stack([s.image for s in samples]).to(classifier.device)
        predicted = classifier.predict(images).tolist()
        targets = torch.tensor(
            [c if s.target is None else s.target for s, c in zip(samples, predicted, strict=True)]
        )
        for method in methods:
            started = _now(classifier)
            masks = explain(method, classifier, images, targets, **options.get(method, {}))
            seconds = (_now(classifier) - started) / len(samples)
            p, o = masked_probabilities(classifier, images, masks, targets)
            for metric in metrics:
                values = 100 * _PER_IMAGE[metric](p, o)
                for i, sample in enumerate(samples):
                    rows.append(
                        {
                            "dataset": dataset.name,
                            "image": sample.id,
                            "network": classifier.name,
                            "layer": classifier.layer,
                            "method": method,
                            "options": json.dumps(options.get(method, {}), default=str),
                            "metric": metric,
                            "value": float(values[i]),
                            "target": int(targets[i]),
                            "p": float(p[i]),
                            "o": float(o[i]),
                            "seconds": seconds,
                        }
                    )
            if progress is not None:
                progress(method, start + len(samples), len(chosen))
    return pd.DataFrame(rows)


def choose(n: int, limit: int | None = None, seed: int = 0) -> list[int]:
    """Return `limit` of n indices in rising order, drawn at random; all of them for None.

    A fixed stride would meet only some classes where they take turns. The draw for a smaller limit
    is part of the draw for a larger one.
    """
    if limit is None or limit >= n:
        return list(range(n))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:limit].tolist())


def summarize(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table like the paper's: a row a method, a column a metric, and `T`.

    Args:
        frame: What `evaluate` returned.

    Returns:
        Index: the methods in their order. Columns: the mean of each metric (percent), and `T`,
        the median seconds per batch of 8 images, so that a first slow batch does not count.
    """
    order = list(dict.fromkeys(frame["method"]))
    metrics = list(dict.fromkeys(frame["metric"]))
    table = frame.pivot_table(index="method", columns="metric", values="value", aggfunc="mean")
    table = table.loc[order, metrics]
    table["T"] = 8 * frame.groupby("method")["seconds"].median()
    table.columns.name = None
    return table


def _now(classifier: Classifier) -> float:
    if classifier.device.type == "cuda":
        torch.cuda.synchronize(classifier.device)
    return time.perf_counter()
