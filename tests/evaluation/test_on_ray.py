"""The Ray engine gives the rows of the local one, also when it loses a worker."""

from __future__ import annotations

import gc
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pandas as pd
import pytest
import ray
import torch
from conftest import make_classifier, make_images
from test_measuring import REASONS, fussy, with_white

import opticam_lite as ol
from opticam_lite.evaluation import read
from opticam_lite.evaluation.job import Measured, Task
from opticam_lite.evaluation.on_ray import _cluster, _drive
from opticam_lite.stopping import Stopped, stoppable

pytestmark = [
    pytest.mark.slow,
    # Of Ray's own code, and of what it leaves to the garbage collector.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Ray on this machine with two CPUs, as small as can be."""
    with pytest.MonkeyPatch.context() as environment:
        # Workers import this file, too.
        path = [
            str(ROOT),
            str(ROOT / "tests"),
            str(Path(__file__).parent),
            os.environ.get("PYTHONPATH", ""),
        ]
        environment.setenv("PYTHONPATH", os.pathsep.join(path))
        environment.delenv("RAY_ADDRESS", raising=False)
        # Workers at Ray's own priority, 15, wait for minutes where others use every processor.
        environment.setenv("RAY_worker_niceness", "0")
        _start()
        yield
        ray.shutdown()


def _start(attempts: int = 3) -> None:
    """Start Ray; on a busy machine its own processes may wait for each other in vain."""
    for attempt in range(1, attempts + 1):
        try:
            ray.init(
                "local",
                num_cpus=2,
                include_dashboard=False,
                object_store_memory=80_000_000,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
            return
        except Exception as error:
            ray.shutdown()
            if attempt == attempts or "timed out during startup" not in str(error):
                raise
        gc.collect()  # what is left of it complains here, and not at the end of all tests


class Noted(ol.Dataset):
    """Images in memory that note which process asks for them; one of them may kill it, once.

    They keep a process waiting until so many have asked: a quick one could finish alone.
    """

    name = "noted"

    def __init__(self, folder: Path, n: int, deadly: int | None = None, together: int = 1):
        self._folder, self._images, self._deadly = folder, make_images(n), deadly
        self._together = together

    def __len__(self) -> int:
        return len(self._images)

    def sample(self, index: int) -> ol.Sample:
        (self._folder / f"{os.getpid()}.process").touch()
        deadline = time.monotonic() + 120
        while len(self.processes()) < self._together and time.monotonic() < deadline:
            time.sleep(0.05)
        if index == 5:
            raise ol.ImageError("5.jpg is damaged")
        if index == self._deadly and not (self._folder / "killed").exists():
            (self._folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return ol.Sample(str(index), self._images[index], index % 5)

    def processes(self) -> set[int]:
        return {int(path.stem) for path in self._folder.glob("*.process")}


def measure(dataset: ol.Dataset, **settings: Any) -> pd.DataFrame:
    classifier = make_classifier("cnn")
    early = {"method": "grad-cam", "layer": classifier.layers[0], "normalize": False, "exponent": 2}
    variants = {"early": early, "opti-cam": {"iterations": 3}}
    settings = {"batch_size": 3, "progress": None, **settings}
    return ol.evaluate(classifier, dataset, variants, **settings)


def assert_same(a: pd.DataFrame, b: pd.DataFrame) -> None:
    # Workers may sum with another number of threads: the last digits may differ.
    a, b = a.drop(columns="seconds"), b.drop(columns="seconds")
    pd.testing.assert_frame_equal(a, b, rtol=1e-4, atol=1e-4)


def test_the_rows_are_those_of_the_local_engine(tmp_path: Path) -> None:
    dataset = Noted(tmp_path, 40)
    local = measure(dataset)
    assert dataset.processes() == {os.getpid()}
    shared = Noted(tmp_path, 40, together=3)
    there = measure(shared, engine="ray", out=tmp_path / "run", workers=2)
    assert len(dataset.processes()) == 3  # this one and two workers
    assert there["error"].notna().sum() == 1
    assert len(there) == 39 * 2 * 3 + 1
    assert_same(there, local)
    assert_same(read(tmp_path / "run"), local)


@pytest.fixture
def busy() -> Iterator[None]:
    """A machine of which others use every processor."""
    until = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
    spin = [sys.executable, "-c", until]
    others = [subprocess.Popen(spin) for _ in range(os.cpu_count() or 1)]
    yield
    for other in others:
        other.kill()
        other.wait()


@pytest.mark.usefixtures("busy")
def test_a_lost_worker_costs_no_rows_of_a_run_that_another_engine_began(tmp_path: Path) -> None:
    dataset = Noted(tmp_path, 40, deadly=29)

    def stop(method: str, done: int, total: int) -> None:
        if done >= 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(dataset, out=tmp_path / "run", progress=stop, workers=0)
    assert not (tmp_path / "killed").exists()
    begun = read(tmp_path / "run")
    frame = measure(dataset, engine="ray", out=tmp_path / "run")
    assert (tmp_path / "killed").exists()
    assert 0 < len(begun) < len(frame) == 39 * 2 * 3 + 1
    assert not frame.duplicated(["image", "method", "metric"]).any()
    assert_same(frame, measure(dataset))


@pytest.mark.parametrize("raises", REASONS)
def test_a_network_that_fails_on_an_image_loses_it_there_as_here(raises: bool) -> None:
    given = (fussy(raises), with_white(), ["grad-cam", "fake-cam"])
    here, there = (
        ol.evaluate(*given, batch_size=3, progress=None, engine=engine)
        for engine in ("local", "ray")
    )
    assert there["error"].dropna().tolist() == [REASONS[raises]]
    assert_same(there, here)


def test_ray_leaves_sigterm_to_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(*arguments: Any, **settings: Any) -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))  # as Ray's does

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    absent = SimpleNamespace(is_initialized=lambda: False, init=init, shutdown=lambda: None)
    with pytest.raises(Stopped) as caught, stoppable(), _cluster(absent):
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 143


def test_what_can_not_work_is_said(tmp_path: Path) -> None:
    dataset = ol.Images(make_images(3))
    with pytest.raises(ValueError, match="num_gpus is 1, and the Ray cluster has 0 GPUs"):
        measure(dataset, engine="ray", num_gpus=1)

    class Open(Noted):
        def __init__(self) -> None:
            super().__init__(tmp_path, 3)
            self.file = (tmp_path / "file").open("w")

    opened = Open()
    with pytest.raises(ValueError, match=r"noted .* can't be sent to Ray's workers"):
        measure(opened, engine="ray")
    opened.file.close()


class Call(NamedTuple):
    """What a call to a worker will come to."""

    fault: Exception | None
    result: object
    number: int

    def __hash__(self) -> int:
        return self.number


class FakeRay:
    """Ray as far as the driver sees it, in this process; `faults` are raised call after call."""

    exceptions = ray.exceptions

    def __init__(self, faults: list[Exception | None], starting: list[Exception | None]) -> None:
        self.faults, self.starting = faults, starting
        self.calls: list[list[int]] = []
        self.workers = self._made = 0

    def start(self) -> SimpleNamespace:
        self.workers += 1
        ready = SimpleNamespace(remote=lambda: self._call(self.starting, None))
        return SimpleNamespace(ready=ready, measure=SimpleNamespace(remote=self._measure))

    def _measure(self, tasks: list[Task]) -> Call:
        self.calls.append([task.batch for task in tasks])
        found = [Measured("cam", 1, 0.0, [{"batch": task.batch}]) for task in tasks]
        return self._call(self.faults, (tuple(found), 0.5 * len(tasks)))

    def _call(self, faults: list[Exception | None], result: object) -> Call:
        self._made += 1
        return Call(faults.pop(0) if faults else None, result, self._made)

    def wait(self, calls: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return calls[:num_returns], calls[num_returns:]

    def get(self, call: Call) -> Any:
        if call.fault is not None:
            raise call.fault
        return call.result

    def kill(self, worker: object) -> None:
        pass

    def drive(self, n: int = 40, count: int = 2) -> list[int]:
        tasks = [Task(batch, {"cam": ["AD"]}) for batch in range(n)]
        found = _drive(self, self.start, count, tasks)
        return [row["batch"] for measured in found for row in measured.rows]


def lost() -> Exception:
    return ray.exceptions.ActorDiedError()


def test_each_batch_comes_back_once_whichever_workers_are_lost() -> None:
    fake = FakeRay([None, lost(), None, None, lost()], [lost(), None, None, lost()])
    assert sorted(fake.drive()) == list(range(40))
    assert fake.workers == 2 + 4
    sizes = [len(call) for call in fake.calls]
    assert sizes[0] == 1  # nobody knows yet how long a batch takes
    assert max(sizes) > 1  # then some at a time,
    assert sizes[-1] == 1  # and single ones at the end


def test_a_batch_that_loses_every_worker_ends_the_run() -> None:
    with pytest.raises(RuntimeError, match=r"batch 0 lost 3 workers, .* smaller batch_size"):
        FakeRay([lost(), lost(), lost()], []).drive(n=1, count=1)
    with pytest.raises(RuntimeError, match="while starting, Ray lost 3 workers"):
        FakeRay([], [lost(), lost(), lost()]).drive()
    failed = ray.exceptions.RayActorError(actor_init_failed=True)
    with pytest.raises(RuntimeError, match="Ray's workers can't start"):
        FakeRay([], [failed]).drive()


def test_an_error_of_a_method_is_told_as_it_is() -> None:
    cause = ValueError("iterations is -1")
    error = ray.exceptions.RayTaskError("measure", "its traceback", cause)
    with pytest.raises(ValueError, match="iterations is -1"):
        FakeRay([error], []).drive()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (None, "Ray can't start here .too slow.; try again, or use engine='local'"),
        ("far:1", "no Ray cluster at 'far:1' .too slow.; try again"),
    ],
)
def test_a_ray_that_does_not_start(
    address: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(*arguments: Any, **settings: Any) -> None:
        raise TimeoutError("too slow")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    absent = SimpleNamespace(is_initialized=lambda: False, init=init)
    with pytest.raises(ConnectionError, match=message), _cluster(absent):
        pass


def test_a_classifier_can_be_pickled(images: torch.Tensor) -> None:
    for kind in ("cnn", "dense", "vit"):
        classifier = make_classifier(kind)
        other = pickle.loads(pickle.dumps(classifier))
        assert torch.equal(other.logits(images), classifier.logits(images))
        assert torch.equal(other.features(images), classifier.features(images))
        for what in ("name", "layer", "labels", "size", "preprocessing", "mean", "std"):
            assert getattr(other, what) == getattr(classifier, what)
