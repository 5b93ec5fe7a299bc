"""A faster copy of a network, for methods that run the network hundreds of times.

It computes the same function up to rounding: batch norms are folded into convolutions, max pooling
is done before relu, and the last block of a transformer computes the class token only. A search
may run it in bfloat16; what is measured or ranked is computed in float32.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..registry import check_name
from .probe import logits_of
from .transformer import Transformer, parts_of

PRECISIONS = ("auto", "float32", "bfloat16")


class QuickCopy:
    """A copy of a network for many passes: normalised images → float32 logits.

    Args:
        network: In evaluation mode.
        graph: Its trace.
        dtype: Of weights and layers.
        transformer: Whether the logits of the described parts equal those of the network.
        channels_last: Whether the network runs in this memory format.
    """

    def __init__(
        self,
        network: nn.Module,
        graph: fx.Graph,
        dtype: torch.dtype,
        *,
        transformer: bool,
        channels_last: bool = True,
    ) -> None:
        self.dtype, self.channels_last = dtype, channels_last
        self.network = copy.deepcopy(network)
        fold(self.network, graph)
        if dtype != torch.float32:
            last = _last_layer(self.network, graph)
            kept = copy.deepcopy(self.network.get_submodule(last)) if last else None
            self.network.to(dtype)
            if last and kept is not None:
                self.network.set_submodule(last, _Float32(kept))
        self.network.requires_grad_(False)
        lay_out_weights(self.network, channels_last)
        parts = parts_of(self.network) if transformer else None
        self._run = parts.logits if isinstance(parts, Transformer) else self.network

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits `(N, classes)` of normalised images `(N, 3, H, W)`."""
        # First dtype, then memory format: 2.5 times as fast as both in one conversion.
        y: Tensor = logits_of(self._run(lay_out(x.to(self.dtype), self.channels_last)))
        return y.float()


def fold(network: nn.Module, graph: fx.Graph) -> None:
    """Fold batch norms into convolutions, and move max pooling before relu (fewer values).

    Args:
        network: Changed in place.
        graph: Its trace, which gives the order of the operations.
    """
    modules = dict(network.named_modules())
    targets = [node.target for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        before = node.all_input_nodes[0] if len(node.all_input_nodes) == 1 else None
        if node.op != "call_module" or before is None or before.op != "call_module":
            continue
        # Neither module may be used elsewhere, and the value between them has no other user.
        if len(before.users) > 1 or targets.count(node.target) + targets.count(before.target) > 2:
            continue
        first, second = modules[before.target], modules[node.target]
        if any(m._forward_hooks or m._forward_pre_hooks for m in (first, second)):
            continue  # they belong to the modules as they are, such as that of weight_norm
        replaced: tuple[nn.Module, nn.Module]
        norm = type(second) in (nn.BatchNorm2d, BatchNormAct2d) and second.running_mean is not None
        if norm and type(first) is nn.Conv2d:
            replaced = fuse_conv_bn_eval(first, second), getattr(second, "act", nn.Identity())
        elif type(first) is nn.ReLU and type(second) is nn.MaxPool2d:
            replaced = second, first
        else:
            continue
        for target, new in zip((before.target, node.target), replaced, strict=True):
            network.set_submodule(target, new)
            modules[target] = new


class _Float32(nn.Module):
    """The last layer of a network in bfloat16, kept in float32.

    bfloat16 has 8 significant bits: logits would change in steps of 1 %, and an image whose
    objective does not change counts as converged.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.float())
        return y


def _last_layer(network: nn.Module, graph: fx.Graph) -> str | None:
    """Return the name of the last linear or convolutional layer, or None if it is not traced."""
    called = (str(node.target) for node in reversed(graph.nodes) if node.op == "call_module")
    kinds = nn.Linear | nn.Conv2d
    return next((name for name in called if isinstance(network.get_submodule(name), kinds)), None)


# ----------------------------------------------------------------------- dtypes, memory formats


def dtype_of(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype that a precision stands for on a device.

    Args:
        precision: `"float32"`, `"bfloat16"`, or `"auto"`: bfloat16 where the processor has
            instructions to multiply it, else float32. Without them bfloat16 is slower.
        device: Where the network is.

    Raises:
        ValueError: If the precision is not one of these.
    """
    check_name("precision", precision, PRECISIONS)
    if precision == "auto":
        return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # PyTorch before 2.10 can't be asked for a CPU's instructions.
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(able.get(name) for name in ("avx512_bf16", "amx_bf16"))


def lay_out(values: Tensor, channels_last: bool = True) -> Tensor:
    """Return images or weights `(N, C, H, W)` in the fastest memory format.

    Channels last (float32 on a CPU: 1.5 times as fast), except for float32 on a GPU: only its
    convolutions in TF32 or bfloat16 gain; those in float32 take 1.0 to 1.2 times as long.

    Args:
        values: Images or weights.
        channels_last: False for a network that fails in this format.
    """
    exact_gpu = values.is_cuda and values.dtype == torch.float32
    last = channels_last and not exact_gpu
    return values.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def lay_out_weights(network: nn.Module, channels_last: bool = True) -> None:
    """Apply `lay_out` to all weights of four dimensions, which are those of convolutions."""
    for weight in network.parameters():
        if weight.ndim == 4:
            # A kernel of 1×1 is contiguous in both formats: new strides need a copy.
            plain = weight.data.clone(memory_format=torch.contiguous_format)
            weight.data = lay_out(plain, channels_last)


class _Shared:
    """Settings of the whole process, changed while any thread is within `held`.

    Args:
        change: Sets them and returns what they were.
        values: Of these settings, within.
    """

    def __init__(self, change: Callable[[Any], Any], values: Any) -> None:
        self.change, self.values = change, values
        self.lock, self.inside = threading.Lock(), 0
        self.before: Any = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Change the settings; the last thread that leaves restores them."""
        with self.lock:
            if not self.inside:
                self.before = self.change(self.values)
            self.inside += 1
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1
                if not self.inside:
                    self.change(self.before)


@contextmanager
def usual() -> Iterator[None]:
    """Compute as if the caller had set no autocast, default dtype or default device.

    Autocast and the default device belong to a thread, the default dtype to the process: within
    this context every thread creates float32 tensors.
    """
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_FLOAT32.held())
        yield


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Compute as `usual`, and in exact float32 and deterministically on a GPU.

    By default a GPU's convolutions round their factors to ten bits (TF32), which changes
    probabilities by up to 0.005 (64 images, SqueezeNet, H200; exact float32 by 1e-6), and sum
    gradients in varying order, so that no search is reproducible. These switches are global to the
    process.

    Args:
        device: Where the network is.
    """
    with usual(), _GPU.held() if device.type == "cuda" else nullcontext():
        yield


def _set_default_dtype(dtype: torch.dtype) -> torch.dtype:
    old = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    return old


_CUDNN: Any = torch.backends.cudnn
# PyTorch before 2.9 has only a switch that allows TF32 or not.
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


_FLOAT32 = _Shared(_set_default_dtype, torch.float32)
_GPU = _Shared(_set, _EXACT)
