"""Rows → a table like the paper's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ..metrics import METRICS
from ..metrics.registry import mean
from ..paths import given_path
from . import store

ABOUT = ["dataset", "network", "layer"]
DRAWS = 100  # of the bootstrap
COLUMNS = [*ABOUT, "image", "options", "value", "seconds", "detail"]


def summarize(
    rows: pd.DataFrame | str | Path | Sequence[str | Path], errors: bool = False
) -> pd.DataFrame:
    """Return a table like the paper's: a row a method, a column a metric, and `T`.

    Args:
        rows: What `evaluate` returned, or the folder or folders that it wrote to. Several frames
            may be joined by `pd.concat`. Where dataset, network, layer or options differ, they
            become part of the index. So do folders where nothing else distinguishes the runs, such
            as those of two checkpoints.
        errors: Add `AD ±`, …, each metric's standard error over images, and `images`, how many
            were measured. A metric that is no mean over images, such as BA, has it from a
            bootstrap of 100 draws.

    Returns:
        Index: the methods in their order. Columns: each metric's average as the paper defines it,
        and `T`, the median seconds per batch of 8 images, so that a first slow batch does not
        count. If images could not be read, `broken` says how many.

    Raises:
        ValueError: If there are no rows, or two of one image, method and metric in one run.
    """
    frame = rows if isinstance(rows, pd.DataFrame) else _read(rows)
    failed = frame["error"].notna()
    broken, frame = frame[failed], frame[~failed]
    if not len(frame):
        raise ValueError("there are no rows to summarise; evaluate measures some")
    keys = [name for name in [*ABOUT, "folder"] if name in frame and frame[name].nunique() > 1]
    twice = frame.duplicated([*keys, "method", "options", "image", "metric"])
    if twice.any():
        row = frame[twice].iloc[0]
        raise ValueError(
            f"{row['method']} has {row['metric']} twice for the image {row['image']}: these are "
            "rows of two runs, or two images with one id; summarise each run by itself"
        )
    several = frame.groupby([*keys, "method"])["options"].nunique().max() > 1
    index = [*keys, "method", *(["options"] if several else [])]
    table = []
    for key, group in frame.groupby(index, sort=False):
        row = dict(zip(index, key, strict=True)) | _row(group, errors)
        same_run = (broken[keys] == list(key[: len(keys)])).all(axis=1)
        table.append(row | {"broken": broken.loc[same_run, "image"].nunique()})
    measured = list(dict.fromkeys(frame["metric"]))
    columns = [c for m in measured for c in ((m, f"{m} ±") if errors else (m,))]
    columns += ["T", *(["images"] if errors else []), *(["broken"] if len(broken) else [])]
    return pd.DataFrame(table).set_index(index)[columns]


def _read(folders: str | Path | Sequence[str | Path]) -> pd.DataFrame:
    """Return the rows of folders, with the folder's name where nothing else distinguishes them."""
    folders = [folders] if isinstance(folders, str | Path) else folders
    paths = {given_path(folder).resolve(): str(folder) for folder in folders}
    frames = {name: store.read(path, COLUMNS) for path, name in paths.items()}
    if not frames:
        raise ValueError("there are no rows to summarise; name the folder of a run")
    runs = pd.concat([frame[ABOUT].drop_duplicates() for frame in frames.values()])
    if runs.duplicated().any():
        frames = {name: frame.assign(folder=name) for name, frame in frames.items()}
    return pd.concat(frames.values(), ignore_index=True)


def _row(group: pd.DataFrame, errors: bool) -> dict[str, Any]:
    """Return the averages of one method's rows."""
    row: dict[str, Any] = {}
    for metric, of_metric in group.groupby("metric", sort=False):
        # A metric of another session may not be registered here.
        average: Callable[..., float] = METRICS[metric].average if metric in METRICS else mean
        values = torch.tensor(of_metric["value"].to_numpy(float))
        details = None
        if metric in METRICS and METRICS[metric].detail is not None:
            details = torch.tensor([list(d) for d in of_metric["detail"]], dtype=torch.float64)
        row[metric] = float(average(values, details))
        if errors:
            row[f"{metric} ±"] = _error(values, details, average)
    row["T"] = 8 * float(group["seconds"].median())
    row["images"] = group["image"].nunique()
    return row


def _error(values: Tensor, details: Tensor | None, average: Callable[..., float]) -> float:
    """Return the standard error of an average over images, NaN for fewer than two."""
    known = ~values.isnan()
    values, n = values[known], int(known.sum())
    if n < 2:
        return math.nan
    if details is None:
        return float(values.std()) / math.sqrt(n)
    details = details[known]
    drawn = torch.randint(n, (DRAWS, n), generator=torch.Generator().manual_seed(0))
    return float(torch.tensor([average(values[i], details[i]) for i in drawn]).std())
