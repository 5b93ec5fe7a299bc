"""Digests of what rows depend on: values, and the code of a function with all that it uses.

The code that is loaded is read, not its files: a method that was defined in a notebook counts like
one of the package, and a file that was edited but not loaded doesn't count.
"""

from __future__ import annotations

import dis
import hashlib
import json
import re
import sys
import sysconfig
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PACKAGE = __name__.partition(".")[0]
_INSTALLED = ("site-packages", "dist-packages", sysconfig.get_path("stdlib"))
_SCALAR = str | bytes | int | float | complex | None | type(...) | torch.dtype | re.Pattern
# What methods, wrappers, properties and cells, partial functions hold.
_HELD = ("__func__", "__wrapped__", "fget", "cell_contents", "func", "args", "keywords")


def digest(data: bytes) -> str:
    """Return a short digest."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as JSON values: tensors become their digest, callbacks are left out."""
    return {name: as_json(value) for name, value in sorted(options.items()) if not callable(value)}


def as_json(value: Any) -> Any:
    """Return a value as JSON has it; a tensor as its shape and digest."""
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} {digest(bytes_of(value))}"
    return json.loads(json.dumps(value, default=str))


def bytes_of(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor's values."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def code_digest(*roots: Any) -> str:
    """Return a digest of the code of functions and classes, and of all that it uses by name.

    Followed at any depth: functions, classes and constants of this package, of notebooks and of
    files that are not installed. Not followed: what is installed (its version tells it apart), what
    an instance holds, and what is looked up by a string, such as another method. Comments, line
    numbers and docstrings of functions don't count; the version of Python does.
    """
    state, queue = hashlib.blake2b(digest_size=8), deque[Any]()
    seen: dict[int, tuple[int, Any]] = {}  # keeps the values: the id of one that is gone is reused

    def mark(value: Any) -> str:
        if isinstance(value, _SCALAR):
            return repr(value)
        if id(value) not in seen:
            seen[id(value)] = len(seen), value
            queue.append(value)
        return f"#{seen[id(value)][0]}"

    state.update(" ".join(map(mark, roots)).encode())
    while queue:
        value = queue.popleft()
        state.update(" ".join(map(mark, [type(value).__name__, *_parts(value)])).encode())
    return state.hexdigest()


def _parts(value: Any) -> Iterator[Any]:
    """Yield what a value is, as text and numbers, and the values that it uses."""
    if isinstance(value, Tensor):
        yield as_json(value)
    elif isinstance(value, np.ndarray):
        yield from (str(value.dtype), value.shape, value.tobytes())
    elif isinstance(value, set | frozenset):
        yield from sorted(map(repr, value))  # their order varies from process to process
    elif isinstance(value, tuple | list | dict):
        yield from value.items() if isinstance(value, dict) else value
    elif isinstance(value, CodeType):
        yield from (value.co_name, value.co_code, value.co_exceptiontable, value.co_names)
        yield from (value.co_varnames, value.co_freevars, value.co_consts)
    elif isinstance(value, FunctionType) and _is_own(value):
        yield from _parts_of_function(value)
    elif isinstance(value, type) and _is_own(value):
        yield value.__bases__
        for name, member in vars(value).items():
            if isinstance(member, FunctionType) or not name.startswith("__"):
                yield from (name, member)
    else:
        yield from (getattr(value, name, None) for name in ("__module__", "__name__"))
        yield from (getattr(value, name) for name in _HELD if hasattr(value, name))
        yield type(value)


def _parts_of_function(function: FunctionType) -> Iterator[Any]:
    code = function.__code__
    if code.co_consts[:1] == (function.__doc__,):
        code = code.replace(co_consts=(None, *code.co_consts[1:]))
    yield from (code, function.__defaults__, function.__kwdefaults__, function.__closure__)
    names = _names(code)
    for name in names["LOAD_GLOBAL"]:
        used = function.__globals__.get(name)
        if name not in names["STORE_GLOBAL"]:  # what the function assigns itself is no constant
            yield used
        if isinstance(used, ModuleType) and _is_own(used):
            yield from (getattr(used, member, None) for member in names["LOAD_ATTR"])


@cache
def _names(code: CodeType) -> dict[str, dict[str, None]]:
    """Return what a code and those of the functions in it load, assign and import by name."""
    names: dict[str, dict[str, None]] = defaultdict(dict)
    codes = [code]
    for inner in codes:
        codes += [constant for constant in inner.co_consts if isinstance(constant, CodeType)]
        for step in dis.get_instructions(inner):
            names[step.opname.replace("METHOD", "ATTR")][str(step.argval)] = None
    return names


def _is_own(value: Any) -> bool:
    """Whether a module, or what is defined in one, is of this package or not installed."""
    name = value.__name__ if isinstance(value, ModuleType) else value.__module__
    if name is None or name.partition(".")[0] in (_PACKAGE, "__main__"):
        return True
    file = getattr(sys.modules.get(name), "__file__", None)
    return file is not None and not any(place in file for place in _INSTALLED)
