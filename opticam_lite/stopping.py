"""Ctrl-C and SIGTERM end a command with one sentence and exit code 130 or 143, at any moment."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

COMMANDS = ("opticam_lite", "opticam_lite.reports")


class Stopped(KeyboardInterrupt):
    """A command was stopped by a signal.

    Attributes:
        code: Its exit code, 128 and the number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number


def while_importing() -> None:
    """End at once at a signal, if a command is being imported: nothing is to be cleaned up yet.

    An exception would pass through what is half imported, which makes other errors of it.
    """
    # This is what sys.argv holds while Python looks for the module that `-m` names.
    if sys.argv[:1] == ["-m"] and {*COMMANDS} & {*sys.orig_argv}:
        _handle(_end)


def _end(number: int, _: FrameType | None) -> None:
    os.write(2, b"opticam_lite: interrupted before anything was run\n")
    os._exit(128 + number)


def _handle(handler: Any) -> dict[int, Any]:
    """Set the handler of both signals, and return those before; one that is ignored stays so."""
    if threading.current_thread() is not threading.main_thread():  # no other may set handlers
        return {}
    numbers = (signal.SIGINT, signal.SIGTERM)
    before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
    for number, old in before.items():
        signal.signal(number, old if old is signal.SIG_IGN else handler)
    return before


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` at a signal, whatever the code that it interrupts makes of the exception."""
    got: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        got.append(number)
        raise Stopped(number)

    before = _handle(stop)
    try:
        yield
    except BaseException as error:
        if got and not isinstance(error, Stopped):
            raise Stopped(got[0]) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
