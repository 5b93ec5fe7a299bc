"""An exercise as data: what is handed in, a reference, and named wrong answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .values import Outputs, close

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Wrong:
    """A classic wrong answer.

    Attributes:
        symptom: What is seen of it, a sentence that begins in lower case and has no full stop.
        hint: A sentence or a question that helps, without the answer.
        answer: The answer itself; what returns the same values for all fresh inputs has this fault.
    """

    symptom: str
    hint: str
    answer: Any


@dataclass(frozen=True)
class Demand:
    """What every right answer fulfils, for an exercise that has many.

    Attributes:
        symptom: What is seen where it isn't fulfilled.
        hint: A sentence that helps.
        holds: `(inputs, outputs)` of one call → whether it is fulfilled.
    """

    symptom: str
    hint: str
    holds: Callable[[Inputs, Outputs], bool]


def as_it_is(function: Callable[..., Any], *inputs: Any) -> Any:
    """Call a function."""
    return function(*inputs)


@dataclass(frozen=True)
class Exercise:
    """An exercise of a lesson.

    Attributes:
        asks: What is handed in, after "hand in …".
        reference: A right answer: a function; or a value, where `inputs` is None.
        inputs: Seed → the arguments of one call, equal for equal seeds. None: a value is handed in.
        wrong: At least five wrong answers, each with a symptom of its own.
        hint: Where the symptom is none of these.
        more: A second hint, at the third try.
        demands: Whoever fulfils them is right; without any, who returns what `reference` returns.
        fresh: How many inputs are tried, so that no coincidence passes.
        batched: Places of the arguments that hold one row an image: a row of the result may
            depend on its image alone.
        within: The range of a right result's values.
        random: Whether a right result may differ from call to call.
        call: What is done with the function and the inputs, if it isn't just called with them.
        same: `(given, expected)`, the outputs of all calls → whether they count as equal.
    """

    asks: str
    reference: Any
    inputs: Callable[[int], Inputs] | None
    wrong: tuple[Wrong, ...]
    hint: str
    more: str
    demands: tuple[Demand, ...] = ()
    fresh: int = 3
    batched: tuple[int, ...] = ()
    within: tuple[float, float] | None = None
    random: bool = False
    call: Callable[..., Any] = as_it_is
    same: Callable[[list[Outputs], list[Outputs]], bool] = close
