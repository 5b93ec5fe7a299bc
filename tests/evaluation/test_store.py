"""Rows in a folder: killed, resumed, refused, extended, on a full disk; and flat memory."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from conftest import cnn, make_classifier, make_images
from filelock import FileLock
from PIL import Image

import opticam_lite as ol
from opticam_lite.__main__ import main
from opticam_lite.evaluation import StoreError, read, store
from opticam_lite.evaluation.store import Store
from opticam_lite.methods import METHODS
from opticam_lite.methods.registry import Method
from opticam_lite.metrics import METRICS
from opticam_lite.network import Preprocessing

# Children are forked from a small process that has imported everything and runs no threads.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["opticam_lite", "pytest"])
BOTH = ["grad-cam", "fake-cam"]


class Lazy(ol.Dataset):
    """Images that are drawn when they are asked for; some of them broken."""

    name = "lazy"

    def __init__(self, n: int, broken: tuple[int, ...] = ()) -> None:
        self._n, self._broken = n, broken

    def __len__(self) -> int:
        return self._n

    def sample(self, index: int) -> ol.Sample:
        if index in self._broken:
            raise ol.ImageError(f"{index}.jpg is damaged")
        image = make_images(1, 32, 32, seed=index)[0]
        return ol.Sample(f"{index:05d}", image, index % 5)


def measure(
    out: Path | None = None,
    n: int = 7,
    dataset: ol.Dataset | None = None,
    classifier: ol.Classifier | None = None,
    **settings: Any,
) -> pd.DataFrame:
    settings = {"methods": BOTH, "batch_size": 3, "progress": None, **settings}
    return ol.evaluate(
        classifier or make_classifier("cnn"), dataset or Lazy(n), out=out, **settings
    )


def assert_same(a: pd.DataFrame, b: pd.DataFrame) -> None:
    """The same rows, to the bit, but for the seconds."""
    a, b = a.drop(columns="seconds"), b.drop(columns="seconds")
    pd.testing.assert_frame_equal(a, b, check_exact=True)


# ------------------------------------------------------------------------ killed and resumed


def child(out: Path, n: int, ready: Connection | None) -> None:
    """One run that writes a part for every batch and method."""
    torch.set_num_threads(1)
    store.SECONDS_A_PART = 0
    if ready is not None:
        ready.send(None)
    measure(out, n)


def start(out: Path, n: int) -> Any:
    ours, theirs = FORKED.Pipe()
    process = FORKED.Process(target=child, args=(out, n, theirs))
    process.start()
    theirs.close()
    assert ours.poll(60)
    return process


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    n = 90
    whole = start(tmp_path / "whole", n)
    started = time.monotonic()
    whole.join()
    seconds = time.monotonic() - started
    assert whole.exitcode == 0
    expected = read(tmp_path / "whole")
    assert len(expected) == n * 2 * 3
    moments, folder, kills = random.Random(0), 0, 0
    with_rows = 0
    while kills < 20:
        out = tmp_path / str(folder)
        process = start(out, n)
        process.join(moments.uniform(0, seconds / 3))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += process.exitcode == -signal.SIGKILL
            if (out / "settings.json").exists():
                rows = read(out)
                assert not rows.duplicated(["image", "method", "metric"]).any()
                with_rows += 0 < len(rows) < len(expected)
        if process.exitcode == 0:
            assert_same(read(out), expected)
            folder += 1
    last = start(out, n)
    last.join()
    assert last.exitcode == 0
    assert_same(read(out), expected)
    assert with_rows >= 3  # it was not always before the first row or after the last


def test_a_run_that_is_over_is_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measure(tmp_path)
    assert_same(first, measure())
    asked: list[Any] = []

    def note(job: Any, tasks: list[Any]) -> Any:
        asked.extend(tasks)
        yield from ()

    monkeypatch.setattr("opticam_lite.evaluation.run.measure", note)
    assert_same(measure(tmp_path), first)
    assert asked == []


def test_what_a_crash_leaves_behind_is_no_row(tmp_path: Path) -> None:
    first = measure(tmp_path)
    (tmp_path / "part-000001.tmp").write_bytes(b"PAR1 half a part")
    assert_same(measure(tmp_path), first)
    assert not list(tmp_path.glob("*.tmp"))


def test_an_exception_keeps_what_is_whole(tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def stop(method: str, done: int, total: int) -> None:
        if done == 6:
            raise StopError

    with pytest.raises(StopError):
        measure(tmp_path, progress=stop)
    kept = read(tmp_path)
    assert set(kept.groupby("method")["image"].nunique()) == {3, 6}
    seen = []
    frame = measure(tmp_path, progress=lambda *step: seen.append(step))
    assert seen == [("fake-cam", 6, 7), ("grad-cam", 7, 7), ("fake-cam", 7, 7)]
    assert_same(frame, measure())


# ------------------------------------------------------------------------- settings and lock


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 2}, "batch_size is 3 there and 2 here"),
        ({"limit": 5}, "images is 7 there and 5 here; other images were chosen"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"n": 8}, "images is 7 there and 8 here"),
        ({"methods": ["score-cam"], "options": {"score-cam": {"chunk": 8}}}, None),
        (
            {"methods": ["opti-cam"], "options": {"opti-cam": {"iterations": 3}}},
            'the options of opti-cam are {"iterations": 2} there and {"iterations": 3} here',
        ),
    ],
)
def test_other_settings_are_refused(
    changed: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    options = {"opti-cam": {"iterations": 2}}
    first = measure(tmp_path, methods=["fake-cam", "opti-cam"], options=options)
    if message is None:
        measure(tmp_path, **changed)
    else:
        with pytest.raises(StoreError, match=f"holds another run: .*{message}"):
            measure(tmp_path, **{"methods": ["fake-cam"], **changed})
    again = measure(tmp_path, methods=["fake-cam", "opti-cam"], options=options)
    assert_same(again, first)


def heavier() -> ol.Classifier:
    classifier = make_classifier("cnn")
    with torch.no_grad():
        next(classifier.network.parameters())[0] += 1e-3
    return classifier


def with_gelu() -> ol.Classifier:
    """The small network with the same weights and other layers."""
    arguments = make_classifier("cnn").rebuild_arguments()
    for name, module in list(arguments["network"].named_modules()):
        if isinstance(module, torch.nn.ReLU):
            arguments["network"].set_submodule(name, torch.nn.GELU())
    return ol.Classifier(**arguments)


class Scaled(torch.nn.Module):
    """The small network with logits times a number, which no weight holds."""

    def __init__(self, times: float, hidden: bool) -> None:
        super().__init__()
        self.inner = cnn()
        self.times = times
        if hidden:
            del self.times
            self.register_buffer("times", torch.tensor(times), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.times


def scaled(times: float, hidden: bool) -> ol.Classifier:
    return ol.Classifier(Scaled(times, hidden), "inner.4", size=32, device="cpu")


CHANGED = "weights or layers have changed"


@pytest.mark.parametrize(
    ("first", "other", "message"),
    [
        (partial(make_classifier, "cnn"), heavier, CHANGED),
        (partial(make_classifier, "cnn"), with_gelu, CHANGED),
        (
            partial(make_classifier, "cnn"),
            lambda: make_classifier("cnn").at("1"),
            'layer is "4" there and "1" here',
        ),
        (partial(scaled, 1.0, False), partial(scaled, 5.0, False), CHANGED),
        (partial(scaled, 1.0, True), partial(scaled, 5.0, True), CHANGED),
    ],
    ids=["weights", "layers", "layer", "constant", "buffer"],
)
def test_another_network_is_refused(
    first: Callable[[], ol.Classifier],
    other: Callable[[], ol.Classifier],
    message: str,
    tmp_path: Path,
) -> None:
    rows = measure(tmp_path, 3, classifier=first())
    assert_same(measure(tmp_path, 3, classifier=first()), rows)
    with pytest.raises(StoreError, match=message):
        measure(tmp_path, 3, classifier=other())


def test_methods_and_metrics_can_be_added(tmp_path: Path) -> None:
    measure(tmp_path, methods=["fake-cam"], metrics=["AD"])
    measure(tmp_path, methods=["grad-cam"], metrics=["AI"])
    frame = measure(tmp_path, methods=["grad-cam", "fake-cam"], metrics=["AD", "AI"])
    assert_same(frame, measure(methods=["grad-cam", "fake-cam"], metrics=["AD", "AI"]))
    assert len(read(tmp_path)) == len(frame)
    some = measure(tmp_path, methods=["fake-cam"], metrics=["AI"])
    assert_same(some, measure(methods=["fake-cam"], metrics=["AI"]))
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert list(settings["methods"]) == ["fake-cam", "grad-cam"]
    assert settings["metrics"] == ["AD", "AI"]


def double(case_of: Any) -> Any:
    return lambda function, case: 2 * case_of(function, case)


def test_what_depends_on_changed_code_is_measured_again_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def register(power: int) -> None:
        """Register a method as a notebook does, which evaluates its cell again."""

        def mine(classifier: ol.Classifier, images: torch.Tensor, targets: torch.Tensor) -> Any:
            return images.mean(1, keepdim=True) ** power

        entry = Method("mine", mine, "Mine", "here")
        monkeypatch.setitem(METHODS._entries, "mine", entry)

    def again(out: Path | None = tmp_path) -> tuple[pd.DataFrame, set[str]]:
        seen: set[str] = set()
        frame = measure(
            out, methods=["fake-cam", "mine"], progress=lambda method, *_: seen.add(method)
        )
        return frame, seen

    register(1)
    first, _ = again()
    register(1)
    assert_same(again()[0], first)
    assert again()[1] == set()
    register(2)
    with pytest.warns(UserWarning, match="the code of mine has changed since its rows in"):
        second, seen = again()
    assert seen == {"mine"}
    assert_same(second, again(None)[0])
    assert_same(read(tmp_path), second)
    assert not second["value"].equals(first["value"])
    register(1)
    with pytest.warns(UserWarning, match="the code of mine has changed"):
        back, seen = again()
    assert (seen, len(back)) == (set(), len(first))  # the rows of this code are still there
    assert_same(back, first)
    metric = replace(METRICS["AI"], of_case=double(METRICS["AI"].of_case))
    monkeypatch.setitem(METRICS._entries, "AI", metric)
    with pytest.warns(UserWarning, match="the code of AI has changed"):
        doubled, seen = again()
    assert seen == {"fake-cam", "mine"}
    assert_same(doubled, again(None)[0])
    # A part holds which code its rows are of: the rows of AI were added, no others.
    assert len(pq.read_table(sorted(tmp_path.glob("part-*"))[-1])) == 7 * 2


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("code", "the code that every row depends on has changed .the package's, or the dataset's"),
        ("timm", 'timm is "[0-9.]+" there and "0.1" here'),
        ("pillow", 'pillow is "[0-9.]+" there and "0.1" here'),
        ("torchvision", 'torchvision is "[0-9.]+" there and "0.1" here'),
    ],
)
def test_other_code_and_other_versions_are_refused(
    what: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measure(tmp_path)
    with monkeypatch.context() as patch:
        if what == "code":
            patch.setattr("opticam_lite.network.cut.Cut.head", lambda *_: None)
        else:
            version = importlib.metadata.version
            other = {what: "0.1"}
            patch.setattr(importlib.metadata, "version", lambda n: other.get(n) or version(n))
        with pytest.raises(StoreError, match=message):
            measure(tmp_path)
    assert_same(measure(tmp_path), first)


def test_the_code_of_a_dataset_of_ones_own_counts(tmp_path: Path) -> None:
    class Darker(Lazy):
        def sample(self, index: int) -> ol.Sample:
            good = super().sample(index)
            return replace(good, image=good.image / 2)

    measure(tmp_path)
    with pytest.raises(StoreError, match=r"the code .* has changed .*, or the dataset's"):
        measure(tmp_path, dataset=Darker(7))


def test_two_processes_can_not_write_to_one_folder(tmp_path: Path) -> None:
    first = measure(tmp_path)
    with FileLock(tmp_path / ".lock"), pytest.raises(StoreError, match="another process is"):
        measure(tmp_path)
    assert_same(measure(tmp_path), first)


@pytest.mark.parametrize("refused", ["lock", "settings"])
def test_a_run_that_is_over_is_read_where_nothing_can_be_written(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No chmod, which would not stop root: opening files to write is what fails."""
    first = measure(tmp_path)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    if refused == "lock":
        monkeypatch.setattr(store.FileLock, "acquire", refuse)
    monkeypatch.setattr(store.Store, "_write", refuse)
    assert_same(measure(tmp_path), first)
    less = measure(tmp_path, methods=["fake-cam"], metrics=["AI"])
    assert_same(less, measure(methods=["fake-cam"], metrics=["AI"]))
    message = r"nothing can be written to .* \(Read-only .*\), and its run is not over; make it"
    with pytest.raises(StoreError, match=message):
        measure(tmp_path, methods=["score-cam"])
    with pytest.raises(StoreError, match="batch_size is 3 there and 2 here"):
        measure(tmp_path, batch_size=2)
    with pytest.raises(StoreError, match="its run is not over"):
        measure(tmp_path / "new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == files


def test_a_copy_of_a_part_is_no_part(tmp_path: Path) -> None:
    measure(tmp_path, methods=["fake-cam"])
    part = tmp_path / "part-000000.parquet"
    (tmp_path / "part-000000 (1).parquet").write_bytes(part.read_bytes())
    assert_same(measure(tmp_path), measure())
    assert_same(read(tmp_path), measure(methods=["fake-cam", "grad-cam"]))


def test_folders_that_are_something_else(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(StoreError, match="and a file; name a folder"):
        measure(file)
    with pytest.raises(StoreError, match=r"no settings\.json"):
        read(tmp_path)
    with pytest.raises(ValueError, match="out names no folder"):
        measure(collect=False)
    measure(tmp_path / "run")
    (tmp_path / "run" / "settings.json").unlink()
    with pytest.raises(StoreError, match="results without settings"):
        measure(tmp_path / "run")
    (tmp_path / "run" / "settings.json").mkdir()
    for call in (read, measure):
        with pytest.raises(StoreError, match=r"settings\.json can't be read \(Is a directory\)"):
            call(tmp_path / "run")
    with pytest.raises(ValueError, match=r"out is too long, .* letters .*; shorten it"):
        measure(tmp_path / ("long" * 100))
    with pytest.raises(StoreError, match=r"no folder can be made there .*; name another"):
        measure(Path("/proc/rows"))


def test_rows_of_an_earlier_version_can_be_read(tmp_path: Path) -> None:
    rows = measure(tmp_path)
    for part in tmp_path.glob("part-*.parquet"):
        pq.write_table(pq.read_table(part).drop_columns("explained"), part)
    earlier = read(tmp_path)
    assert earlier["explained"].isna().all()
    pd.testing.assert_frame_equal(earlier.drop(columns="explained"), rows.drop(columns="explained"))


def test_a_damaged_part_is_named_and_can_be_replaced(tmp_path: Path) -> None:
    first = measure(tmp_path)
    (part,) = tmp_path.glob("part-*.parquet")
    part.write_bytes(part.read_bytes()[:-40])
    with pytest.raises(StoreError, match=f"{re.escape(str(part))} is damaged .* delete it"):
        measure(tmp_path)
    part.unlink()
    assert_same(measure(tmp_path), first)


def test_a_folder_that_is_removed_during_a_run_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove(method: str, done: int, total: int) -> None:
        if done == total:
            shutil.rmtree(out, ignore_errors=True)

    for seconds in (0, 1000):  # between two parts, and before the last
        monkeypatch.setattr(store, "SECONDS_A_PART", seconds)
        out = tmp_path / str(seconds)
        with pytest.raises(OSError, match=f"the folder {out} is gone, and the rows in it"):
            measure(out, progress=remove)
        assert_same(measure(out), measure())


def test_a_folder_that_is_gone_when_its_rows_are_read_holds_no_rows(tmp_path: Path) -> None:
    with Store(tmp_path / "out", settings_of(tmp_path / "other")) as opened:
        shutil.rmtree(tmp_path / "out")
        with pytest.raises(OSError, match="out is gone, and the rows in it"):
            opened.table(["error"])


def settings_of(out: Path) -> dict[str, Any]:
    measure(out, 3)
    return dict(store.read_settings(out))


# --------------------------------------------------------------------- broken images, full disks


def test_a_broken_image_is_an_error_row(tmp_path: Path) -> None:
    broken = Lazy(7, broken=(1, 3, 4, 5))
    for out in (tmp_path, tmp_path, None):  # the second time everything is there already
        frame = measure(out, dataset=broken)
        errors = frame[frame["error"].notna()]
        assert errors["image"].tolist() == ["#1", "#3", "#4", "#5"]
        assert errors["error"].tolist()[0] == "ImageError: 1.jpg is damaged"
        assert errors[["method", "metric", "value", "target"]].isna().all(axis=None)
        rows = frame[frame["error"].isna()]
        assert sorted(rows["image"].unique()) == ["00000", "00002", "00006"]
        assert len(rows) == 3 * 2 * 3
        table = ol.summarize(frame)
        assert table["broken"].tolist() == [4, 4]
    whole = measure()
    same = whole[whole["image"].isin(rows["image"])].reset_index(drop=True)
    for column in ("value", "p", "o"):
        assert rows[column].tolist() == pytest.approx(same[column].tolist(), abs=1e-4)


def test_a_broken_image_stays_broken_for_its_folder(tmp_path: Path) -> None:
    """So that a method that is added meets the same batches, and nothing is counted twice."""
    measure(tmp_path, dataset=Lazy(7, broken=(1, 4)), methods=["fake-cam"])
    frame = measure(tmp_path, dataset=Lazy(7))  # somebody repaired the files
    assert frame.loc[frame["error"].notna(), "image"].tolist() == ["#1", "#4"]
    assert_same(frame, measure(dataset=Lazy(7, broken=(1, 4))))


@pytest.fixture
def photos(tmp_path: Path) -> ol.Dataset:
    """Three files of one size in `tmp_path / "photos"`."""
    (tmp_path / "photos").mkdir()
    for i in range(3):
        photograph(tmp_path / "photos" / f"{i}.bmp", i)
    return ol.load_dataset(tmp_path / "photos", classifier=make_classifier("cnn"))


def photograph(path: Path, seed: int) -> None:
    image = (255 * make_images(1, 40, 40, seed=seed)[0]).byte().permute(1, 2, 0).numpy()
    Image.fromarray(image).save(path)


def test_a_broken_file_is_told_by_its_name(photos: ol.Dataset, tmp_path: Path) -> None:
    file = tmp_path / "photos" / "1.bmp"
    file.write_bytes(file.read_bytes()[:200])
    frame = measure(dataset=photos)
    broken = frame[frame["error"].notna()]
    assert broken["image"].tolist() == ["1.bmp"]
    assert "1.bmp is damaged or incomplete" in broken["error"].item()


class Known(Lazy):
    """Tells ids and targets, and how its files are resized."""

    def __init__(self, letter: str, first: int, resize: int = 40) -> None:
        super().__init__(4)
        self._letter, self._first = letter, first
        self.settings = Preprocessing((32, 32), resize)

    def id(self, index: int) -> str:
        return f"{self._letter}{index}"

    def target(self, index: int) -> int:
        return (self._first + index) % 5


@pytest.mark.parametrize(
    ("first", "other", "message"),
    [
        (Known("a", 0), Known("b", 0), "other images were chosen"),
        (Known("a", 0), Known("a", 1), "true classes have changed"),
        (Known("a", 0), Known("a", 0, 64), "preprocessing is"),
        (ol.Images(make_images()), ol.Images(make_images(seed=1)), "images or boxes have changed"),
    ],
)
def test_other_images_are_refused(
    first: ol.Dataset, other: ol.Dataset, message: str, tmp_path: Path
) -> None:
    rows = measure(tmp_path, dataset=first)
    assert_same(measure(tmp_path, dataset=first), rows)
    with pytest.raises(StoreError, match=message):
        measure(tmp_path, dataset=other)


def test_another_file_of_the_same_name_is_refused(photos: ol.Dataset, tmp_path: Path) -> None:
    file = tmp_path / "photos" / "1.bmp"
    measure(tmp_path / "out", dataset=photos)
    file.replace(tmp_path / "old").replace(file)  # moved about, but the same
    measure(tmp_path / "out", dataset=photos)
    photograph(file, 7)
    with pytest.raises(StoreError, match="images or boxes have changed"):
        measure(tmp_path / "out", dataset=photos)


def test_a_file_that_changed_beyond_its_beginning_is_refused(tmp_path: Path) -> None:
    """Whatever its size and its times say."""
    (tmp_path / "photos").mkdir()
    file = tmp_path / "photos" / "large.bmp"
    Image.fromarray(np.zeros((300, 300, 3), np.uint8)).save(file)
    photos = ol.load_dataset(tmp_path / "photos", classifier=make_classifier("cnn"))
    measure(tmp_path / "out", dataset=photos)
    data, before = bytearray(file.read_bytes()), file.stat()
    data[-5000] = 255
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size > 2**17
    with pytest.raises(StoreError, match="images or boxes have changed"):
        measure(tmp_path / "out", dataset=photos)


class Vanishing(Lazy):
    """A place on the network that drops out after a few images, once."""

    def __init__(self, error: OSError | MemoryError) -> None:
        super().__init__(7)
        self._error: BaseException | None = error

    def sample(self, index: int) -> ol.Sample:
        if index == 5 and self._error is not None:
            error, self._error = self._error, None
            raise error
        return super().sample(index)


@pytest.mark.parametrize("error", [MemoryError("too little"), OSError(errno.ESTALE, "stale")])
def test_a_passing_fault_breaks_no_image(error: OSError | MemoryError, tmp_path: Path) -> None:
    dataset = Vanishing(error)
    with pytest.raises(type(error), match=r"too little|stale"):
        measure(tmp_path, dataset=dataset)
    assert 0 < read(tmp_path)["image"].nunique() < 7
    assert_same(measure(tmp_path, dataset=dataset), measure())


def test_a_folder_that_is_gone_breaks_no_image(photos: ol.Dataset, tmp_path: Path) -> None:
    measure(tmp_path / "out", dataset=photos, methods=["fake-cam"])
    away = (tmp_path / "photos").rename(tmp_path / "away")
    with pytest.raises(OSError, match=r"the folder .*photos is gone; bring it back, and repeat"):
        measure(dataset=photos)
    away.rename(tmp_path / "photos")
    assert measure(tmp_path / "out", dataset=photos)["error"].isna().all()
    (tmp_path / "photos" / "1.bmp").unlink()  # a single one is that image's fault
    assert measure(dataset=photos)["error"].notna().sum() == 1


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tmp").write_text("mine")
    (tmp_path / "settings.json").write_text('{"editor": 1}')
    with pytest.raises(StoreError, match=r"not written by this version of evaluate; name another"):
        measure(tmp_path)
    assert (tmp_path / "settings.json").read_text() == '{"editor": 1}'
    (tmp_path / "settings.json").unlink()
    measure(tmp_path)
    assert (tmp_path / "thesis.tmp").read_text() == "mine"
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(StoreError, match=r"not written by this version of evaluate; name another"):
        ol.summarize(tmp_path)


@pytest.mark.parametrize("begun", [BOTH, None])
def test_a_method_without_rows_binds_nobody(begun: list[str] | None, tmp_path: Path) -> None:
    """Nor does a run without rows."""
    if begun:
        measure(tmp_path, methods=begun)
    methods = [*(begun or []), "opti-cam"]
    for wrong, message in (
        ({"objective": "nonsense"}, "unknown objective 'nonsense'"),
        ({"iterations": "abc"}, "iterations is 'abc'; a whole number ≥ 0 is needed"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(tmp_path, methods=methods, options={"opti-cam": wrong})
    frame = measure(tmp_path, methods=methods, options={"opti-cam": {"iterations": 2}})
    assert len(frame) == 7 * 3 * len(methods)
    with pytest.raises(StoreError, match="the options of opti-cam are"):
        measure(tmp_path, methods=methods, options={"opti-cam": {"iterations": 3}})


def test_a_run_of_broken_images_only_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"none of the 2 images of lazy .* 0\.jpg is damaged"):
        measure(dataset=Lazy(2, broken=(0, 1)))


def test_what_can_not_be_an_input_is_a_broken_image() -> None:
    class Odd(Lazy):
        def sample(self, index: int) -> ol.Sample:
            good = super().sample(index)
            image = {1: good.image * 9, 2: good.image[:1]}.get(index, good.image)
            return ol.Sample(good.id, image, 7 if index == 3 else good.target)

    frame = measure(dataset=Odd(5))
    errors = frame[frame["error"].notna()].set_index("image")["error"]
    assert "RGB in [0, 1] is needed" in errors["#1"]
    assert "(N, 3, H, W) is needed" in errors["#2"]
    assert "target 7 is no class" in errors["#3"]


def test_images_of_several_sizes() -> None:
    class Sizes(Lazy):
        def sample(self, index: int) -> ol.Sample:
            size = (32, 48)[index % 2]
            return ol.Sample(str(index), make_images(1, size, 32, seed=index)[0], 0)

    frame = measure(dataset=Sizes(5))
    assert frame["image"].tolist() == [str(i) for i in range(5) for _ in range(6)]
    alone = measure(dataset=Sizes(5), batch_size=1)
    assert frame["value"].tolist() == pytest.approx(alone["value"].tolist(), abs=1e-3)


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="only Linux has a device that is always full")
@pytest.mark.parametrize("batch_size", [3, 350], ids=["buffered rows", "many rows"])
def test_a_full_disk(
    batch_size: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The system itself refuses the bytes of the third part."""
    monkeypatch.setattr(store, "SECONDS_A_PART", 0)
    n = 2 * batch_size + 1

    def fill(method: str, done: int, total: int) -> None:
        if (tmp_path / "part-000001.parquet").exists():
            (tmp_path / "part-000002.tmp").symlink_to(FULL)

    settings = {"n": n, "batch_size": batch_size}
    with pytest.raises(OSError, match=r"the disk is full: part-000002\.parquet .* free some space"):
        measure(tmp_path, progress=fill, **settings)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *(".lock", "part-000000.parquet", "part-000001.parquet", "settings.json")
    ]
    kept = read(tmp_path)
    assert len(kept) == batch_size * 2 * 3  # one batch, both methods
    assert_same(measure(tmp_path, **settings), measure(**settings))

    # The command says the same in one line.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.tmp").symlink_to(FULL)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))  # leaves it there
    command = ["evaluate", "--model", "scenes_resnet", "--data", "scenes", "--methods", "fake-cam"]
    assert main([*command, "--quiet", "--limit", "1", "--out", str(tmp_path / "run")]) == 1
    told = capsys.readouterr().err
    assert "the disk is full: settings.json could not be written" in told
    assert told.count("\n") == 1


# ----------------------------------------------------------------------------- flat memory


def peak() -> int:
    """Largest resident memory so far, in kB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def grow(out: Path, n: int, result: Connection) -> None:
    """Run n images and send the peak after 500 and at the end."""
    torch.set_num_threads(1)
    seen: dict[int, int] = {}

    def note(method: str, done: int, total: int) -> None:
        if done in (512, total):
            seen.setdefault(done, peak())

    # Parts as often as in a run of hours, so that they can not be what stays in memory.
    store.SECONDS_A_PART = 0.2
    measure(out, n, methods=["grad-cam"], batch_size=32, collect=False, progress=note)
    result.send((seen[512], peak()))


@pytest.mark.slow
def test_memory_is_flat_in_the_number_of_images(tmp_path: Path) -> None:
    ours, theirs = FORKED.Pipe()
    process = FORKED.Process(target=grow, args=(tmp_path, 4000, theirs))
    process.start()
    theirs.close()
    assert ours.poll(120)
    early, late = ours.recv()
    process.join()
    assert late <= 1.05 * early
    assert len(pq.read_table(sorted(tmp_path.glob("part-*.parquet"))[0])) < 4000 * 3
    assert len(read(tmp_path)) == 4000 * 3


def test_out_may_be_in_the_home_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    measure(Path("~/run"))
    assert (tmp_path / "run" / "settings.json").exists()
