"""From logits to probabilities, and networks that return probabilities already."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

_Function = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, tuple[_Function, _Function]] = {
    "softmax": (partial(torch.softmax, dim=1), partial(torch.log_softmax, dim=1)),
    "sigmoid": (torch.sigmoid, F.logsigmoid),
}
"""Name → the functions from logits `(N, classes)` to p and to log p."""

_SQUASHING = ("Sigmoid", "Hardsigmoid", "Softmax")
# Operations that only move, select or join values.
_MOVING = (
    "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Expand", "Clone", "ToCopy",
    "Slice", "Select", "Index", "Cat", "Stack", "Split", "Unbind", "Transpose", "Permute", "Clamp",
)  # fmt: skip


@torch.enable_grad()
def ends_in_probabilities(network: _Function, x: Tensor) -> bool:
    """Whether a sigmoid or softmax makes the outputs of a network, by autograd's own record.

    The values alone do not tell: all logits of a network of few classes may lie in [0, 1].

    Args:
        network: Any, images → logits.
        x: Its input; the network is run once more.
    """
    y = network(x.clone().requires_grad_().clone())  # it may work in place
    waiting = [y.grad_fn]
    while waiting:
        step = waiting.pop()
        name = step.name().partition("Backward")[0] if step else ""
        if name in _SQUASHING:
            return True
        if step and name in _MOVING:
            waiting += [before for before, _ in step.next_functions]
    return False
