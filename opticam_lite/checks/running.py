"""Run code of others: for a limited time, without a trace left behind; say where it failed."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import random
import sysconfig
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

OURS = (str(Path(__file__).parent.parent), sysconfig.get_path("stdlib"), "<frozen")
INSTALLED = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))


class EndlessError(Exception):
    """Code did not end in time.

    Attributes:
        stopped: False if it could not be stopped, because it is busy outside Python.
    """

    def __init__(self, seconds: float, stopped: bool) -> None:
        super().__init__(f"no end after {seconds:g} seconds")
        self.stopped = stopped


class _Stop(BaseException):
    """Raised inside code that takes too long; `except Exception` doesn't stop it."""


class _Nowhere(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


def attempt(function: Callable[[], Any], seconds: float) -> Any:
    """Return what a function returns, or raise what it raises.

    It runs in a thread of its own, in which an exception can be raised from outside, on every
    system. An operation outside Python is not interrupted; such a thread is left behind.

    Raises:
        EndlessError: If it has not returned after `seconds`.
    """
    got: dict[str, Any] = {}

    def work() -> None:
        try:
            got["value"] = function()
        except _Stop:
            pass
        except BaseException as error:
            got["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        thread.join(seconds)
    finally:  # also when the user interrupts
        for _ in range(10):  # code that catches everything may catch the first ones
            if thread.is_alive():
                name = ctypes.c_ulong(thread.ident or 0)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(name, ctypes.py_object(_Stop))
                thread.join(0.2)
    if "error" in got:
        raise got["error"]
    if "value" not in got:
        raise EndlessError(seconds, stopped=not thread.is_alive())
    return got["value"]


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Seed the global generators; leave them and PyTorch's settings as found; print nothing."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    quiet = contextlib.redirect_stdout(_Nowhere()), contextlib.redirect_stderr(_Nowhere())
    try:
        with quiet[0], quiet[1], warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            torch.default_generator.manual_seed(0)
            np.random.seed(0)  # noqa: NPY002
            random.seed(0)
            torch.set_default_dtype(torch.float32)
            torch.set_num_threads(1)  # more don't serve what is small, and wait for each other
            yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)


def place_of(error: BaseException) -> str:
    """Return the last line of the user's own code that an error passed through, or nothing."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        installed = any(part in frame.filename for part in INSTALLED)
        if not installed and not frame.filename.startswith(OURS):
            return f", in line {frame.lineno} of {frame.name}: {frame.line}"
    return ""
