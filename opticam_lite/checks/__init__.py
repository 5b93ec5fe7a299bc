"""Checks: an exercise answers what a student hands in, with the symptom and a hint.

`examine` judges, `check` prints and counts the tries. `exercise` says what an exercise is,
`examining` runs and compares, and each `lesson_NN` holds the exercises of a lesson: to add one,
write one entry there.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from typing import Any

from ..registry import check_name
from .examining import SECONDS, Result, judge
from .exercise import Demand, Exercise, Wrong

__all__ = ["EXERCISES", "Demand", "Exercise", "Result", "Wrong", "check", "examine"]

EXERCISES: dict[str, Exercise] = {}
for _file in pkgutil.iter_modules(__path__):
    if _file.name.startswith("lesson_"):
        EXERCISES |= importlib.import_module(f"{__name__}.{_file.name}").EXERCISES

_tries: Counter[str] = Counter()


def examine(name: str, handed_in: Any, *, seconds: float = SECONDS) -> Result:
    """Judge an answer, silently.

    What is handed in runs on small fresh inputs, in a thread of its own. If it doesn't end within
    `seconds`, an exception is raised inside it, which ends every loop of Python code on every
    system. An operation outside Python (one huge product of matrices) can't be interrupted: it is
    left behind, and the symptom says so.

    Args:
        name: The exercise: lesson and number, such as `"02.1"`.
        handed_in: A function, or a value, as the exercise says.
        seconds: The time that the answer has.

    Raises:
        ValueError: If there is no such exercise.
    """
    check_name("exercise", name, EXERCISES)
    return judge(EXERCISES[name], handed_in, seconds)


def check(name: str, handed_in: Any) -> None:
    """Print ✓, or what is seen of a wrong answer and a hint; another hint from the third try on.

    Args:
        name: The exercise: lesson and number, such as `"02.1"`.
        handed_in: A function, or a value, as the exercise says.

    Raises:
        ValueError: If there is no such exercise.
    """
    result = examine(name, handed_in)
    if result.right:
        _tries.pop(name, None)
        print(f"✓ {name}")  # noqa: T201
        return
    _tries[name] += 1
    hints = [result.hint, *([result.more] if _tries[name] >= 3 else [])]
    print(f"✗ {name}: {result.symptom}.", *(f"  Hint: {h}" for h in hints if h), sep="\n")  # noqa: T201
