"""Which values of a traced network are sets of feature maps, and in which layout.

The shape alone is ambiguous: `(N, 96, 96, 96)` may have its channels first or last, windows of an
attention are padded beyond the image, and an attention matrix of 49×49 tokens is no feature map of
49×49 cells. Where possible, the operations that produce and use a value decide.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

# Images with which a trace is run: values with one entry for each are recognised by their first
# dimension. Not 3, as q, k and v are often stacked there; for two see `cut._takes_apart`.
PROBES = 2


class CutError(ValueError):
    """A network that can't be traced, or a layer at which it can't be cut."""


@dataclass(frozen=True)
class FeatureLayout:
    """The layout of a layer's output with K maps of h×w cells, and its conversion to NCHW.

    `kind` is `"NCHW"` (convolutional), `"NHWC"` (such as Swin) or `"tokens"` (`(N, L, K)`, the
    first `prefix` tokens being class or register tokens, which belong to no cell).
    """

    kind: str
    prefix: int = 0

    def to_maps(self, output: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Return the maps `(N, K, h, w)` and the prefix tokens `(N, prefix, K)`, if any."""
        if self.kind == "NCHW":
            return output, None
        if self.kind == "NHWC":
            return output.permute(0, 3, 1, 2), None
        aside, tokens = output[:, : self.prefix], output[:, self.prefix :]
        grid = token_grid(tokens.shape[1], size)
        if grid is None:
            raise CutError(
                f"{tokens.shape[1]} tokens do not form a grid of the shape of a "
                f"{size[0]}×{size[1]} image"
            )
        return tokens.transpose(1, 2).unflatten(2, grid), aside

    def from_maps(self, maps: Tensor, aside: Tensor | None) -> Tensor:
        """The inverse of `to_maps`."""
        if self.kind == "NCHW":
            return maps
        if self.kind == "NHWC":
            return maps.permute(0, 2, 3, 1)
        tokens = maps.flatten(2).transpose(1, 2)
        return tokens if aside is None else torch.cat([aside, tokens], dim=1)


def token_grid(tokens: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """Return the grid (h, w) with h·w = `tokens` and the aspect ratio of `size`, or None."""
    h = round(math.sqrt(tokens * size[0] / size[1]))
    if h < 1 or tokens % h:
        return None
    w = tokens // h
    return (h, w) if _same_aspect(h, w, size) else None


def _same_aspect(h: int, w: int, size: tuple[int, int]) -> bool:
    # Equal up to the rounding of one cell in either direction.
    return abs(h * size[1] - w * size[0]) < max(size)


def module_of(node: fx.Node) -> str:
    """Return the qualified name of the module whose forward made a value, "" for the network."""
    inside = node.meta.get("nn_module_stack")
    return str(next(reversed(inside.values()))[0]) if inside else ""


class Finder:
    """Finds the layout of the values of a network that was traced with `PROBES` images.

    Args:
        graph: The trace.
        shapes: Node → shape, of `PROBES` images of `size`.
        network: Traced.
        size: Height and width of the images.
    """

    def __init__(
        self,
        graph: fx.Graph,
        shapes: Mapping[fx.Node, torch.Size],
        network: nn.Module,
        size: tuple[int, int],
    ) -> None:
        self.shapes, self.size = shapes, size
        self.modules = dict(network.named_modules())
        self.prefix: int | None = getattr(network, "num_prefix_tokens", None)
        whole = [s for s in shapes.values() if s[:1] == (PROBES,)]
        self.lengths = {s[1] for s in whole if len(s) == 3}
        self.widths = {s[2] for s in whole if len(s) == 3}
        self.grids = {s[2] * s[3] for s in whole if len(s) == 4}
        # In a sequence of calls no products are seen: only a module's type tells an attention.
        self.calls = {node.op for node in graph.nodes} == {"placeholder", "call_module", "output"}
        self.shuffled = self._find_shuffled(graph)
        self.padded = self._find_padded(graph)

    def of(self, node: fx.Node) -> FeatureLayout | None:
        """Return the layout of a value; None if it holds no maps, or the layout is ambiguous."""
        shape = self.shapes.get(node, torch.Size())
        if shape[:1] != (PROBES,) or node in self.shuffled:
            return None
        layout = self._of_tokens(shape) if len(shape) == 3 else self._of_maps(node, shape)
        if layout is None:
            return None
        maps, _ = layout.to_maps(torch.empty(shape, device="meta"), self.size)
        return None if (node, maps[0, 0].numel()) in self.padded else layout

    def _of_maps(self, node: fx.Node, shape: torch.Size) -> FeatureLayout | None:
        if len(shape) != 4 or self._is_in_attention(node, shape):
            return None
        _, a, b, c = shape
        first = min(b, c) > 1 and _same_aspect(b, c, self.size) and max(b, c) <= max(self.size)
        last = min(a, b) > 1 and _same_aspect(a, b, self.size) and max(a, b) <= max(self.size)
        if not (first or last):
            return None
        told = self._channels_last(node)
        if first and last:  # as many channels as cells
            first, last = told is False, told is True
        if b in self.lengths and self.calls and self._works_last(node) is None:
            return None
        # Else perhaps windows × tokens × channels, or heads × tokens × channels. Modules that are
        # called one after the other need not work on each other's outputs.
        if b in self.lengths or not self.calls:
            first, last = first and told is not True, last and told is not False
        return FeatureLayout("NCHW") if first else FeatureLayout("NHWC") if last else None

    def _of_tokens(self, shape: torch.Size) -> FeatureLayout | None:
        length = shape[1]
        for p in range(17) if self.prefix is None else (self.prefix, 0):
            grid = token_grid(length - p, self.size) if length > p else None
            if grid is not None and min(grid) > 1:
                # channels × tokens, as in the token mixing of an MLP-Mixer
                mixed = length in self.widths and length - p not in self.grids
                return None if mixed else FeatureLayout("tokens", p)
        return None

    def _channels_last(self, node: fx.Node) -> bool | None:
        """Whether the channels are the last dimension, by the operations around the value.

        Decided by the nearest operation whose layout is known, across those that keep the shape,
        but for the order of the two dimensions before the last.
        """
        seen, nearest = {node}, [node]
        while nearest:
            for n in nearest:
                told = [self._told(n, True), *(self._told(user, False) for user in n.users)]
                if (answer := next((t for t in told if t is not None), None)) is not None:
                    return answer
            around = [x for n in nearest for x in n.all_input_nodes if self._keeps_shape(n, x)]
            around += [x for n in nearest for x in n.users if self._keeps_shape(x, n)]
            nearest = [x for x in dict.fromkeys(around) if x not in seen]
            seen.update(nearest)
        return None

    def _keeps_shape(self, node: fx.Node, given: fx.Node) -> bool:
        """Whether a value has the shape of its input, but for dimensions 1 and 2 swapped."""
        before, after = self.shapes.get(given, torch.Size()), self.shapes.get(node)
        return before == after or (
            node.target in _SWAPS
            and sorted(before) == sorted(after or ())
            and set(_order(node)) in ({1, 2}, {-2, -3})
        )

    def _told(self, node: fx.Node, made: bool) -> bool | None:
        """Whether the channels of what an operation made, or else reads, are the last dimension."""
        if node.target == "permute":
            return {(0, 2, 3, 1): made, (0, 3, 1, 2): not made}.get(_order(node))
        return self._works_last(node)

    def _works_last(self, node: fx.Node) -> bool | None:
        """Whether an operation takes the channels as the last dimension (True) or the first."""
        kind = type(self.modules.get(str(node.target))) if node.op == "call_module" else node.target
        if kind is nn.LayerNorm and len(self.modules[str(node.target)].normalized_shape) > 1:
            return None
        if kind in (nn.Linear, nn.LayerNorm, F.linear, F.layer_norm):
            return True
        return False if kind in _CHANNELS_FIRST else None

    def _is_in_attention(self, node: fx.Node, shape: torch.Size) -> bool:
        """Whether a value is heads × queries × keys, or queries, keys or values of the heads.

        The former is computed from a matrix product elementwise; the latter are inputs of one.
        """
        if any(user.target in _PRODUCTS for user in node.users):
            return True
        seen, waiting = {node}, [node]
        while waiting:
            n = waiting.pop()
            if n.target in _PRODUCTS:
                return True
            inputs = set()
            for x in n.all_input_nodes:
                given = self.shapes.get(x, torch.Size())
                permuted = sorted(given[1:]) == sorted(shape[1:])
                if len(given) == 4 and (permuted or given[2:] == shape[2:]):
                    inputs.add(x)
            waiting += inputs - seen
            seen |= inputs
        return False

    def _find_shuffled(self, graph: fx.Graph) -> set[fx.Node]:
        """Return tokens that are not in row-major order.

        Hiera's `Unroll` groups them by window, until pooling has left one token per window.
        """
        behind: dict[fx.Node, int] = {}
        found = False
        for node in graph.nodes:
            if type(self.modules[module_of(node)]).__name__ == "Unroll":
                found, behind = True, {}
            shape = self.shapes.get(node, ())
            if found and len(shape) == 3 and shape[0] == PROBES:
                behind[node] = shape[1]
        return {n for n, length in behind.items() if length > min(behind.values())}

    def _find_padded(self, graph: fx.Graph) -> set[tuple[fx.Node, int]]:
        """Return values that may have cells beyond the image, with the number of all cells.

        Windows are padded to one size. If the whole image fits into one window, the shape is that
        of ordinary maps, but only a corner of them lies on the image.
        """
        cells: dict[fx.Node, frozenset[int]] = {}
        for node in graph.nodes:
            found = frozenset().union(*(cells[x] for x in node.all_input_nodes))
            if getattr(node.target, "__name__", "") == "pad":
                before, after = (
                    self.shapes.get(n, torch.Size()) for n in (node.all_input_nodes[0], node)
                )
                if len(before) == len(after) == 4 and before != after:
                    channels_last = before[3] == after[3]
                    h, w = after[1:3] if channels_last else after[2:4]
                    found |= {h * w}
            cells[node] = found
        return {(node, number) for node, found in cells.items() for number in found}


_PRODUCTS: tuple[Any, ...] = (
    operator.matmul,
    torch.matmul,
    "matmul",
    torch.einsum,
    F.scaled_dot_product_attention,
)
_SWAPS: tuple[Any, ...] = ("transpose", "swapaxes", torch.transpose, torch.swapaxes)
_CHANNELS_FIRST: tuple[Any, ...] = (
    nn.Conv2d,
    nn.BatchNorm2d,
    nn.GroupNorm,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    F.conv2d,
    F.batch_norm,
    F.group_norm,
    F.max_pool2d,
    F.avg_pool2d,
    F.adaptive_avg_pool2d,
)


def _order(node: fx.Node) -> tuple[Any, ...]:
    order = node.args[1:]
    return tuple(order[0]) if len(order) == 1 and isinstance(order[0], tuple | list) else order
