"""The same function with less work: what a traced network may leave out or do in another order.

Each function changes an `fx.GraphModule` in place, and the logits stay the same but for rounding.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval


def does_nothing(module: nn.Module | None) -> bool:
    """Whether a module only hands its input on in evaluation mode."""
    names = ("Identity", "Dropout", "Dropout2d", "DropPath", "StochasticDepth", "PatchDropout")
    return type(module).__name__ in names


def fold_and_swap(module: fx.GraphModule) -> None:
    """Fold batch norms into convolutions; take a maximum before a relu, on a quarter of values."""
    modules = dict(module.named_modules())
    targets = [node.target for node in module.graph.nodes if node.op == "call_module"]
    for node in module.graph.nodes:
        before = node.all_input_nodes[0] if len(node.all_input_nodes) == 1 else None
        if node.op != "call_module" or before is None or before.op != "call_module":
            continue
        # Neither module may serve elsewhere, and nobody else may read what lies between them.
        if len(before.users) > 1 or targets.count(node.target) + targets.count(before.target) > 2:
            continue
        first, second = modules[before.target], modules[node.target]
        replaced: tuple[nn.Module, nn.Module]
        if type(first) is nn.Conv2d and type(second) in (nn.BatchNorm2d, BatchNormAct2d):
            if second.running_mean is None:
                continue
            replaced = fuse_conv_bn_eval(first, second), getattr(second, "act", nn.Identity())
        elif type(first) is nn.ReLU and type(second) is nn.MaxPool2d:
            replaced = second, first
        else:
            continue
        for target, new in zip((before.target, node.target), replaced, strict=True):
            module.set_submodule(target, new)
            modules[target] = new


def open_attention(module: fx.GraphModule, *, tiles: bool = False) -> None:
    """Compute attention as the paper writes it, softmax(q kᵀ/√d) v, instead of by a fused kernel.

    On a CPU the fused kernel multiplies bfloat16 block by block and is the slower one, there 1.4
    times and back 3 to 6 times.

    Args:
        module: A traced network.
        tiles: Whether the CPU has tiles for matrices (AMX). There the fused kernel is slower only
            on the way back, so attention is opened for passes that will go back.
    """
    attend = _attend_with_tiles if tiles else _attend
    for node in module.graph.nodes:
        if _is_attention(node):
            node.target, node.kwargs = attend, {}
    for name, inner in list(module.named_modules()):
        if isinstance(inner, nn.MultiheadAttention) and _is_plain(inner):
            module.set_submodule(name, _OpenAttention(inner, attend))
    module.recompile()


def _is_attention(node: fx.Node) -> bool:
    """Whether a node is a fused attention of three arguments, with nothing masked or dropped."""
    return (
        node.target is F.scaled_dot_product_attention
        and len(node.args) == 3
        and not any(node.kwargs.values())
    )


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v


def _attend_with_tiles(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    back = torch.is_grad_enabled() and q.requires_grad
    return _attend(q, k, v) if back else F.scaled_dot_product_attention(q, k, v)


def _is_plain(attention: nn.MultiheadAttention) -> bool:
    return (
        attention.batch_first
        and attention._qkv_same_embed_dim
        and attention.bias_k is None
        and not attention.add_zero_attn
    )


class _OpenAttention(nn.Module):
    """What `nn.MultiheadAttention` does for torchvision's transformers."""

    def __init__(
        self, fused: nn.MultiheadAttention, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.fused, self.attend = fused, attend

    def forward(self, *inputs: Tensor, need_weights: bool = False) -> tuple[Tensor, None]:
        weights = self.fused.in_proj_weight.chunk(3)
        bias = self.fused.in_proj_bias
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        q, k, v = (
            F.linear(x, W, b).unflatten(2, (self.fused.num_heads, -1)).transpose(1, 2)
            for x, W, b in zip(inputs, weights, biases, strict=True)
        )  # (N, heads, T, d)
        return self.fused.out_proj(self.attend(q, k, v).transpose(1, 2).flatten(2)), None


def pool_by_slices(module: fx.GraphModule) -> None:
    """Take the maximum of slices, where no gradient is asked for.

    On a CPU, PyTorch pools bfloat16 by 32 channels at a time and those that are left one by one:
    for 16 or 24 channels that takes 1.3 to 1.9 times as long. Other numbers of channels, and
    poolings with a dilation or a last window that is cut off, stay.
    """
    for node in module.graph.nodes:
        pool = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if type(pool) is not nn.MaxPool2d or len(_shape(node)) != 4 or not _shape(node)[1] % 32:
            continue
        k, s, p, d = (v if isinstance(v, int) else 0 for v in (
            pool.kernel_size, pool.stride, pool.padding, pool.dilation
        ))  # fmt: skip
        if d == 1 and s and k > max(1, 2 * p) and not pool.ceil_mode and not pool.return_indices:
            module.set_submodule(str(node.target), SlicedMaxPool(pool, k, s, p))


class SlicedMaxPool(nn.Module):
    """The same as `nn.MaxPool2d`, along the rows and then along the columns.

    Args:
        pool: Asked itself where a gradient will be, and for images that do not have the channels
            last.
        kernel, stride, padding: Its settings, for rows and columns alike; 2·padding < kernel.
    """

    def __init__(self, pool: nn.MaxPool2d, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.pool, self.kernel, self.stride, self.padding = pool, kernel, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """Return the maxima `(N, C, h, w)` of `(N, C, H, W)`."""
        smallest = min(x.shape[2:]) + 2 * self.padding
        if (
            x.requires_grad
            or not x.is_contiguous(memory_format=torch.channels_last)
            or smallest < self.kernel  # PyTorch says what is wrong
        ):
            return self.pool(x)
        return self._along(self._along(x, 2), 3)

    def _along(self, x: Tensor, dim: int) -> Tensor:
        k, s, p = self.kernel, self.stride, self.padding
        x = x.movedim(dim, 0)
        windows = (len(x) + 2 * p - k) // s + 1
        high, own = x[: (windows - 1) * s + 1 : s], False  # value p of a window is never outside
        for j in (*range(p + 1, k), *range(p)):
            first = max(0, -((j - p) // s))  # earlier windows have it before the image,
            last = min(windows, (len(x) - 1 + p - j) // s + 1)  # later ones behind it
            part = x[first * s - p + j :: s][: last - first]
            if not own and (first, last) == (0, windows):
                high = torch.maximum(high, part)
            else:
                high = high if own else high.clone()
                torch.maximum(high[first:last], part, out=high[first:last])
            own = True
        return high.movedim(0, dim)


def read_tokens_only(module: fx.GraphModule) -> None:
    """Leave out the tokens that nobody reads.

    The head of a vision transformer reads the class token, `x[:, 0]`. In the last block the other
    tokens matter as keys and values only: their queries, their projection and their MLP, which is
    most of the block, come to nothing. Few queries even need no keys and values (`OfFew`).
    """
    read = [node for node in module.graph.nodes if _picks_a_token(node)]
    if read:
        first = _First(module, 1 + max(node.args[1][1] for node in read))
        for node in read:
            node.args = (first.of(node.args[0]), node.args[1])
        module.graph.eliminate_dead_code()
        module.recompile()


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta.get("shape", ()))


def _picks_a_token(node: fx.Node) -> bool:
    """Whether a node is `x[:, i]`, x `(N, T, D)`."""
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return False
    rows, *token = node.args[1]
    alone = len(token) == 1 and isinstance(token[0], int) and token[0] >= 0
    return len(_shape(node.all_input_nodes[0])) == 3 and rows == slice(None) and alone


class OfFew(nn.Module):
    """Attention for the queries of few tokens: (q W_k) xᵀ and (a x) W_v.

    The same as q (x W_k)ᵀ and a (x W_v), whose keys and values of all tokens are most of the work.
    A bias of the keys adds the same to all scores of a query, so the softmax does not feel it.

    Args:
        weight: `(3 D, D)`, of queries, keys and values.
        bias: `(3 D,)`, or None.
        heads: H, the number of heads.
        asking: t, how many tokens ask.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, heads: int, asking: int
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.heads, self.asking = weight, bias, heads, asking

    def forward(self, asking: Tensor, x: Tensor) -> Tensor:
        """Return `(N, t, D)` for tokens `(N, t, D)` that ask and all tokens `(N, T, D)`."""
        a = (x @ self._ask(asking).mT).softmax(1)  # (N, T, H·t)
        return self._answer(a.mT @ x)

    def without(self, k: Tensor, x: Tensor, aside: int) -> Tensor:
        """Return `(K, t, D)`: the answers to the first tokens of one image without channel k.

        r (x − x_k e_kᵀ)ᵀ = r xᵀ − r_k x_kᵀ, and a (x − x_k e_kᵀ) = a x − (a x_k) e_kᵀ, so no tokens
        need be made for every k.

        Args:
            k: `(K,)` channels.
            x: `(1, T, D)`.
            aside: So many first tokens, those that ask among them, keep their channels.
        """
        r, x_k = self._ask(x[:, : self.asking])[0], x[0][:, k].T  # (H·t, D), (K, T)
        x_k[:, :aside] = 0
        scores = r @ x[0].T - r.T[k, :, None] * x_k[:, None]  # (K, H·t, T)
        a = scores.softmax(2)
        z = (a.flatten(0, 1) @ x[0]).unflatten(0, (len(k), len(r)))  # (K, H·t, D)
        z[torch.arange(len(k), device=k.device), :, k] -= (a @ x_k[..., None])[..., 0]
        return self._answer(z)

    def _ask(self, asking: Tensor) -> Tensor:
        """Return q W_k / √d `(N, H·t, D)` of tokens `(N, t, D)`."""
        W_q, W_k, _ = self.weight.unflatten(0, (3, self.heads, -1))  # (H, d, D) each
        q = torch.einsum("ntk,hdk->nhtd", asking, W_q)
        if self.bias is not None:
            q = q + self.bias.unflatten(0, (3, self.heads, 1, -1))[0]  # (H, 1, d)
        return torch.einsum("nhtd,hdk->nhtk", q * q.shape[-1] ** -0.5, W_k).flatten(1, 2)

    def _answer(self, z: Tensor) -> Tensor:
        """Return z W_v `(N, t, D)` of z `(N, H·t, D)`."""
        W_v = self.weight.unflatten(0, (3, self.heads, -1))[2]
        z = torch.einsum("nhtk,hdk->nhtd", z.unflatten(1, (self.heads, -1)), W_v)
        if self.bias is not None:
            z = z + self.bias.unflatten(0, (3, self.heads, 1, -1))[2]
        return z.transpose(1, 2).flatten(2)


def behind_attention(head: fx.GraphModule, aside: int) -> tuple[OfFew, fx.GraphModule] | None:
    """Split a lean head (`read_tokens_only`) behind the attention with which it begins.

    Args:
        head: Tokens `(N, T, D)` and other values → logits.
        aside: How many tokens are set aside; they must be all that ask.

    Returns:
        The attention, and what follows: its answers and the other values → logits. None if the
        tokens go anywhere else.
    """
    modules = dict(head.named_modules())
    tokens = next(iter(head.graph.nodes))
    copied = next(iter(tokens.users))  # every value that is handed over is copied first
    for few in copied.users:
        attention = modules.get(str(few.target))
        if isinstance(attention, OfFew) and attention.asking <= aside:
            break
    else:
        return None
    asking = few.all_input_nodes[0]
    if set(copied.users) != {few, asking}:
        return None
    graph = fx.Graph()
    copies = {few: graph.placeholder("answers")}
    for node in head.graph.nodes:
        if node not in (tokens, copied, asking, few):
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return attention, fx.GraphModule(head, graph)


class _First:
    """Finds the first tokens of values `(N, T, D)` of which no others are read."""

    # What treats each token by itself.
    MODULES = (nn.Linear, nn.LayerNorm, nn.GELU, nn.SiLU, nn.ReLU)
    FUNCTIONS = (F.layer_norm, F.gelu, operator.add, operator.mul, "clone")

    def __init__(self, module: fx.GraphModule, kept: int) -> None:
        self.module, self.graph, self.first = module, module.graph, slice(0, kept)
        self.modules = dict(module.named_modules())
        self.found: dict[fx.Node, fx.Node] = {}
        self.enough: set[fx.Node] = set()  # values whose first tokens are all that is read
        for x in reversed(self.graph.nodes):
            readers = [y for y in x.users if not _picks_a_token(y)]
            if x.users and all(y in self.enough and x in self._tokens(y) for y in readers):
                self.enough.add(x)

    def of(self, x: fx.Node) -> fx.Node:
        """Return a node with the value of `x[:, :kept]`."""
        if x not in self.found:
            with self.graph.inserting_before(x.next):
                self.found[x] = (x in self.enough and self._from_less(x)) or self._cut(x, 1)
        return self.found[x]

    def _from_less(self, x: fx.Node) -> fx.Node | None:
        if tokens := self._tokens(x):
            firsts = {y: self.of(y) for y in tokens}
            return self.graph.node_copy(x, lambda y: firsts.get(y, y))
        y: Any = x.args[0] if x.args else None
        # timm: attention(q, k, v).transpose(1, 2).reshape(N, T, D)
        heads_last = x.target == "reshape" and y.target == "transpose" and y.args[1:] == (1, 2)
        if heads_last and _is_attention(y.args[0]):
            return self._attention_of_heads(*y.args[0].args)
        # torchvision: attention(q, k, v)[0]
        if x.target is operator.getitem and x.args[1] == 0:
            layer = self._layer(y)
            masked = y.op == "call_module" and (
                len(y.args) != 3 or set(y.kwargs) - {"need_weights"}
            )
            if isinstance(layer, nn.MultiheadAttention) and layer.batch_first and not masked:
                return self._attention_of_layer(y, layer)
        return None

    def _attention_of_heads(self, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
        call, linear = self.graph, self._same_linear(q, k, v)
        if linear is not None:
            x, layer = linear.args[0], self.modules[str(linear.target)]
            return self._of_few(linear, layer.weight, layer.bias, _shape(q)[1], x, x)
        z = call.call_function(F.scaled_dot_product_attention, (self._cut(q, 2), k, v))
        return call.call_method("flatten", (call.call_method("transpose", (z, 1, 2)), 2))

    def _attention_of_layer(self, node: fx.Node, layer: nn.MultiheadAttention) -> fx.Node:
        arguments: Any = node.args
        q, k, v = arguments
        if k is v and _is_plain(layer) and self.first.stop < layer.head_dim:
            weight, bias, heads = layer.in_proj_weight, layer.in_proj_bias, layer.num_heads
            z = self._of_few(node, weight, bias, heads, q, k)
            return self.graph.call_module(f"{node.target}.out_proj", (z,))
        z = self.graph.call_module(str(node.target), (self._cut(q, 1), k, v), node.kwargs)
        return self.graph.call_function(operator.getitem, (z, 0))

    def _of_few(
        self, node: fx.Node, weight: Any, bias: Any, heads: int, asking: Any, x: Any
    ) -> fx.Node:
        name = f"{node.target}_of_few"
        self.module.add_submodule(name, OfFew(weight, bias, heads, self.first.stop))
        return self.graph.call_module(name, (self._cut(asking, 1), x))

    def _same_linear(self, *heads: fx.Node) -> fx.Node | None:
        """Return the linear layer of which q, k and v `(N, H, T, d)` are the three thirds.

        timm: linear(x).reshape(N, T, 3, H, d).permute(2, 0, 3, 1, 4).unbind(0).
        """
        thirds = [self._behind(x) for x in heads]
        source: Any = next(iter(thirds[0].args), None)
        if any((x.target, x.args) != (operator.getitem, (source, i)) for i, x in enumerate(thirds)):
            return None
        for step in (("unbind", 0), ("permute", 2, 0, 3, 1, 4)):
            if (source.target, *source.args[1:]) != step:
                return None
            source = source.args[0]
        shape = _shape(source)  # (N, T, 3, H, d)
        if source.target != "reshape" or self.first.stop >= shape[-1]:
            return None
        linear: fx.Node = source.args[0]
        same = (*_shape(linear)[:2], 3) == shape[:3]
        return linear if same and type(self._layer(linear)) is nn.Linear else None

    def _behind(self, x: fx.Node) -> fx.Node:
        """Return the node whose value a node hands on."""
        while does_nothing(self._layer(x)):
            x = x.all_input_nodes[0]
        return x

    def _cut(self, x: fx.Node, dim: int) -> fx.Node:
        key = (*[slice(None)] * dim, self.first)
        return self.graph.call_function(operator.getitem, (x, key))

    def _layer(self, x: fx.Node) -> nn.Module | None:
        return self.modules[str(x.target)] if x.op == "call_module" else None

    def _tokens(self, x: fx.Node) -> list[fx.Node]:
        """Return the inputs of whose tokens the tokens of x are made one by one; or none."""
        layer = self._layer(x)
        if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) > 1:
            return []  # of all tokens together
        if not (
            isinstance(layer, self.MODULES) or does_nothing(layer) or x.target in self.FUNCTIONS
        ):
            return []
        inputs = x.all_input_nodes
        tokens = [y for y in inputs if len(_shape(y)) == 3 and _shape(y)[:2] == _shape(x)[:2]]
        alone = all(y in tokens or len(_shape(y)) == 1 for y in inputs)
        return tokens if alone else []
