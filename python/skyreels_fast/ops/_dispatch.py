"""Which backends this machine has, and the choice among them.

    cuda     the extension skyreels_fast._C, on CUDA tensors
    triton   Triton kernels, on CUDA tensors; on CPU tensors too where TRITON_INTERPRET=1 was set before Triton's import
             (to look into them: its interpreter has no right products of bfloat16 matrices)
    ref      plain torch, everywhere

Found once, at import. Triton and the extension may both be missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

try:
    import triton
    import triton.language as tl

    jit: Any = triton.jit
except ImportError:
    triton = tl = None

    def jit(kernel: Any, **_options: Any) -> Any:
        """Leave the kernel a function that nobody calls."""
        return kernel


def _import_extension() -> ModuleType | None:
    # A module that is there but does not load raises: it must not pass for one that was never built.
    name = "skyreels_fast._C"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


extension: Any = _import_extension()
_NAMES = ("cuda", "triton", "ref")
_INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
_PRESENT = {
    "cuda": [name for name, there in (("cuda", extension), ("triton", triton), ("ref", True)) if there],
    "cpu": ["ref", "triton"] if _INTERPRETED else ["ref"],
}
logger.info("backends by device, the preferred first: %s", _PRESENT)


def available(device_type: str, offered: tuple[str, ...] = _NAMES) -> list[str]:
    """Those of `offered` that run on tensors of `device_type` here: an op's own, which torch has everywhere, then those
    above, the preferred first."""
    own = [name for name in offered if name not in _NAMES]
    return own + [name for name in _PRESENT.get(device_type, ["ref"]) if name in offered]


def choose(op: str, backend: str | None, device_type: str, offered: tuple[str, ...] = _NAMES) -> str:
    """`backend`, or where it is None the preferred one. Raises ValueError for one unknown or not available."""
    check_backend(op, backend, offered)
    names = available(device_type, offered)
    if backend is None:
        return names[0]
    if backend not in names:
        raise ValueError(f"{op}: backend {backend!r} is not available for {device_type}, only {', '.join(names)}")
    return backend


def choose_kernel(
    op: str, backend: str | None, offered: tuple[str, ...], refusal: str | None, *tensors: Tensor | None
) -> str:
    """`choose` for the device of the first tensor; where nothing was asked for, "ref" for what kernels cannot do.

    refusal: what they take and these tensors are not, or None. Nor do they take what autograd follows. Raises
    ValueError as `choose` does, and for a kernel that is asked for and refuses.
    """
    chosen = choose(op, backend, tensors[0].device.type, offered)
    if backend is None:
        return "ref" if refusal or needs_grad(*tensors) else chosen
    if chosen != "ref":
        if refusal:
            raise ValueError(f"{op}: backend {backend!r} takes {refusal}; use 'ref'")
        check_no_grad(op, backend, *tensors)
    return chosen


def check_no_grad(op: str, backend: str, *tensors: Tensor | None, instead: str = "'ref'") -> None:
    """Raises ValueError where autograd follows the tensors: from kernels they would get no gradient, or a wrong one."""
    if needs_grad(*tensors):
        raise ValueError(f"{op}: backend {backend!r} has no gradient; use {instead}, or torch.no_grad()")


def check_backend(op: str, backend: str | None, offered: tuple[str, ...]) -> None:
    """Raises ValueError for a name that is no backend of `op`, wherever it runs."""
    if backend is not None and backend not in offered:
        raise ValueError(f"{op}: there is no backend {backend!r}; give one of {', '.join(offered)}")


def check_tensors(op: str, /, **values: Tensor | torch.dtype | None) -> None:
    """Raises ValueError for a tensor, or the dtype of a result, that is none of FLOATS, or on another device than the
    first of them."""
    first: tuple[str, torch.device] | None = None
    for label, value in values.items():
        if value is None:
            continue
        dtype = value
        if isinstance(value, Tensor):
            dtype = value.dtype
            first = first or (label, value.device)
            if value.device != first[1]:
                raise ValueError(f"{op}: {first[0]} ({first[1]}) and {label} ({value.device}) must be on one device")
        if dtype not in FLOATS:
            raise ValueError(f"{op}: {label} must be float16, bfloat16, float32 or float64, not {dtype}")


def adjoining(x: Tensor) -> Tensor:
    """x, copied where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def math_dtype_of(*values: Tensor | torch.dtype | None) -> torch.dtype:
    """What is computed in: float32, float64 where one of these tensors or dtypes is."""
    dtypes = [value.dtype if isinstance(value, Tensor) else value for value in values]
    return torch.float64 if torch.float64 in dtypes else torch.float32


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd follows an operation on these: kernels have no backward, "ref" has."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """In which torch computes in the dtypes that it is given."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def current_stream(x: Tensor) -> int:
    """The handle of the stream that torch uses on x's device."""
    return torch.cuda.current_stream(x.device).cuda_stream
