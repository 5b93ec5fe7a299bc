"""Rows → a table like the paper's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ..metrics import METRICS
from ..metrics.registry import mean
from ..paths import given_path
from ..registry import unknown_name
from . import store
from .intervals import ENDS, FEWEST, interval, interval_of_average, redrawn, surely_better

ABOUT = ["dataset", "network", "layer"]
ERRORS = (" ±", " low", " high", " best")  # columns beside a metric's own
COLUMNS = [*ABOUT, "image", "options", "value", "seconds", "detail"]


def summarize(
    rows: pd.DataFrame | str | Path | Sequence[str | Path],
    errors: bool = False,
    *,
    methods: Iterable[str] | None = None,
    common: bool = True,
) -> pd.DataFrame:
    """Return a table like the paper's: a row a method, a column a metric, and `T`.

    Args:
        rows: What `evaluate` returned, or the folder or folders that it wrote to. Several frames
            may be joined by `pd.concat`. Where dataset, network, layer or options differ between
            runs, they become part of the index. So do folders where nothing else distinguishes
            the runs, such as those of two checkpoints.
        errors: Add how sure each average is: `AD ±`, …, the standard error over images (of a
            metric that is no mean over images, such as BA, from a bootstrap); `AD low` and `AD
            high`, the 95 % interval (see `evaluation/intervals.py`); `AD best`, whether the method
            is better than each of the others, Fake-CAM aside, by an interval of their paired
            difference that is above 0; and `images`, how many were measured.
        methods: Those that are shown, in their order. Default: all of the rows.
        common: Average over the images of a dataset that all rows of the table have; a warning
            says which have more. False averages each over the images that it has.

    Returns:
        Index: the methods in their order. Columns: each metric's average as the paper defines it,
        and `T`, the median seconds per batch of 8 images, so that a first slow batch does not
        count. If images were broken, or a method failed on some, `broken` says on how many.

    Raises:
        ValueError: If there are no rows, or none of a method, or two of one image, method and
            metric in one run, or no image that all methods have.
    """
    frame = rows if isinstance(rows, pd.DataFrame) else _read(rows)
    failed = frame["error"].notna()
    broken, frame = frame[failed], frame[~failed]
    if methods is not None:
        frame = pd.concat(_of_method(frame, method) for method in dict.fromkeys(methods))
    if not len(frame):
        raise ValueError("there are no rows to summarise; evaluate measures some")
    # A variant's own layer is told by its label; only layers of whole runs tell rows apart.
    runs = frame[~frame["options"].str.contains('"layer":')] if "options" in frame else frame
    of = {name: runs if name == "layer" else frame for name in [*ABOUT, "folder"] if name in frame}
    keys = [name for name, rows in of.items() if rows[name].nunique() > 1]
    twice = frame.duplicated([*keys, "method", "options", "image", "metric"])
    if twice.any():
        row = frame[twice].iloc[0]
        raise ValueError(
            f"{row['method']} has {row['metric']} twice for the image {row['image']}: these are "
            "rows of two runs, or two images with one id; summarise each run by itself"
        )
    several = frame.groupby([*keys, "method"])["options"].nunique().max() > 1
    index = [*keys, "method", *(["options"] if several else [])]
    if common:
        frame = _in_common(frame, index)
    table = []
    for key, group in frame.groupby(index, sort=False):
        row = dict(zip(index, key, strict=True)) | _row(group, errors)
        same_run = (broken[keys] == list(key[: len(keys)])).all(axis=1)
        own = broken["method"].isna() | (broken["method"] == row["method"])
        table.append(row | {"broken": broken.loc[same_run & own, "image"].nunique()})
    summary = pd.DataFrame(table).set_index(index)
    measured = list(dict.fromkeys(frame["metric"]))
    columns = measured
    if errors:
        columns = [f"{m}{of}" for m in measured for of in ("", *ERRORS)]
        for metric in measured:
            summary[f"{metric} best"] = False
            for best in _best(frame[frame["metric"] == metric], index, keys):
                summary.loc[best, f"{metric} best"] = True
    columns = [*columns, "T", *(["images"] if errors else []), *(["broken"] if len(broken) else [])]
    return summary[columns]


def in_words(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with intervals as text: a cell holds value and interval.

    An asterisk marks the best of a column, where it is surely better than the others.
    """
    text = table.drop(columns=[c for c in table.columns if str(c).endswith(ERRORS)])
    for metric in [c for c in text.columns if f"{c} low" in table]:
        value, low, high = (table[f"{metric}{of}"] for of in ("", " low", " high"))
        best = table.get(f"{metric} best", pd.Series(False, table.index))
        cells = (
            f"{v:.2f} [{a:.1f}, {b:.1f}]{'*' if sure else ''}"
            for v, a, b, sure in zip(value, low, high, best, strict=True)
        )
        text[metric] = [c.replace(" [nan, nan]", "").replace("nan", "–") for c in cells]
    return text.round(3)


def _of_method(frame: pd.DataFrame, method: str) -> pd.DataFrame:
    found = frame[frame["method"] == method]
    if not len(found):
        raise ValueError(
            unknown_name("method of these rows", method, list(frame["method"].unique()))
        )
    return found


def _in_common(frame: pd.DataFrame, index: list[str]) -> pd.DataFrame:
    """Return the rows of images that every row of the table has; warn about those left out."""
    entry = frame.groupby(index, sort=False).ngroup()
    of_metric = [frame["dataset"], frame["metric"]]
    have = frame.groupby(["dataset", "metric", "image"])["method"].transform("size")
    shared = have == entry.groupby(of_metric).transform("nunique")
    kept = frame[shared]
    if lost := set(frame["metric"]) - set(kept["metric"]):
        raise ValueError(
            f"the methods have no image with {min(lost)} in common; measure the same images with "
            "each, or pass common=False to average each over its own"
        )
    n = kept.groupby("metric")["image"].nunique().min()
    more = frame[~shared].groupby(index, sort=False)["image"].nunique()
    if len(more):
        names = (" ".join(key if isinstance(key, tuple) else (key,)) for key in more.index)
        told = ", ".join(f"{name} {count}" for name, count in zip(names, more, strict=True))
        warnings.warn(
            f"the table compares the images that all methods have ({n}); images left out: {told} "
            "(common=False averages each method over its own images)",
            stacklevel=3,
        )
    return kept


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
        values, details = _values(of_metric)
        # A metric of another session may not be registered here.
        average: Callable[..., float] = METRICS[metric].average if metric in METRICS else mean
        row[metric] = float(average(values, details))
        if errors:
            known = values[~values.isnan()]
            if details is None:
                percent = metric in METRICS and METRICS[metric].unit == "percent"
                error = float(known.std()) / math.sqrt(len(known)) if len(known) > 1 else math.nan
                ends = interval(known, (0.0, 100.0) if percent else None)
            else:
                details = details[~values.isnan()]
                error = (
                    float(redrawn(known, details, average).std()) if len(known) > 1 else math.nan
                )
                ends = interval_of_average(known, details, average)
            row |= {f"{metric} ±": error, f"{metric} low": ends[0], f"{metric} high": ends[1]}
    row["T"] = 8 * float(group["seconds"].median())
    row["images"] = group["image"].nunique()
    return row


def _values(rows: pd.DataFrame) -> tuple[Tensor, Tensor | None]:
    """Return the values `(N,)` of a metric's rows, and the details `(N, T)` where it has some."""
    values, metric = torch.tensor(rows["value"].to_numpy(float)), rows["metric"].iloc[0]
    if metric not in METRICS or METRICS[metric].detail is None:
        return values, None
    return values, torch.tensor([list(d) for d in rows["detail"]], dtype=torch.float64)


def _best(rows: pd.DataFrame, index: list[str], keys: list[str]) -> Iterator[Any]:
    """Yield the entry of the table that is surely the best of a metric, for each network."""
    metric = rows["metric"].iloc[0]
    # The AD of Fake-CAM is lowest although it explains nothing.
    fake = (rows["method"] == "fake-cam") | rows["options"].str.contains('"method": "fake-cam"')
    rivals = rows[~fake]
    if metric not in METRICS or not len(rivals):
        return
    average, sign = METRICS[metric].average, 1 if METRICS[metric].better == "higher" else -1
    for _, group in rivals.groupby(keys) if keys else [((), rivals)]:
        entries = group.groupby(index).ngroups
        group = group[group.groupby("image")["value"].transform("size") == entries]
        found = {key: _values(own.sort_values("image")) for key, own in group.groupby(index)}
        best, *others = sorted(found, key=lambda key: -sign * float(average(*found[key])))
        if others and all(_surely_better(found[best], found[o], average, sign) for o in others):
            yield best if len(index) > 1 else best[0]


def _surely_better(
    best: tuple[Tensor, Any], other: tuple[Tensor, Any], average: Callable[..., float], sign: int
) -> bool:
    if best[1] is None:
        return surely_better(sign * best[0], sign * other[0])
    # The same images are drawn for both.
    difference = sign * (redrawn(*best, average) - redrawn(*other, average))
    return len(best[0]) >= FEWEST and bool(difference.nanquantile(ENDS[0]) > 0)
