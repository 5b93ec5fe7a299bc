"""A simulated GPU for machines without one.

Its values are in the memory of the CPU, whose kernels compute with them, but it is a separate
device: mixing its tensors with those of the CPU is an error, as on a real GPU, and so is a
synchronisation where it is not allowed. What depends on a real GPU's kernels can't be tested:
rounding, speed, memory, autocast.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten


class _Module(backend_registration._DummyBackendModule):
    """The counterpart of torch.cuda."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16]


NAME = "pretend:0"


@cache
def device() -> torch.device:
    """Return the device; the first call registers it with PyTorch, which can't be undone."""
    backend_registration._setup_privateuseone_for_python_backend("pretend", _Module())
    return torch.device(NAME)


if os.environ.get("OPTICAM_DEVICE") == NAME:
    device()  # before autograd starts a thread for each device


class FarTensor(Tensor):
    """A tensor on the device: `near` has its values."""

    near: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near: Tensor) -> FarTensor:
        far = Tensor._make_wrapper_subclass(
            cls,
            near.size(),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            layout=near.layout,
            device=device(),
            requires_grad=near.requires_grad,
        )
        far.near = near
        return far

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FarTensor({self.near})"

    def tolist(self) -> Any:
        return self.near.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None):
        return _run(operation, args, kwargs or {}, may_wait=True)


class PretendGPU(TorchDispatchMode):
    """Within this context, `NAME` is a device.

    Args:
        may_wait: Whether operations may synchronise (`item`, `tolist`, `nonzero`, copies).
    """

    def __init__(self, *, may_wait: bool = True) -> None:
        super().__init__()
        device()
        self.may_wait = may_wait

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None):
        return _run(operation, args, kwargs or {}, self.may_wait)

    def __enter__(self) -> PretendGPU:
        # Modules replace their parameters by those on the device, and torch.tensor moves its result
        # by an operation that is dispatched here.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        super().__exit__(*error)


def _run(operation: Any, args: Any, kwargs: dict[str, Any], may_wait: bool) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    far = [x for x in tensors if isinstance(x, FarTensor)]
    near = [x for x in tensors if not isinstance(x, FarTensor) and x.ndim]  # scalars may be mixed
    where = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    name = operation.overloadpacket
    copies = name in (aten._to_copy, aten.copy_)
    if name in (aten.index, aten.index_put_, aten._index_put_impl_, aten.index_put):
        near = [x for x in near if x.dtype not in (torch.int64, torch.bool)]  # as indices, too
    if far and near and not copies:
        shapes = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in tensors)
        raise RuntimeError(f"{operation} of tensors on different devices: {shapes}")
    if not may_wait and far and _waits(name, args, copies and bool(near), where):
        raise RuntimeError(f"{operation} waits for the GPU")
    plain_args, plain_kwargs = tree_map(
        lambda x: x.near if isinstance(x, FarTensor) else x, (args, kwargs)
    )
    if where is not None:
        plain_kwargs["device"] = torch.device("cpu")
    result = operation(*plain_args, **plain_kwargs)
    if not (far if where is None else where.type == device().type) or name is aten.copy_:
        return args[0] if name is aten.copy_ else result
    known = {id(x.near): x for x in far}  # results of in-place operations keep their identity

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return known[id(x)] if id(x) in known else FarTensor(x)

    return tree_map(placed, result)


def _waits(name: Any, args: Any, crosses: bool, where: torch.device | None) -> bool:
    """Whether an operation makes the CPU wait for the device."""
    by_truth = name is aten.index and any(
        isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]
    )
    brings = where is not None and where.type != device().type
    asks = name in (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal)
    return by_truth or crosses or brings or asks
