"""Cut any network at any layer: `head(trunk(x))` equals the untouched network.

Every CAM method needs two halves of a network: *features* (images → maps of layer ℓ) and *head*
(maps of ℓ → logits). The network is traced once with `torch.fx`; the trunk then returns the
layer's output **and every earlier value that later operations still use** (a residual branch, a
class token), and the head continues from there. No hooks, and gradients stop at the cut. What can't
be traced is run again instead (`rerun`). The two halves give the logits of the network that is cut,
to the last bit; `Classifier` lays it out anew in memory before, which may change them by rounding.
"""

from __future__ import annotations

import inspect
import math
import operator
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any

import torch
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn

from ..registry import unknown_name
from .feature_maps import PROBES, CutError, FeatureLayout, Finder, module_of
from .probe import check_arguments, check_logits, check_steady, logits_of
from .quick_copy import lay_out, lay_out_weights, usual
from .transformer import Transformer, describe

# torch.fx replaces `nn.Module.__call__` and `__getattr__` for the whole process while it traces:
# one thread traces at a time, and the calls of other threads pass through.
_tracing = threading.RLock()


class TraceError(CutError):
    """A network that `torch.fx` can't trace: it has to be run again (`Rerun`)."""


class _Tracer(fx.Tracer):
    """Does not look into modules that can't be traced: they become single operations."""

    def __init__(self, leaves: Collection[str], buffers: bool) -> None:
        # Functions are made single operations by `_untraced`. The tracer's own way looks for them
        # at every call of a module, also of another thread, which then takes the finding away.
        super().__init__(autowrap_modules=())  # type: ignore[arg-type]
        self.leaves, self.opaque = leaves, tuple(get_notrace_modules())
        self.proxy_buffer_attributes = buffers
        self.failed = ""
        self.thread = threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualname: str) -> bool:
        opaque = module_qualname in self.leaves or isinstance(m, self.opaque)
        # Transforms pass on what is no tensor, as what is traced is not.
        transform = any(c.__module__.startswith("torchvision.transforms") for c in type(m).__mro__)
        return opaque or transform or super().is_leaf_module(m, module_qualname)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        try:
            name = self.path_of_module(m)
        except NameError:  # made within forward, such as nn.ReLU()(x)
            return forward(*args, **kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            y = forward(*args, **kwargs)
            if isinstance(y, fx.proxy.Attribute):
                _ = y.node  # made when it is first asked for: here, as the output of this module
            return y

        try:
            return super().call_module(m, run, args, kwargs)
        except Exception:
            self.failed = self.failed or name
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        other = threading.get_ident() != self.thread
        return attr_val if other else super().getattr(attr, attr_val, parameter_proxy_cache)


@contextmanager
def _untraced(network: nn.Module, functions: Sequence[Any]) -> Iterator[None]:
    """Within this context, functions become single operations of a trace.

    They are replaced in the files of the network's modules and in `math`. Called with ordinary
    values, as other threads call them, they do what they did.
    """
    single = {id(f): _recorded(f) for f in [*functions, *vars(math).values()] if callable(f)}
    forwards = [inspect.unwrap(m.forward) for m in network.modules()]
    files = [vars(math), *(getattr(forward, "__globals__", {}) for forward in forwards)]
    found = [
        (file, name, f)
        for file in {id(file): file for file in files}.values()
        for name, f in list(file.items())
        if id(f) in single and not name.startswith("_")
    ]
    try:
        for file, name, f in found:
            file[name] = single[id(f)]
        yield
    finally:
        for file, name, f in found:
            file[name] = f


def _recorded(function: Any) -> Any:
    """Return a function that records a call with traced arguments, and makes any other."""

    @wraps(function)
    def record_or_call(*args: Any, **kwargs: Any) -> Any:
        proxies: list[Any] = []
        fx.node.map_aggregate(
            (args, kwargs), lambda a: proxies.append(a) if isinstance(a, fx.Proxy) else a
        )
        if not proxies:
            return function(*args, **kwargs)
        return proxies[0].tracer.create_proxy("call_function", function, args, kwargs)

    return record_or_call


def parameters_in(network: nn.Module, names: Iterable[str]) -> int:
    """Return the number of weights in some modules; the network's own name is ""."""
    weights = {p for name in names for p in network.get_submodule(name).parameters()}
    return sum(p.numel() for p in weights)


def _trace(network: nn.Module) -> tuple[fx.Graph, dict[str, str]]:
    """Trace a network; modules that can't be traced are taken whole, as single operations.

    Returns:
        The graph, and the names of those modules with the reason.
    """
    attempts = [_attempt(network, buffers=False)]
    if any([*network.get_submodule(name).buffers(False)] for name in attempts[0][1]):
        # buffer.expand(len(x), -1) is traced if the buffer is a value of the graph, too.
        attempts.append(_attempt(network, buffers=True))
    graph, whole = min(attempts, key=lambda attempt: parameters_in(network, attempt[1]))
    if graph is None:
        raise TraceError(f"{type(network).__name__} can't be traced ({whole['']})")
    return graph, whole


def _attempt(network: nn.Module, buffers: bool) -> tuple[fx.Graph | None, dict[str, str]]:
    # Optional arguments keep their defaults: a traced None would not be None.
    parameters = list(inspect.signature(network.forward).parameters.values())[1:]
    fixed = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    whole: dict[str, str] = {}
    while True:
        tracer = _Tracer(whole, buffers)
        try:
            with _tracing, _untraced(network, get_notrace_functions()):
                return tracer.trace(network, concrete_args=fixed or None), whole
        except Exception as error:
            kind = type(network.get_submodule(tracer.failed)).__name__
            where = f"{tracer.failed!r} ({kind})" if tracer.failed else f"the forward of {kind}"
            # The first sentence: torch.fx adds where to read about it.
            reason = " ".join(str(error).split()).partition(". ")[0] or type(error).__name__
            if tracer.failed in whole:  # this is no way around it
                tracer.failed = ""
            whole[tracer.failed] = f"{where}: {reason}"
            if not tracer.failed:
                return None, whole


class _Recorder(fx.Interpreter):
    """Runs a trace and keeps the shape of every value, and which do not depend on the images."""

    def __init__(self, network: nn.Module, graph: fx.Graph) -> None:
        super().__init__(network, graph=graph)
        self.shapes: dict[fx.Node, torch.Size] = {}
        self.constant: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = value.shape
            # Such as an encoding of positions; not a branch that is 0 before training.
            alike = value.shape[:1] == (PROBES,) and torch.equal(value[0], value[1])
            if alike and value[0].numel() and bool((value[0] != value[0].flatten()[0]).any()):
                self.constant.add(n)
        return value


class Cuttable(ABC):
    """A network that can be cut at its layers: what the two ways of doing so have in common.

    Attributes:
        graph: Its operations (`Traced`) or the calls of its modules (`Rerun`), in forward order.
        layers: The layers whose output is a set of maps on which the logits depend, in forward
            order.
        classes: Number of logits.
        channels_last: Whether it runs on images in this memory format: `.view` may fail in it.
        why: Why it is not traced, or "".
        values: Number of intermediate values per image, over all layers.

    Args:
        network: In evaluation mode; takes one batch of images, returns logits `(N, C)`. The memory
            format of its weights is set.
        size: Height and width of the images that the network is made for.

    Raises:
        CutError: If the network needs another argument, fails on random images of that size,
            or does not return logits.
    """

    graph: fx.Graph
    channels_last = True
    why = ""
    layers: dict[str, tuple[fx.Node, FeatureLayout]]
    values: int
    _shapes: dict[fx.Node, torch.Size]

    def __init__(self, network: nn.Module, size: tuple[int, int]) -> None:
        self.network, self.size = network, size
        check_arguments(network)
        self._probe = self._random((PROBES, 3, *size))
        with torch.no_grad():
            self._expected = self._first_run()
            check_logits(network, self._expected, self._input())
        self.classes = self._expected.shape[1]
        self.modules = dict(network.named_modules())

    def _first_run(self) -> Any:
        """Return the logits of random images, in the memory format that the network stands."""
        network, (height, width) = self.network, self.size
        try:
            lay_out_weights(network)
            try:
                return logits_of(network(self._probe.clone(memory_format=torch.channels_last)))
            except RuntimeError:  # x.view(len(x), -1) fails where the channels of x come last
                self.channels_last = False
                lay_out_weights(network, channels_last=False)
                return logits_of(network(self._probe.clone()))
        except Exception as error:
            raise CutError(
                f"{type(network).__name__} fails on a batch of {height}×{width} RGB images "
                f"({type(error).__name__}: {error}); pass size=(height, width) if it expects "
                "another size, and wrap it if it expects other channels"
            ) from error

    def _input(self) -> Tensor:
        return lay_out(self._probe.clone(), self.channels_last)

    def _random(self, shape: Sequence[int], seed: int = 0) -> Tensor:
        weight = next(iter(self.network.parameters()), torch.zeros(1))
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(weight)

    @cached_property
    def _order(self) -> dict[fx.Node, int]:
        """Node → its position in the graph, in forward order."""
        return {node: i for i, node in enumerate(self.graph.nodes)}

    def _find_layers(self, last: dict[str, fx.Node]) -> dict[str, tuple[fx.Node, FeatureLayout]]:
        """Layers whose output is a set of maps on which the logits depend, in forward order.

        Of a layer of tokens the logits may depend on the prefix tokens alone: see `reads`.
        """
        useful: set[fx.Node] = set()
        for node in reversed(self._order):
            if node.op == "output" or any(user in useful for user in node.users):
                useful.add(node)
        finder = Finder(self.graph, self._shapes, self.network, self.size)
        # One value can be the output of several modules: relu, block, stage.
        found = {node: finder.of(node) for node in useful.intersection(last.values())}
        names = sorted(last, key=lambda name: (self._order[last[name]], -name.count(".")))
        return {name: (last[name], layout) for name in names if (layout := found.get(last[name]))}

    @cached_property
    @usual()
    def transformer(self) -> Transformer | str:
        """The parts of a transformer that `describe` knows, or why the network is none."""
        return describe(self.network, self.size)

    def largest(self, layer: str | None = None) -> int:
        """Return the number of values per image of the largest tensor, from a layer on."""
        nodes = self._order if layer is None else self._halves(self.layers[layer][0])[1]
        return max(self._shapes[node].numel() // PROBES for node in nodes if node in self._shapes)

    def shape(self, layer: str) -> tuple[int, int, int]:
        """Return (K, h, w) of a layer's maps for an image of `size`."""
        node, layout = self.place(layer)
        maps, _ = layout.to_maps(torch.empty(self._shapes[node], device="meta"), self.size)
        return maps.shape[1], maps.shape[2], maps.shape[3]

    def default_layer(self) -> str:
        """Return the layer of the paper's Appendix A, generalised to other networks.

        Convolutional: the last output with maps that is neither a pooling nor one map per class;
        so the last block of a ResNet and the relu before VGG's last max pooling. With a class
        token: the first norm of the last block, the last maps that an attention reads. Never one
        that lies far before the last layer of all.

        Raises:
            CutError: If no layer gives feature maps.
        """
        if not self.layers:
            raise CutError(
                f"{type(self.network).__name__} has no layer that gives feature maps"
                f"{self.why and f' ({self.why}; none of its modules returns some)'}; write it as "
                "torch.nn.Sequential(trunk, head) with your own two halves and cut it at layer='0'"
            )
        last = list(self.layers)[-1]
        ends = [n for n in reversed(self.layers) if not self._is_pooling(n)] or [last]
        name = next((n for n in ends if not self._is_of_classes(n)), ends[0])
        if name != ends[0] and self._hands_over(name):
            name = ends[0]  # all channels are classes, but within the branch of a block
        if self._is_far(name, last):
            name = last
        if self.layers[name][1].prefix:
            name = self._last_read_tokens(name, ends)
        # One value can be the output of several modules: relu, block, stage. Blocks are numbered.
        same = [n for n, (other, _) in self.layers.items() if other is self.layers[name][0]]
        numbered = [n for n in same if n.rpartition(".")[2].isdigit()]
        return min(numbered or same, key=lambda n: n.count("."))

    def _last_read_tokens(self, name: str, ends: list[str]) -> str:
        """Return the input of the last attention: the first norm of a block, if not far before.

        Not its projections; if it has no other (an attention that pools), the maps before it.
        """
        able = [n for n in ends if not isinstance(self.modules[n], nn.Linear)]
        tokens = [n for n in able if self.layers[n][1].prefix]
        norms = (n for n in tokens if n.rpartition(".")[2] in ("norm1", "ln_1"))
        norm = next((n for n in norms if self.reads(n)), None)
        if norm is None or self._is_far(norm, name):
            last = next((n for n in tokens + able if self.reads(n)), name)
            return last if norm is None or self._is_far(norm, last) else norm
        return norm

    def _is_far(self, layer: str, later: str) -> bool:
        """Whether a layer lies half of the network, in operations, before another one."""
        a, b = (self._order[self.layers[n][0]] for n in (layer, later))
        return b - a > len(self._order) / 2

    def _is_pooling(self, name: str) -> bool:
        return "Pool" in type(self._called(self.layers[name][0])).__name__ or "pool" in name

    def _is_of_classes(self, name: str) -> bool:
        """Whether a layer has one map per class that is only averaged."""
        if self.shape(name)[0] != self.classes:
            return False
        after = map(self._called, self._halves(self.layers[name][0])[1])
        return not any(m is not None and list(m.parameters()) for m in after)

    def _hands_over(self, name: str) -> bool:
        """Whether the head needs other values besides a layer's maps."""
        return False

    @abstractmethod
    def reads(self, layer: str) -> bool:
        """Whether the logits depend on a layer's maps, not only on its prefix tokens."""

    @abstractmethod
    def cut(self, layer: str) -> Cut:
        """Return the two halves of the network around a layer.

        Raises:
            CutError: If there is no such layer; see `place`.
        """

    def place(self, layer: str) -> tuple[fx.Node, FeatureLayout]:
        """Return the value of a layer and its layout.

        Raises:
            CutError: If there is no such layer, or its output is not a set of maps; the message
                lists close matches.
        """
        if not self.layers:
            self.default_layer()  # raises the error that says why
        if layer not in self.layers:
            if layer in self.modules:
                raise CutError(
                    f"layer {layer!r} exists, but its output is not a set of feature maps "
                    "(channels × height × width, or tokens on a grid) on which the logits depend"
                    f"{self.why and ', or it is not run exactly once'}; "
                    f"choose one of: {', '.join(list(self.layers)[-12:])}, … (classifier.layers)"
                )
            raise CutError(unknown_name("layer", layer, self.layers, show=60))
        return self.layers[layer]

    def _halves(self, node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
        """Return the nodes up to one, and those after it."""
        nodes, split = list(self._order), self._order[node] + 1
        return nodes[:split], nodes[split:]

    def _called(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a node calls, None for another operation."""
        return self.modules[str(node.target)] if node.op == "call_module" else None


class Traced(Cuttable):
    """A network that `torch.fx` traces: both halves are parts of its graph.

    Attributes:
        taken_whole: Names of the modules that can't be traced: single operations of the graph.

    Raises:
        CutError: If the network can't be traced, or behaves differently from its trace.
    """

    def __init__(self, network: nn.Module, size: tuple[int, int]) -> None:
        super().__init__(network, size)
        self.graph, self.taken_whole = _trace(network)
        recorder = _Recorder(network, self.graph)
        with torch.no_grad():
            actual = logits_of(recorder.run(self._input()))
        if not torch.allclose(actual, self._expected, rtol=1e-4, atol=1e-5):
            check_steady(network, self._input())
            raise TraceError(
                f"the trace of {type(network).__name__} gives other logits than the network "
                f"itself (largest difference {(actual - self._expected).abs().max():.2g})"
            )
        self._read: dict[fx.Node, bool] = {}
        self._shapes = recorder.shapes
        self._per_image = self._find_values_per_image()
        outputs = self._outputs()
        if not torch.equal(*self._expected[:2]):  # else nothing depends on the images
            outputs = {k: v for k, v in outputs.items() if v not in recorder.constant}
        self.layers = self._find_layers(outputs)
        self.values = sum(shape.numel() // PROBES for shape in self._shapes.values())

    def _find_values_per_image(self) -> set[fx.Node]:
        """Tensors that depend on the images and have one entry for each of them."""
        varies: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node.op == "placeholder" or any(i in varies for i in node.all_input_nodes):
                varies.add(node)
        batched = {node for node in varies if self._shapes.get(node, ())[:1] == (PROBES,)}
        return {node for node in batched if not any(map(_takes_apart, node.users))}

    def _outputs(self) -> dict[str, fx.Node]:
        """Return the value that each module's forward returned, or its last operation."""
        last: dict[str, fx.Node] = {}
        for node in self.graph.nodes:
            if does_nothing(self._called(node)):
                continue
            path = module_of(node)
            while path:
                last[path] = node
                path = path.rpartition(".")[0]
        return last

    def reads(self, layer: str) -> bool:
        """Whether the logits depend on a layer's maps, not only on its prefix tokens."""
        node, layout = self.layers[layer]
        if node not in self._read:
            self._read[node] = not layout.prefix or self._reads_tokens(node, layout.prefix)
        return self._read[node]

    @usual()
    @torch.inference_mode(False)
    @torch.enable_grad()
    def _reads_tokens(self, node: fx.Node, prefix: int) -> bool:
        """Whether more than the prefix of tokens is used: at the others the gradient is not 0.

        The gradient is that of the input of the last linear layer, because the weights of that
        layer may be 0 before training. The network is run from the layer on, with random values.
        """
        features: Any = logits_of(next(reversed(self._order)).args[0])
        for n in self._order:
            if type(self._called(n)) is nn.Linear:
                read = n.all_input_nodes[0]
                features = read if len(self._shapes[read]) == 2 else features
        needed, again = self._crossing(node)
        values: dict[fx.Node, Any] = dict.fromkeys({*self._halves(node)[0]}.difference(again))
        for i, n in enumerate([node, *needed]):
            values[n] = self._random((2, *self._shapes[n][1:]), i)
        tokens = values[node].requires_grad_()
        values[node] = tokens.clone()  # the next operation may work in place
        run = fx.Interpreter(self.network, garbage_collect_values=False, graph=self.graph)
        try:
            run.run(initial_env=values, enable_io_processing=False)
            y = run.env[features]
            (g,) = torch.autograd.grad(y, tokens, self._random(y.shape), allow_unused=True)
        except RuntimeError:  # the features can't be differentiated with respect to the tokens
            return True
        return g is None or bool(g[:, prefix:].any()) or not g[:, :prefix].any()

    def cut(self, layer: str) -> Cut:
        """Return the two halves of the network around a layer.

        Raises:
            CutError: If there is no such layer, or its output is not a set of maps; the message
                lists close matches.
        """
        node, layout = self.place(layer)
        before, after = self._halves(node)
        needed, again = self._crossing(node)

        trunk = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for n in before:
            copies[n] = trunk.node_copy(n, copies.__getitem__)
        trunk.output(tuple(copies[n] for n in [node, *needed]))

        head = fx.Graph()
        copies = {}
        for i, n in enumerate([node, *needed]):
            given = head.placeholder("maps" if i == 0 else f"rest_{i}")
            # The next operation of the network may work in place.
            copies[n] = head.call_method("clone", (given,))
        for n in [*again, *after]:
            copies[n] = head.node_copy(n, copies.__getitem__)
        return Cut(
            layout,
            _module(self.network, trunk),
            _module(self.network, head),
            self._pointwise_reader(node),
        )

    def _hands_over(self, name: str) -> bool:
        return bool(self._crossing(self.layers[name][0])[0])

    def _crossing(self, node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
        """Return the earlier nodes that the head needs: as inputs, and those it recomputes."""
        (*before, _), after = self._halves(node)
        used = {earlier for later in after for earlier in later.all_input_nodes}
        crossing: list[fx.Node] = []
        for earlier in reversed(before):
            if earlier in used:
                crossing.insert(0, earlier)
                if earlier not in self._per_image:  # recomputed: parameters and sizes
                    used.update(earlier.all_input_nodes)
        needed = [earlier for earlier in crossing if earlier in self._per_image]
        return needed, [earlier for earlier in crossing if earlier not in self._per_image]

    def _pointwise_reader(self, node: fx.Node) -> str | None:
        """Return the name of the 1×1 convolution that is the only user of a value, if there is one.

        None, too, if a parallel branch begins between the two: its value would be missing from what
        the trunk returns.
        """
        handed_over = self._crossing(node)[0]
        while len(node.users) == 1:
            (node,) = node.users
            if does_nothing(module := self._called(node)):
                continue
            name = str(node.target)
            same = self._crossing(node)[0] == handed_over
            alone = same and self.layers.get(name, (None,))[0] is node
            return name if alone and _is_pointwise(module) else None
        return None


def _module(network: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Make a module of a graph; the network is its child, whose names may be any."""
    root = nn.Module()
    root.network = network
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = f"network.{node.target}"
    return fx.GraphModule(root, graph)


def _takes_apart(node: fx.Node) -> bool:
    """Whether an operation takes single entries of the first dimension: two values were stacked."""
    if node.target in ("unbind", torch.unbind):
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return bool(dim == 0)
    return node.target is operator.getitem and isinstance(node.args[1], int)


def does_nothing(module: nn.Module | None) -> bool:
    """Whether a module returns its input as it is in evaluation mode."""
    names = ("Identity", "Dropout", "Dropout2d", "DropPath", "StochasticDepth", "PatchDropout")
    return type(module).__name__ in names


def _is_pointwise(module: nn.Module | None) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == module.stride == (1, 1)
        and module.padding in ((0, 0), "valid", "same")
        and module.groups == 1
    )


@dataclass(frozen=True)
class Rest:
    """What the head needs besides the maps: prefix tokens and earlier values still in use.

    Each of them has one entry per image; sizes and parameters are recomputed in the head.
    """

    aside: Tensor | None
    values: tuple[Tensor, ...]

    def repeat(self, image: int, n: int) -> Rest:
        """Return the rest of one image repeated n times."""

        def taken(value: Tensor) -> Tensor:
            return value[image].expand(n, *value.shape[1:])

        aside = None if self.aside is None else taken(self.aside)
        return Rest(aside, tuple(taken(value) for value in self.values))


@dataclass(frozen=True)
class Cut:
    """A network cut at a layer.

    `maps, rest = cut.split(x)` and `logits = cut.head(maps, rest)`, so that
    `cut.head(*cut.split(x))` equals `network(x)`.

    Attributes:
        layout: How the layer's output holds the maps.
        trunk: Normalised images → the layer's output and every value of `Rest.values`: those
            still in use, or the images themselves (`Rerun`).
        tail: These → logits.
        pointwise_reader: Name of the 1×1 convolution with which the head begins, if it is one.
    """

    layout: FeatureLayout
    trunk: Callable[[Tensor], tuple[Tensor, ...]]
    tail: Callable[..., Any]
    pointwise_reader: str | None

    def split(self, x: Tensor) -> tuple[Tensor, Rest]:
        """Run the first half: normalised images `(N, 3, H, W)` → maps `(N, K, h, w)`, rest."""
        output, *values = self.trunk(x)
        maps, aside = self.layout.to_maps(output, (x.shape[2], x.shape[3]))
        return maps, Rest(aside, tuple(values))

    def head(self, maps: Tensor, rest: Rest) -> Tensor:
        """Run the second half: maps `(N, K, h, w)` and the rest → logits `(N, C)`."""
        logits: Tensor = logits_of(self.tail(self.layout.from_maps(maps, rest.aside), *rest.values))
        return logits
