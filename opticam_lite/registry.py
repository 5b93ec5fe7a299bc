"""Named functions and their options, errors that list the close matches, and seeds."""

from __future__ import annotations

import difflib
import inspect
import math
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch

LARGEST_SEED = 2**63 - 1  # that PyTorch and NumPy take


def unknown_name(kind: str, name: object, names: Iterable[str], *, show: int = 40) -> str:
    """Return one sentence that says a name is unknown, which are close to it and which exist.

    Args:
        kind: What the name stands for, such as `"method"`.
        name: The name that was given.
        names: The valid names.
        show: List at most this many valid names; the close matches are always listed.
    """
    names = list(names)
    lowered = {n.lower(): n for n in names}
    close = [lowered[n] for n in difflib.get_close_matches(str(name).lower(), lowered, n=5)]
    message = f"unknown {kind} {name!r}"
    message += f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    if len(names) <= show:
        return message + f" Valid names: {', '.join(names)}."
    return message + f" ({len(names)} valid names; first: {', '.join(names[:8])}, …)"


def check_name(kind: str, name: object, names: Collection[str]) -> None:
    """Raise ValueError, with the sentence of `unknown_name`, unless a name is one of the names."""
    if name not in names:
        raise ValueError(unknown_name(kind, name, names))


def some_of(values: Sequence[object]) -> str:
    """Return the first eight of some values as text.

    >>> some_of(range(99))
    '0, 1, 2, 3, 4, 5, 6, 7, …'
    """
    return ", ".join([*map(str, values[:8]), *("…" for _ in values[8:9])])


def names_in(text: str) -> list[str]:
    """Return the names in a text, each once, separated by commas, spaces or both.

    >>> names_in("AD, AG AI,AD")
    ['AD', 'AG', 'AI']
    """
    return list(dict.fromkeys(text.replace(",", " ").split()))


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Return a whole number as an int.

    Raises:
        ValueError: If it is no whole number, less than the least or more than the most.
    """
    whole = (
        isinstance(value, int | float | np.number) and math.isfinite(value) and value == int(value)
    )
    if not whole or value < least or (most is not None and value > most):
        needed = f"≥ {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {value!r}; a whole number {needed} is needed")
    return int(value)


def check_seed(seed: Any) -> int:
    """Return a seed as an int; raise ValueError unless it is a whole number from 0 to 2⁶³ − 1."""
    return whole_number("seed", seed, 0, LARGEST_SEED)


_seeding = threading.RLock()


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the global generators for code that takes no other, and restore their state afterwards.

    One thread at a time: the generators are those of the whole process.

    Args:
        seed: For NumPy's generator and PyTorch's on the CPU.
        device: Seed its generator, too, if it is a GPU.
    """
    gpus = [device.index] if device is not None and device.type == "cuda" else []
    generators = [torch.default_generator, *(torch.cuda.default_generators[i] for i in gpus)]
    with _seeding, torch.random.fork_rng(devices=gpus):
        state = np.random.get_state()  # noqa: NPY002
        try:
            for generator in generators:
                generator.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            yield
        finally:
            np.random.set_state(state)  # noqa: NPY002


@dataclass(frozen=True)
class Entry:
    """A registered function with its title and the paper that defines it."""

    name: str
    function: Callable[..., Any]
    title: str
    source: str

    @property
    def defaults(self) -> dict[str, Any]:
        """The keyword-only arguments that the function takes, with their default values."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    @property
    def options(self) -> list[str]:
        """The names of these arguments."""
        return list(self.defaults)

    def check_options(self, options: Iterable[str], others: Iterable[str] = ()) -> None:
        """Raise TypeError for an option that the function does not take; `others` are named."""
        known = [*self.options, *others]
        for option in options:
            if option not in self.options:
                takes = ", ".join(known) or "no options"
                close = difflib.get_close_matches(option, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else "."
                raise TypeError(f"{self.name} has no option {option!r}{hint} It takes: {takes}.")


E = TypeVar("E", bound=Entry)
F = TypeVar("F", bound=Callable[..., Any])


class Registry(Generic[E]):
    """Names → functions. `registry.register("name", title=…, source=…)` is a decorator.

    Args:
        kind: What the names stand for, such as `"method"`.
        entry: The dataclass of the entries; `register` takes its fields as keyword arguments.
    """

    def __init__(self, kind: str, entry: type[E]) -> None:
        self.kind = kind
        self._entry = entry
        self._entries: dict[str, E] = {}

    def register(self, name: str, *, title: str, source: str, **facts: Any) -> Callable[[F], F]:
        """Return a decorator that registers a function as `name` and returns it unchanged."""

        def decorate(function: F) -> F:
            if name in self._entries:
                raise ValueError(f"a {self.kind} named {name!r} is registered already")
            self._entries[name] = self._entry(name, function, title, source, **facts)
            return function

        return decorate

    def __getitem__(self, name: str) -> E:
        check_name(self.kind, name, self._entries)
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries
