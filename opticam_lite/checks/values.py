"""What functions return and are given, as tensors that can be compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..network import Classifier

Outputs = list[Tensor]  # what one call returned, as tensors on the CPU


def tensors(value: Any) -> Outputs:
    """Return what a function returned as tensors; numbers in a row make one.

    Raises:
        TypeError: If there is something else in it.
    """
    if isinstance(value, Tensor):
        return [value.detach().cpu()]
    if hasattr(value, "to_numpy"):  # of pandas
        value = value.to_numpy()
    if isinstance(value, np.ndarray | np.generic | bool | int | float):
        return [torch.as_tensor(value)]
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    if isinstance(value, list | tuple):
        parts = [part for some in value for part in tensors(some)]
        if parts and all(part.ndim == 0 for part in parts):
            return [torch.tensor([part.item() for part in parts])]
        return parts
    raise TypeError(f"no values, but a {type(value).__name__}")


def close(given: list[Outputs], expected: list[Outputs]) -> bool:
    """Whether the outputs of all calls have equal shapes and values, to a thousandth."""
    return all(
        len(some) == len(others) and all(map(_close, some, others))
        for some, others in zip(given, expected, strict=True)
    )


def _close(given: Tensor, expected: Tensor) -> bool:
    if given.shape != expected.shape:
        return False
    given, expected = given.double(), expected.double()
    finite = expected[expected.isfinite()]
    scale = float(finite.abs().max()) if len(finite) else 0.0
    return given.allclose(expected, rtol=1e-3, atol=1e-3 * scale, equal_nan=True)


def kind(values: Tensor) -> str:
    """Return "bool", "int" or "float"."""
    if values.dtype == torch.bool:
        return "bool"
    return "float" if values.is_floating_point() else "int"


def untouched(one: Any, other: Any) -> bool:
    """Whether inputs are equal: numbers, tensors, networks, and lists of them."""
    if isinstance(one, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, Classifier):
        states = (c.network.state_dict().values() for c in (one, other))
        return _modes(one) == _modes(other) and all(map(torch.equal, *states))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(untouched, one, other))
    return bool(one == other)


def _modes(classifier: Classifier) -> list[tuple[bool, bool]]:
    modules, parameters = classifier.network.modules(), classifier.network.parameters()
    modes = [(m.training, bool(m._forward_hooks)) for m in modules]
    return [*modes, *((p.requires_grad, p.grad is None) for p in parameters)]
