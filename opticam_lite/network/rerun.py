"""The second way to cut a network, for those that can't be traced: run it again.

`split` runs the network and records the layer's output. `head` runs the network **again** on the
same images, with the given maps in the place of that output. So `head(*split(x))` is exactly the
network, but a head costs a whole run. A forward hook records or replaces for one call's length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from .cut import Cut, Cuttable, Traced, TraceError, does_nothing, parameters_in
from .feature_maps import PROBES, CutError
from .probe import check_steady, hooked, logits_of, tensor_of
from .quick_copy import usual


def opened(network: nn.Module, size: tuple[int, int], layer: str | None) -> Cuttable:
    """Return the way to cut a network: by its trace, or by running it again where it has none."""
    try:
        traced = Traced(network, size)
    except TraceError as error:
        return Rerun(network, size, str(error))
    return reaching(traced, layer)


@usual()
def reaching(way: Cuttable, layer: str | None) -> Cuttable:
    """Return the way of cutting that reaches a layer: the given one, or running the network again.

    Modules that can't be traced are single operations of a trace. Unless the trace has the layer,
    the network is run again if the layer lies within one of them, if they hold more than half of
    the network's parameters, or if nothing else gives maps.
    """
    if not isinstance(way, Traced) or not way.taken_whole or layer in way.layers:
        return way
    network, whole = way.network, way.taken_whole
    most = parameters_in(network, whole) > parameters_in(network, [""]) / 2
    inside = layer is not None and any(layer.startswith(f"{name}.") for name in whole)
    if not (most or inside or not way.layers):
        return way
    rerun = Rerun(network, way.size, "; ".join(whole.values()))
    return rerun if rerun.layers or not way.layers else way


class Rerun(Cuttable):
    """A network that is run again for its head.

    Its layers are the modules that are run once for a batch and whose output, or the first tensor
    of it, is a set of maps that depend on the image and on which the logits depend. Its graph is
    the sequence of its modules' calls, not of all operations.

    Args:
        network, size: As for `Cuttable`.
        why: Why it is not traced.
    """

    def __init__(self, network: nn.Module, size: tuple[int, int], why: str) -> None:
        super().__init__(network, size)
        self.why = why
        self._shapes = {}
        self._read: dict[str, bool] = {}
        self._record()
        self.values = sum(shape.numel() // PROBES for shape in self._shapes.values())

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _record(self) -> None:
        """Run the network once; find its layers, and by gradients which of them are read."""
        times: Counter[str] = Counter()
        made: dict[str, tuple[fx.Node, Tensor]] = {}
        # A tensor's id, and how many operations have worked in place on it → node and tensor. All
        # tensors are kept, so that no other gets the id.
        nodes: dict[tuple[int, int], tuple[fx.Node, Tensor]] = {}
        self.graph = fx.Graph()
        last = self.graph.placeholder("images")
        read: list[Tensor] = []

        def record(name: str, arguments: Any, output: Any) -> None:
            nonlocal last
            times[name] += 1
            value, module = tensor_of(output), self.modules[name]
            if not isinstance(value, Tensor) or does_nothing(module):
                return
            key = id(value), value._version
            if key not in nodes:
                last = self.graph.call_module(name, (last,))
                last.meta["nn_module_stack"] = {name: (name, type(module))}
                nodes[key], self._shapes[last] = (last, value), value.shape
            if value.shape[:1] == (PROBES,) and not torch.equal(value[0], value[1]):
                made[name] = nodes[key]
            # The weights of the last linear layer may be 0 before training: its input counts, too.
            if type(module) is nn.Linear and value.ndim == 2:
                read[:] = arguments[:1]

        with hooked({name: module for name, module in self.modules.items() if name}, record):
            y = logits_of(self.network(self._input().requires_grad_().clone()))
        if not torch.allclose(y, self._expected, rtol=1e-4, atol=1e-5):
            check_steady(self.network, self._input())
        self.graph.output(last)
        found = self._find_layers({name: made[name][0] for name in made if times[name] == 1})
        ends = [(value * self._random(value.shape, 1)).sum() for value in (y, *read)]
        try:
            given = [made[name][1] for name in found]
            gradients: Any = torch.autograd.grad(ends, given, allow_unused=True)
        except RuntimeError:  # something detaches a value or changes it in place
            gradients = [None] * len(found)
        for (name, (_, layout)), g in zip(found.items(), gradients, strict=True):
            if g is not None and g.any():
                self._read[name] = not layout.prefix or bool(g[:, layout.prefix :].any())
            elif self._decides(name):
                self._read[name] = True
        self.layers = {name: found[name] for name in self._read}

    @torch.no_grad()
    def _decides(self, name: str) -> bool:
        """Whether the logits change if two images exchange a module's output."""
        with changed(self.modules[name], lambda value: value.flip(0)):
            return not torch.equal(logits_of(self.network(self._input())), self._expected)

    def reads(self, layer: str) -> bool:
        """Whether the logits depend on a layer's maps, not only on its prefix tokens."""
        return self._read[layer]

    def largest(self, layer: str | None = None) -> int:
        """Return the number of values per image of the largest tensor: a head runs everything."""
        return super().largest()

    def cut(self, layer: str) -> Cut:
        """Return the two halves of the network around a layer: each is a run of all of it."""
        (_, layout), module, network = self.place(layer), self.modules[layer], self.network

        def trunk(x: Tensor) -> tuple[Tensor, Tensor]:
            recorded = []

            def record(value: Tensor) -> Tensor:
                recorded.append(value.clone())  # the next operation may work in place
                return value

            with changed(module, record):
                network(x.clone())
            return recorded[0], x

        def tail(value: Tensor, x: Tensor) -> Any:
            with changed(module, lambda _: value.clone()):
                return network(x.clone())

        return Cut(layout, trunk, tail, None)


@contextmanager
def changed(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within this context put `change(output)` in the place of a module's output.

    Raises:
        CutError: If the module is not run exactly once.
    """
    times = 0

    def hook(name: str, arguments: Any, output: Any) -> Any:
        nonlocal times
        times += 1
        if isinstance(output, Tensor):
            return change(output)
        return type(output)([change(output[0]), *output[1:]])

    with hooked({"": module}, hook):
        yield
    if times != 1:
        raise CutError(
            f"the layer's {type(module).__name__} is run {times} times for these images, and once "
            "for those of classifier.size; use images of that size or another layer"
        )
