"""The same network, faster: rearranged, and in bfloat16 where there is hardware for it.

Optimising a mask runs the network a hundred times on images that are masked by guesses. There a
logit may be a little rough, and time counts. What is *measured* is measured by the untouched
network, in float32; but for insertion and deletion, hundreds of passes too, whose rough values are
corrected by float32 ones (`opticam_lite.metrics.curves`).
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from .rearrange import fold_and_swap, open_attention, pool_by_slices, read_tokens_only
from .registry import unknown_name

PRECISIONS = ("auto", "float32", "bfloat16")


def dtype_of(precision: str, device: torch.device) -> torch.dtype:
    """Return the number format that a precision means on a device.

    Args:
        precision: `"float32"`, `"bfloat16"`, or `"auto"`: bfloat16 where the processor multiplies
            such numbers itself, else float32. Where it does not, they would be slower.
        device: Where the network is.

    Raises:
        ValueError: If the precision is not one of these.
    """
    if precision not in PRECISIONS:
        raise ValueError(unknown_name("precision", precision, PRECISIONS))
    if precision == "auto":
        return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool({"avx512_bf16", "amx_bf16"} & _cpu_abilities())


def _cpu_abilities() -> set[str]:
    # PyTorch before 2.10 does not tell.
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return {name for name, has_it in able.items() if has_it}


_lock = threading.Lock()
_inside = 0  # how often `exact` was entered and not left
_before: list[Any] = []


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Within, float32 on a GPU is float32.

    As PyTorch comes, a GPU's convolutions round their factors to ten binary digits (TF32), which
    changes probabilities by up to 0.005 (64 images, SqueezeNet, H200; float32 proper by 1e-6), and
    add up their gradients in any order, so that no search repeats. The switches belong to the whole
    process, so the last thread to leave puts them back.

    Args:
        device: Where the network is. On a CPU there is nothing to do.
    """
    global _inside, _before
    if device.type != "cuda":
        yield
        return
    with _lock:
        if not _inside:
            _before = _set(_EXACT)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _set(_before)


_CUDNN: Any = torch.backends.cudnn
# PyTorch before 2.9 knows only to allow TF32 or not.
_ROUNDING = "fp32_precision" if hasattr(_CUDNN, "conv") else "allow_tf32"
_SWITCHES = (
    (_CUDNN, "deterministic"),
    (getattr(_CUDNN, "conv", _CUDNN), _ROUNDING),
    (torch.backends.cuda.matmul, _ROUNDING),
)
_EXACT = [True, *["ieee" if _ROUNDING == "fp32_precision" else False] * 2]


def _set(values: list[Any]) -> list[Any]:
    """Set the switches, and return what they were."""
    old = [getattr(where, name) for where, name in _SWITCHES]
    for (where, name), value in zip(_SWITCHES, values, strict=True):
        setattr(where, name, value)
    return old


class Accelerated(nn.Module):
    """A copy of a traced network for the many passes of a search.

    Takes normalised images `(N, 3, H, W)` and returns logits `(N, classes)`, both float32. It is
    the same function with less work (`opticam_lite.rearrange`).

    Args:
        module: The traced network, in evaluation mode.
        dtype: What weights are kept in and layers compute in.
    """

    def __init__(self, module: fx.GraphModule, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.module = copy.deepcopy(module)
        fold_and_swap(self.module)
        read_tokens_only(self.module)
        if dtype != torch.float32:
            devices = {p.device.type for p in self.module.parameters()}
            if devices == {"cpu"}:
                open_attention(self.module, tiles="amx_bf16" in _cpu_abilities())
                pool_by_slices(self.module)
            last = _last_layer(self.module)
            kept = copy.deepcopy(self.module.get_submodule(last)) if last else None
            self.module.to(dtype)
            if last and kept is not None:
                self.module.set_submodule(last, _Float32(kept))
        self.module.requires_grad_(False)
        lay_out_weights(self.module)
        self._autocast: bool | None = None if dtype != torch.float32 else False  # yet to be found

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of normalised images."""
        # In two steps, which is 2.5 times as fast as in one.
        x = lay_out(x.to(self.dtype))
        if self._autocast is None:
            self._autocast = not self._runs(x[:1])
        with torch.autocast(x.device.type, self.dtype, enabled=self._autocast):
            return self.module(x).float()

    @torch.no_grad()
    def _runs(self, x: Tensor) -> bool:
        """Whether the network runs in its weights' format, with no constant of another on the way.

        Else it needs autocast, which on a GPU takes every LayerNorm to float32 and back.
        """
        try:
            self.module.forward(x)  # unlike a call, tells nobody of an error
        except RuntimeError:
            return False
        return True


def memory_format(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """Return how images and the weights of convolutions lie in memory to be computed quickest.

    The channels last (float32 on a CPU: 1.5 times as fast), but for float32 on a GPU. There only
    convolutions that round (TF32, bfloat16) gain by it; `exact` ones take 1.0 to 1.2 times as long.
    """
    exact_gpu = device.type == "cuda" and dtype == torch.float32
    return torch.contiguous_format if exact_gpu else torch.channels_last


def lay_out(values: Tensor) -> Tensor:
    """Return images or weights `(N, C, H, W)` in the format of `memory_format`."""
    return values.contiguous(memory_format=memory_format(values.device, values.dtype))


def lay_out_weights(network: nn.Module) -> None:
    """Lay out all weights of four dimensions, which are those of convolutions."""
    for weight in network.parameters():
        if weight.ndim == 4:
            weight.data = lay_out(weight.data)


class _Float32(nn.Module):
    """The last layer of a network in bfloat16.

    Logits of eight binary digits would change by leaps or not at all, and an image whose objective
    does not change is taken for finished.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.layer(x.float())


def _last_layer(module: fx.GraphModule) -> str | None:
    """Return the name of the last linear or convolutional layer, or None if it is not traced."""
    for node in reversed(module.graph.nodes):
        if node.op == "call_module":
            layer = module.get_submodule(str(node.target))
            if isinstance(layer, nn.Linear | nn.Conv2d):
                return str(node.target)
    return None
