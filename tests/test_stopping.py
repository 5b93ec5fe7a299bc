"""Ctrl-C and SIGTERM, from the first import on: one sentence, exit code 130 or 143."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

import opticam_lite as ol
from opticam_lite import stopping
from opticam_lite.__main__ import main
from opticam_lite.evaluation import read

ROOT = Path(__file__).resolve().parents[1]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
# The process sends itself the signal when this module is about to be imported.
SITE = """
import os, sys

class Stop:
    def find_spec(self, name, *_):
        if name == os.environ["STOP_AT"]:
            os.kill(os.getpid(), int(os.environ["STOP_BY"]))

sys.meta_path.insert(0, Stop())
"""
COMMAND = ["evaluate", "--model", "scenes_resnet", "--data", "scenes", "--methods", "fake-cam"]


def command(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("module", ["opticam_lite", "opticam_lite.reports"])
@pytest.mark.parametrize("number", CODES)
def test_a_signal_during_the_first_import(
    number: signal.Signals, module: str, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITE)
    stops = {"STOP_AT": "torch", "STOP_BY": str(int(number)), "PYTHONPATH": str(tmp_path)}
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    process = command(module, **{**stops, "PYTHONPATH": path})
    shown, told = process.communicate(timeout=120)
    assert process.returncode == CODES[number]
    assert (shown, told.count("\n")) == ("", 1)
    assert "interrupted" in told


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("lost", [False, True], ids=["as it is", "as another error"])
def test_a_signal_during_a_run(
    number: signal.Signals,
    lost: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        except KeyboardInterrupt as error:
            if lost:  # as in code that is deep in a recursion, or half imported
                raise RecursionError from error
            raise

    before = [signal.getsignal(n) for n in CODES]
    monkeypatch.setattr("opticam_lite.__main__.evaluate", interrupted)
    assert main([*COMMAND, "--out", str(tmp_path)]) == CODES[number]
    told = capsys.readouterr().err
    assert told == "opticam_lite: interrupted; the same call goes on where it stopped\n"
    assert [signal.getsignal(n) for n in CODES] == before


def test_an_error_without_a_signal_stays_itself() -> None:
    with pytest.raises(RecursionError), stopping.stoppable():
        raise RecursionError


@pytest.mark.slow
def test_a_terminated_evaluation_goes_on_where_it_stopped(tmp_path: Path) -> None:
    given = [*COMMAND[:-1], "grad-cam", "opti-cam", "--option", "opti-cam.iterations=3"]
    given += ["--limit", "24", "--quiet", "--out", str(tmp_path)]
    process = command("opticam_lite", *given)
    while process.poll() is None and not (tmp_path / "settings.json").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 143
    assert told == "opticam_lite: interrupted; the same call goes on where it stopped\n"
    begun = len(read(tmp_path))
    assert begun < 24 * 2 * 3
    assert main(given) == 0
    classifier, scenes = ol.load_model("scenes_resnet"), ol.load_dataset("scenes")
    methods: dict[str, dict[str, Any]] = {"grad-cam": {}, "opti-cam": {"iterations": 3}}
    expected = ol.evaluate(classifier, scenes, methods, limit=24, progress=None)
    found = read(tmp_path)
    pd.testing.assert_frame_equal(
        found.drop(columns="seconds"), expected.drop(columns="seconds"), rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
def test_a_terminated_report_leaves_nothing_behind(tmp_path: Path) -> None:
    folder, out = tmp_path / "temporary", tmp_path / "out"
    folder.mkdir()
    given = ["WEIGHTS=random", "LIMIT=64", f"OUT={out}"]
    process = command("opticam_lite.reports", *given, TMPDIR=str(folder))
    kernels: list[psutil.Process] = []
    while process.poll() is None and not kernels:
        time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
        kernels = [child for child in children if "ipykernel_launcher" in child.cmdline()]
    assert list(folder.glob("opticam-*/*.ipynb"))
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 143
    assert told.splitlines()[-1] == (
        "report: interrupted; nothing was written but the rows measured so far"
    )
    assert "Traceback" not in told
    assert not list(folder.glob("opticam-*"))
    assert psutil.wait_procs(kernels, timeout=60)[1] == []
    assert [path.name for path in out.iterdir()] == [".lock"]
