"""Rows in a folder, as Parquet parts, each of which is complete or absent.

    out/settings.json        what is measured; a run of other settings is refused
    out/part-000000.parquet  rows, always all of a batch and a method
    out/.lock                held by the process that writes

What has been measured is derived from the rows themselves, so no separate record can be
inconsistent with them.
"""

from __future__ import annotations

import errno
import json
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

SCHEMA = pa.schema(
    {
        "position": pa.int32(),  # the image's place in the run; rows are sorted by it when read
        "dataset": pa.string(),
        "image": pa.string(),
        "network": pa.string(),
        "layer": pa.string(),
        "method": pa.string(),
        "options": pa.string(),
        "metric": pa.string(),
        "value": pa.float64(),
        "target": pa.int64(),
        "explained": pa.int64(),  # the class whose map was made
        "p": pa.float64(),
        "o": pa.float64(),
        "seconds": pa.float64(),
        "detail": pa.list_(pa.float64()),
        "error": pa.string(),
        "code": pa.string(),  # of the method and the metric; rows of other code are not read
    }
)
# Settings whose values are digests; a message says what they stand for instead.
DIGESTS = {
    "weights": "the network's weights or layers have changed",
    "ids": "other images were chosen",
    "contents": "images or boxes have changed",
    "targets": "true classes have changed",
    "code": "the code that every row depends on has changed (the package's, or the dataset's)",
}
COMPARED_BY_NAME = ("methods", "metrics", "codes")
READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
SECONDS_A_PART = 5.0
ROWS_A_PART = 50_000


class StoreError(ValueError):
    """A folder of results that can't be used as asked for; the message says why."""


class Memory:
    """Rows that are kept in memory, packed as tables every few seconds."""

    def __init__(self) -> None:
        self._rows: list[Mapping[str, Any]] = []
        self._tables: list[pa.Table] = []
        self._due = time.monotonic() + SECONDS_A_PART

    def check_writable(self) -> None:
        """Raise StoreError if rows can't be added."""

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows; every few seconds, those that were added are packed, or written as a part."""
        self._rows += rows
        if time.monotonic() >= self._due or len(self._rows) >= ROWS_A_PART:
            self.flush()

    def flush(self) -> None:
        """Pack or write the rows that were added last.

        Raises:
            OSError: If the disk is full; what was written before stays valid.
        """
        self._due = time.monotonic() + SECONDS_A_PART
        if self._rows:
            rows, self._rows = self._rows, []
            self._keep(pa.Table.from_pylist(rows, SCHEMA))

    def _keep(self, table: pa.Table) -> None:
        self._tables.append(table)

    def table(self, columns: Sequence[str]) -> pa.Table:
        """Return these columns of all rows."""
        self.flush()
        return pa.concat_tables([SCHEMA.empty_table(), *self._tables]).select(columns)


class Store(Memory):
    """The folder of one run, locked while it is open (a context manager).

    Where nothing can be written, the folder is read without the lock.

    Args:
        folder: Created if necessary.
        settings: What is measured, as JSON values. `methods` (name → options) and `metrics` may
            be more or fewer than in the folder: rows of new ones are added. So are those of a
            method or metric whose code has changed, in `codes`, and the earlier ones are no longer
            read. All else must agree.

    Raises:
        StoreError: If another process writes there, or the folder holds a run of other settings.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.folder = Path(folder)
        self._settings = json.loads(json.dumps(settings))
        self._refused: OSError | None = None

    def __enter__(self) -> Store:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise StoreError(f"out is {str(self.folder)!r}, and a file; name a folder") from error
        except OSError as error:
            raise StoreError(
                f"out is {str(self.folder)!r}, and no folder can be made there ({error.strerror}); "
                "name another"
            ) from error
        self._lock = FileLock(self.folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
            self._save(self._agree())
            for left_over in self.folder.glob("part-*.tmp"):  # of a run that was killed
                left_over.unlink()
        except Timeout as error:
            raise StoreError(
                f"another process is writing to {self.folder}; wait for it, or name another folder"
            ) from error
        except BaseException as error:
            self._lock.release()
            if not isinstance(error, OSError) or error.errno not in READ_ONLY:
                raise
            self._agree()
            self._refused = error
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.flush()  # after an error, too: the rows of whole batches are kept
        finally:
            self._lock.release()

    def check_writable(self) -> None:
        """Raise StoreError if nothing can be written to the folder."""
        if self._refused is not None:
            raise StoreError(
                f"nothing can be written to {self.folder} ({self._refused.strerror}), and its run "
                "is not over; make it writable, or name another folder"
            ) from self._refused

    def _agree(self) -> dict[str, Any]:
        """Compare the settings with those of the folder, and return both together."""
        parts, held = _parts(self.folder), None
        if (self.folder / "settings.json").exists():
            held = read_settings(self.folder)
        elif parts:
            raise StoreError(
                f"{self.folder} holds results without settings.json, so it can't be told what "
                "they are; name another folder"
            )
        if held is None or not parts:
            return self._settings  # without rows, the settings of an earlier run are irrelevant
        rows = read_table(self.folder, ["method", "metric"], held).drop_null()  # without errors
        with_rows = {*rows["method"].unique().to_pylist(), *rows["metric"].unique().to_pylist()}
        for method in set(held["methods"]) - with_rows:
            del held["methods"][method]  # so are the options of a method without rows
        found = differences(held, self._settings)
        if found:
            raise StoreError(
                f"{self.folder} holds another run: {'; '.join(found)}. Name another folder, or "
                "delete this one"
            )
        held["methods"] |= self._settings["methods"]
        held["metrics"] = list(dict.fromkeys(held["metrics"] + self._settings["metrics"]))
        for kind, codes in self._settings["codes"].items():
            known = held["codes"][kind]
            changed = (name for name, code in codes.items() if known.get(name, code) != code)
            for name in filter(with_rows.__contains__, changed):
                warnings.warn(
                    f"the code of {name} has changed since its rows in {self.folder} were "
                    "measured: they are measured again",
                    stacklevel=5,
                )
            known |= codes
        return held

    def _save(self, settings: Mapping[str, Any]) -> None:
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        self._write(self.folder / "settings.json", lambda file: file.write(text.encode()))

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows with the code that they are of; those of broken images depend on none."""
        codes = self._settings["codes"]
        methods, metrics = {None: "", **codes["methods"]}, {None: "", **codes["metrics"]}
        of = [methods[row.get("method")] + metrics[row.get("metric")] for row in rows]
        super().add([{**row, "code": code} for row, code in zip(rows, of, strict=True)])

    def _keep(self, table: pa.Table) -> None:
        path = self.folder / f"part-{max(_parts(self.folder), default=-1) + 1:06d}.parquet"
        self._write(path, lambda file: pq.write_table(table, file, compression="zstd"))

    def _write(self, path: Path, write: Any) -> None:
        """Write a file under another name, flush it to the disk, then rename it."""
        temporary = path.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync(self.folder)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                error.errno,
                f"the disk is full: {path.name} could not be written to {self.folder}; the parts "
                "before it are valid, so free some space and run the same call again",
            ) from error

    def table(self, columns: Sequence[str]) -> pa.Table:
        """Return these columns of all rows, in the folder and new."""
        self.flush()
        return read_table(self.folder, columns, self._settings)


def _sync(folder: Path) -> None:
    """Flush a folder's entries to the disk; systems that can't open folders need no such call."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parts(folder: Path) -> dict[int, Path]:
    """Return the parts by their numbers, in order.

    Raises:
        StoreError: If the folder can't be read.
        OSError: If it is no longer there.
    """
    try:
        paths = [path for path in folder.iterdir() if path.suffix == ".parquet"]
    except FileNotFoundError as error:
        raise OSError(
            f"the folder {folder} is gone, and the rows in it; bring it back, or let the same call "
            "begin anew"
        ) from error
    except OSError as error:
        raise _unreadable(folder, error) from error
    # Digits only: the rows of a sync client's `part-000000 (1).parquet` would count twice.
    found = {path.stem.removeprefix("part-"): path for path in paths}
    return {int(n): found[n] for n in sorted(filter(str.isdecimal, found), key=int)}


def _unreadable(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"{path} can't be read ({error.strerror}); make it readable, or name another folder"
    )


def read_settings(folder: str | Path) -> dict[str, Any]:
    """Return the settings of the run that a folder holds.

    Raises:
        StoreError: If it holds none, or they can't be read.
    """
    path = Path(folder) / "settings.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(
            f"{folder} holds no results of evaluate: there is no settings.json in it"
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}); name another folder") from error
    if not isinstance(settings, dict) or not {"weights", *COMPARED_BY_NAME} <= set(settings):
        raise StoreError(f"{path} was not written by this version of evaluate; name another folder")
    return settings


def read_table(folder: str | Path, columns: Sequence[str], settings: Mapping[str, Any]) -> pa.Table:
    """Return these columns of a folder's rows, in the order in which they were written.

    Rows of a method or a metric whose code was another than in the settings are left out.
    """
    needed = list(dict.fromkeys([*columns, "code"]))
    tables = [SCHEMA.empty_table().select(needed)]
    for part in _parts(Path(folder)).values():
        try:
            # By the schema, what an earlier version did not write is null.
            tables.append(pq.read_table(part, columns=needed, schema=SCHEMA))
        except PermissionError as error:
            raise _unreadable(part, error) from error
        except (OSError, pa.ArrowInvalid) as error:
            raise StoreError(
                f"{part} is damaged ({' '.join(str(error).split())}); delete it, and the same call "
                "computes its rows again"
            ) from error
    methods, metrics = (settings["codes"][kind].values() for kind in ("methods", "metrics"))
    codes = ["", *methods, *(method + metric for method in methods for metric in metrics)]
    table = pa.concat_tables(tables)
    return table.filter(pc.is_in(table["code"], pa.array(codes))).select(columns)


def read(folder: str | Path, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Return the rows that `evaluate(…, out=folder)` has written so far.

    Args:
        folder: What `out` was.
        columns: Only these, and method, metric and error. Default: all.

    Raises:
        StoreError: If the folder holds no results.
    """
    settings = read_settings(folder)
    needed = {"position", "method", "metric", "error", *(columns or SCHEMA.names)}
    table = read_table(folder, [name for name in SCHEMA.names if name in needed], settings)
    return to_frame(table, list(settings["methods"]), settings["metrics"])


def to_frame(table: pa.Table, methods: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """Sort rows by image, method and metric; those of other methods and metrics are left out."""
    for name, order in (("metric", metrics), ("method", methods)):
        rank = pc.if_else(pc.is_valid(table["error"]), -1, _ranks(table[name], order))
        table = table.append_column(f"{name} rank", rank)
        table = table.filter(pc.is_valid(table[f"{name} rank"]))
    order_of = [(n, "ascending") for n in ("position", "method rank", "metric rank")]
    shown = [name for name in SCHEMA.names[1:-1] if name in table.column_names]  # not the code
    frame = table.sort_by(order_of).select(shown).to_pandas()
    for name in {"target", "explained"} & {*frame}:
        if frame[name].isna().any():
            frame[name] = frame[name].astype("Int64")  # a broken image has none
    return frame


def done(
    table: pa.Table, images: int, methods: Sequence[str], metrics: Sequence[str]
) -> tuple[np.ndarray, dict[str | None, dict[int, str]]]:
    """Derive from the rows what has been measured.

    Returns:
        Bool `(images, methods, metrics)`: whether there is such a row, or nothing is left to do.
        Method → position → error, where the method is known to fail; None → that of broken images.
    """
    errors = table.filter(table["error"].is_valid())
    failed: dict[str | None, dict[int, str]] = {name: {} for name in (None, *methods)}
    columns = (errors[name].to_pylist() for name in ("position", "method", "error"))
    for position, name, error in zip(*columns, strict=True):
        failed.setdefault(name, {})[position] = error
    position = table["position"].to_numpy()
    method = _ranks(table["method"], methods).fill_null(-1).to_numpy()
    metric = _ranks(table["metric"], metrics).fill_null(-1).to_numpy()
    asked = (method >= 0) & (metric >= 0)
    measured = np.zeros((images, len(methods), len(metrics)), bool)
    measured[position[asked], method[asked], metric[asked]] = True
    for m, name in enumerate(methods):
        measured[[*failed[None], *failed[name]], m] = True
    return measured, failed


def _ranks(names: pa.ChunkedArray, order: Sequence[str]) -> pa.ChunkedArray:
    """Return each name's place in an order, null for others."""
    return pc.index_in(names, pa.array(order, pa.string()))


def differences(held: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Return the differences of two runs' settings, in words; methods and metrics may be added."""
    found = [
        DIGESTS.get(
            name, f"{name} is {_show(held.get(name))} there and {_show(asked.get(name))} here"
        )
        for name in dict.fromkeys([*held, *asked])
        if name not in COMPARED_BY_NAME and held.get(name) != asked.get(name)
    ]
    return found + [
        f"the options of {name} are {_show(held['methods'][name])} there and {_show(options)} here"
        for name, options in asked["methods"].items()
        if held["methods"].get(name, options) != options
    ]


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
