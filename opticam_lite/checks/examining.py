"""The engine: run what is handed in on fresh inputs, compare it, and say what is seen of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .exercise import Exercise, Inputs, as_it_is
from .running import EndlessError, attempt, place_of, undisturbed
from .values import Outputs, close, kind, tensors, untouched

SECONDS = 10.0  # for what is handed in, on all inputs together


@dataclass(frozen=True)
class Result:
    """What a check says.

    Attributes:
        right: Whether the answer is right.
        symptom: What is seen of it if not, a sentence without a full stop.
        hint: What may help.
        more: Another hint, for the third try.
    """

    right: bool
    symptom: str = ""
    hint: str = ""
    more: str = ""


class _SeenError(Exception):
    """A symptom and its hint; an empty hint stands for the exercise's own."""


def judge(exercise: Exercise, handed_in: Any, seconds: float = SECONDS) -> Result:
    """Say whether an answer is right; the network and the global state are left as found.

    Args:
        exercise: The exercise.
        handed_in: The answer.
        seconds: It is stopped if it takes longer, where Python can stop it: see `running.attempt`.
    """
    try:
        with undisturbed():
            _look(exercise, handed_in)
            inputs = all_inputs(exercise)
            returned = _run(exercise, handed_in, inputs, seconds)
            expected = answers(exercise, exercise.reference, inputs)
            given = _values(returned, expected)
            _judge(exercise, handed_in, inputs, given, [*map(tensors, expected)], seconds)
    except _SeenError as seen:
        symptom, hint = seen.args
        return Result(False, symptom, hint or exercise.hint, exercise.more)
    return Result(True)


def all_inputs(exercise: Exercise) -> list[Inputs]:
    """Return the arguments of each call."""
    return [()] if exercise.inputs is None else [*map(exercise.inputs, range(exercise.fresh))]


def answers(exercise: Exercise, answer: Any, inputs: list[Inputs]) -> list[Any]:
    """Return what an answer of the exercise returns, for each call."""
    return [answer] if exercise.inputs is None else [exercise.call(answer, *i) for i in inputs]


def matching(exercise: Exercise, inputs: list[Inputs], given: list[Outputs]) -> Iterator[Any]:
    """Yield the wrong answers that give the same values; good inputs tell all of them apart."""
    for wrong in exercise.wrong:
        if exercise.same(given, [*map(tensors, answers(exercise, wrong.answer, inputs))]):
            yield wrong


def _look(exercise: Exercise, handed_in: Any) -> None:
    """See what can be seen before anything is run."""
    if _missing(handed_in):
        raise _SeenError("nothing is handed in yet", f"Hand in {exercise.asks}.")
    if exercise.inputs is not None and not callable(handed_in):
        raise _SeenError(
            f"this is a {type(handed_in).__name__}, not a function",
            f"Hand in {exercise.asks}: its name alone, without brackets behind it.",
        )
    if exercise.inputs is not None and exercise.call is as_it_is:
        try:
            signature = inspect.signature(handed_in)
        except ValueError:  # of some built-in functions
            return
        try:
            signature.bind(*exercise.inputs(0))
        except TypeError:
            raise _SeenError(
                f"the function takes the arguments {signature}", f"Hand in {exercise.asks}."
            ) from None


def _missing(value: Any) -> bool:
    if isinstance(value, dict | list | tuple):
        parts = value.values() if isinstance(value, dict) else value
        return not value or any(map(_missing, parts))
    return value is None or value is ...


def _run(exercise: Exercise, handed_in: Any, inputs: list[Inputs], seconds: float) -> list[Any]:
    """Return what the answer returns for each of the inputs."""
    try:
        returned = attempt(lambda: answers(exercise, handed_in, inputs), seconds)
    except NotImplementedError as error:
        what = str(error) or "the function is not written"
        raise _SeenError(f"nothing is handed in yet: {what}", f"Hand in {exercise.asks}.") from None
    except EndlessError as error:
        stopped = "was stopped" if error.stopped else "can't be stopped: restart the kernel"
        raise _SeenError(
            f"the function did not end within {seconds:g} seconds and {stopped}",
            "Is there a loop whose condition never changes, or one over single pixels?",
        ) from None
    except (Exception, SystemExit) as error:
        message = next(iter(str(error).splitlines()), "")[:200]
        name = type(error).__name__
        raise _SeenError(f"your code raises {name}{place_of(error)}: {message}", "") from None
    torch.set_default_dtype(torch.float32)  # or the inputs to compare with might be others
    if not all(map(untouched, inputs, all_inputs(exercise))):
        raise _SeenError(
            "the function changes what it is given",
            "Work on a copy (`.clone()`), with operations whose names don't end in `_`.",
        )
    return returned


def _values(returned: list[Any], expected: list[Any]) -> list[Outputs]:
    """Return the values of each call."""
    given = []
    for some, model in zip(returned, expected, strict=True):
        if some is None:
            raise _SeenError("the function returns nothing", "Is a `return` reached?")
        array = isinstance(model, Tensor) and model.ndim > 1
        try:
            given.append(tensors(some))
        except TypeError:
            array = True
        if array and not isinstance(some, Tensor):
            needed = f"a tensor {tuple(model.shape)}" if isinstance(model, Tensor) else "numbers"
            raise _SeenError(f"the result is a {type(some).__name__}; {needed}: that is needed", "")
    return given


def _judge(
    exercise: Exercise,
    handed_in: Any,
    inputs: list[Inputs],
    given: list[Outputs],
    expected: list[Outputs],
    seconds: float,
) -> None:
    """See whether the values are right, and if not, why not: first, by a wrong answer's name."""
    try:
        if not exercise.demands and _kinds_fit(given, expected) and exercise.same(given, expected):
            return
        _see_form(exercise, given, expected)
        if exercise.inputs is not None:
            _see_dependence(exercise, handed_in, given, expected, seconds)
        for demand in exercise.demands:
            if not all(map(demand.holds, inputs, given)):
                raise _SeenError(demand.symptom, demand.hint)
        if not exercise.demands:
            _see_values(given, expected)
    except _SeenError:
        for wrong in matching(exercise, inputs, given):
            raise _SeenError(wrong.symptom, wrong.hint) from None
        raise


def _kinds_fit(given: list[Outputs], expected: list[Outputs]) -> bool:
    """Whether values are of the kind that is needed; a whole number serves as a real one."""
    pairs = zip(chain(*given), chain(*expected), strict=False)
    return all((kind(a), kind(b)) in {("int", "float"), (kind(b), kind(b))} for a, b in pairs)


def _see_form(exercise: Exercise, given: list[Outputs], expected: list[Outputs]) -> None:
    """See NaN, a wrong shape, kind or range."""
    if any(not some.isfinite().all() for some in chain(*given)):
        raise _SeenError("some values are NaN or infinite", "Where can a divisor be 0?")
    for some, others in zip(given, expected, strict=True):
        shapes = [", ".join(str(tuple(part.shape)) for part in parts) for parts in (some, others)]
        if shapes[0] != shapes[1]:
            raise _SeenError(
                f"the result has the shape {shapes[0]}; {shapes[1]} is needed",
                "An axis too many or too few? `mean`, `sum` and `max` take `dim=` and `keepdim=`.",
            )
    if not _kinds_fit(given, expected):
        has, needed = (
            ", ".join(str(part.dtype) for part in parts[0]) for parts in (given, expected)
        )
        raise _SeenError(
            f"the result is of dtype {has}; {needed} is needed".replace("torch.", ""),
            "`.float()`, `int(…)`, or the place of a value instead of the value itself?",
        )
    if exercise.within is not None:
        low, high = exercise.within
        if any(some.min() < low - 1e-5 or some.max() > high + 1e-5 for some in chain(*given)):
            raise _SeenError(
                f"some values lie outside {low:g} to {high:g}", "Print `min()` and `max()`."
            )


def _see_dependence(
    exercise: Exercise,
    handed_in: Any,
    given: list[Outputs],
    expected: list[Outputs],
    seconds: float,
) -> None:
    """See a result that depends on too little, on chance, or on the other images of its batch."""
    assert exercise.inputs is not None
    if _constant(given) and not _constant(expected):
        raise _SeenError(
            "the result is the same for all inputs",
            "Does the function use its arguments, or variables of the notebook?",
        )
    first = exercise.inputs(0)
    alone = list(first)
    for place in exercise.batched:
        alone[place] = alone[place][:1]
    try:
        again, single = (
            tensors(answer)
            for answer in attempt(
                lambda: answers(exercise, handed_in, [first, tuple(alone)]), seconds
            )
        )
    except (Exception, SystemExit):  # it has run on the inputs that count
        return
    if not exercise.random and not close([again], given[:1]):
        raise _SeenError(
            "the same input gives another result each time",
            "Is something random, or does the function keep something from call to call?",
        )
    if exercise.batched and not close([single], [[some[:1] for some in given[0]]]):
        raise _SeenError(
            "the result of an image depends on the other images of the batch",
            "Which axis is the batch? `min`, `max`, `mean`, `softmax` are taken for each image.",
        )


def _constant(outputs: list[Outputs]) -> bool:
    return len(outputs) > 1 and all(
        len(some) == len(outputs[0]) and all(map(torch.equal, some, outputs[0]))
        for some in outputs[1:]
    )


def _see_values(given: list[Outputs], expected: list[Outputs]) -> None:
    """See how the values of a result of the right form differ."""
    right = sum(close([a], [b]) for a, b in zip(given, expected, strict=True))
    if right:
        raise _SeenError(f"it is right for {right} of {len(given)} fresh inputs only", "")
    a, b = (torch.cat([x.double().flatten() for x in chain(*y)]) for y in (given, expected))
    if len(a) > 2 and a.any() and b.any():
        factor, offset = float(a @ b / (b @ b)), float((a - b).mean())
        if close([[a]], [[factor * b]]):
            raise _SeenError(f"the result is {factor:.3g} times what it should be", "Why?")
        if close([[a]], [[b + offset]]):
            raise _SeenError(f"the result is off by {offset:.3g} throughout", "Why?")
    raise _SeenError("it runs, and the result has the right form, but other values", "")
