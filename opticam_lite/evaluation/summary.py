"""From rows to a table like the paper's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from ..metrics import METRICS
from . import store

ABOUT = ["dataset", "network", "layer"]
COLUMNS = [*ABOUT, "image", "options", "value", "seconds", "detail"]


def summarize(
    rows: pd.DataFrame | str | Path | Sequence[str | Path], errors: bool = False
) -> pd.DataFrame:
    """Return a table like the paper's: a row a method, a column a metric, and `T`.

    Args:
        rows: What `evaluate` returned, or the folder or folders that it wrote to. Several frames
            may be joined by `pd.concat`. Where dataset, network, layer or options differ, they
            become part of the index.
        errors: Add `AD ±`, …, the standard error over images of each metric's values, and
            `images`, how many were measured.

    Returns:
        Index: the methods in their order. Columns: each metric's average as the paper defines it,
        and `T`, the median seconds per batch of 8 images, so that a first slow batch does not
        count. If images could not be read, `broken` says how many.

    Raises:
        ValueError: If there are no rows.
    """
    if isinstance(rows, pd.DataFrame):
        frame = rows
    else:
        folders = [rows] if isinstance(rows, str | Path) else rows
        frame = pd.concat([store.read(f, COLUMNS) for f in folders], ignore_index=True)
    if "error" in frame:
        broken = frame[frame["error"].notna()]
        frame = frame[frame["error"].isna()]
    else:
        broken = frame[:0]
    if not len(frame):
        raise ValueError("there are no rows to summarise; evaluate measures some")
    keys = [name for name in ABOUT if frame[name].nunique() > 1]
    several = frame.groupby([*keys, "method"])["options"].nunique().max() > 1
    index = [*keys, "method", *(["options"] if several else [])]
    table = {}
    for key, group in frame.groupby(index, sort=False):
        table[key] = _row(group, errors)
        if len(broken):
            same = broken
            for name, value in zip(keys, key, strict=False):
                same = same[same[name] == value]
            table[key]["broken"] = same["image"].nunique()
    found = pd.DataFrame.from_dict(table, orient="index")
    if len(index) > 1:
        found.index = pd.MultiIndex.from_tuples(list(table), names=index)
    else:
        found.index = pd.Index([method for (method,) in table], name="method")
    measured = list(dict.fromkeys(frame["metric"]))
    columns = [c for m in measured for c in ((m, f"{m} ±") if errors else (m,))]
    columns += ["T", *(["images"] if errors else []), *(["broken"] if len(broken) else [])]
    return found[columns]


def _row(group: pd.DataFrame, errors: bool) -> dict[str, float]:
    """Return the averages of one method's rows."""
    row: dict[str, float] = {}
    for metric, of_metric in group.groupby("metric", sort=False):
        values = torch.tensor(of_metric["value"].to_numpy(float))
        details = None
        if metric in METRICS and METRICS[metric].detail is not None:
            details = torch.tensor([list(d) for d in of_metric["detail"]], dtype=torch.float64)
        average = METRICS[metric].average if metric in METRICS else lambda v, d: v.nanmean()
        row[str(metric)] = float(average(values, details))
        known = values[~values.isnan()]
        n = len(known)
        row[f"{metric} ±"] = float(known.std()) / math.sqrt(n) if n > 1 else math.nan
    row["T"] = 8 * float(group["seconds"].median())
    row["images"] = group["image"].nunique()
    return row
