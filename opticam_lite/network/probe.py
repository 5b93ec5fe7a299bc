"""What is asked of a network before it is cut: one argument, logits, the same answer each time."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .activation import ends_in_probabilities
from .feature_maps import CutError


def logits_of(output: Any) -> Any:
    """Return the logits of a network's output: its entry or attribute `logits`, else all of it."""
    if isinstance(output, Mapping):
        return output.get("logits", output)
    return getattr(output, "logits", output)


def tensor_of(output: Any) -> Any:
    """Return the first value of a tuple or list if it is a tensor, else all of it."""
    several = type(output) in (tuple, list) and output and isinstance(output[0], Tensor)
    return output[0] if several else output


@contextmanager
def hooked(
    modules: Mapping[str, nn.Module], hook: Callable[[str, Any, Any], Any]
) -> Iterator[None]:
    """Call `hook(name, arguments, output)` after each of these modules, in this context only.

    What it returns takes the place of the output unless it is None. Other threads pass through.
    """
    thread = threading.get_ident()

    def after(name: str, module: nn.Module, arguments: Any, output: Any) -> Any:
        return hook(name, arguments, output) if threading.get_ident() == thread else None

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(partial(after, name)))
        yield


def check_arguments(network: nn.Module) -> None:
    """Raise CutError if the network needs more than images."""
    parameters = list(inspect.signature(network.forward).parameters.values())[1:]
    for p in parameters:
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise CutError(
                f"{type(network).__name__}.forward takes {p.name!r} besides the images; wrap it in "
                f"a module whose forward(self, images) returns self.network(images, {p.name}) with "
                f"your choice of {p.name!r}, as docs/own_networks.md shows"
            )


def check_logits(network: nn.Module, output: Any, x: Tensor) -> None:
    """Raise CutError unless the output for images x is finite logits `(N, classes)`."""
    kind = type(network).__name__
    if not isinstance(output, Tensor) or output.ndim != 2:
        is_tensor = isinstance(output, Tensor)
        found = tuple(output.shape) if is_tensor else f"a {type(output).__name__}"
        raise CutError(
            f"{kind} must return logits of shape (N, classes), not {found}; wrap it in a module "
            "that returns them alone, such as output[0] or output['out']"
        )
    if not output.isfinite().all():
        raise CutError(
            f"{kind} returns logits that are not finite on random images; look for NaN in its "
            "weights"
        )
    if output.amin() >= 0 and (output.sum(1) - 1).abs().amax() < 1e-4:
        raise CutError(
            f"{kind} returns probabilities (they sum to 1), and their softmax would be taken "
            "again; leave out its last softmax, or wrap it in a module that returns "
            "output.clamp(min=1e-30).log()"
        )
    # All are 0 if the last layer is before training, and no sigmoid gives 0.
    inside = output.amin() >= 0 and 0 < output.amax() <= 1
    if inside and ends_in_probabilities(lambda x: logits_of(network(x)), x):
        raise CutError(
            f"{kind} returns probabilities (each in [0, 1]), not logits; leave out its last "
            "sigmoid and pass activation='sigmoid', or wrap it in a module that returns "
            "output.logit(1e-6)"
        )


@torch.no_grad()
def check_steady(network: nn.Module, x: Tensor) -> None:
    """Raise CutError, naming the module, if the network answers differently to the same images."""
    modules = dict(network.named_modules())
    calls: list[tuple[str, list[Tensor]]] = []

    def record(name: str, arguments: Any, output: Any) -> None:
        values = [tensor_of(arguments), tensor_of(logits_of(output))]
        if all(isinstance(value, Tensor) for value in values):
            calls.append((name, [value.clone() for value in values]))

    with hooked(modules, record):
        network(x.clone())
        network(x.clone())
    half = len(calls) // 2
    for (name, (given, made)), (_, again) in zip(calls[:half], calls[half:], strict=False):
        if torch.equal(given, again[0]) and not torch.equal(made, again[1]):
            kind = type(modules[name]).__name__
            raise CutError(
                f"{type(network).__name__} answers differently each time, as does "
                f"{f'{name!r} ({kind})' if name else f'the forward of {kind}'} for the same input; "
                "look there for F.dropout(x) without training=self.training, a dropout made within "
                "forward, other random numbers, or counters"
            )
