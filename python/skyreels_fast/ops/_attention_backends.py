"""The kernels of `attention`: others' libraries, each optional, and what torch brings along.

    fa3     flash_attn_interface (FlashAttention's hopper directory) or fa3_fwd_interface (the fa3-fwd wheel): Hopper
    fa4     flash_attn.cute: Hopper and Blackwell
    fa2     flash_attn: Ampere and later
    cudnn   scaled_dot_product_attention over cuDNN, Ampere and later
    flash   the same over torch's own FlashAttention-2, Ampere and later
    sdpa    the same, torch choosing: any device, any dtype

All take q [B, Lq, N, Dh] and k, v [B, Lk, N, Dh] with free strides, but for the last dimension.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

Dense = Callable[[Tensor, Tensor, Tensor], Tensor]

DTYPES = (torch.float16, torch.bfloat16)
_MAX_HEAD_CHANNELS = 256


class Library(NamedTuple):
    """modules: the first that is installed has the function; none: torch's own. capabilities: (first, last) major."""

    modules: tuple[str, ...]
    kernel: SDPBackend | None
    capabilities: tuple[int, int]
    install: str


_LATEST = 99
LIBRARIES = {
    "fa3": Library(("flash_attn_interface", "fa3_fwd_interface"), None, (9, 9), "pip install fa3-fwd"),
    "fa4": Library(("flash_attn.cute",), None, (9, _LATEST), "pip install flash-attn-4"),
    "fa2": Library(("flash_attn",), None, (8, _LATEST), "pip install flash-attn --no-build-isolation"),
    "cudnn": Library((), SDPBackend.CUDNN_ATTENTION, (8, _LATEST), ""),
    "flash": Library((), SDPBackend.FLASH_ATTENTION, (8, _LATEST), ""),
}
NAMES = (*LIBRARIES, "sdpa", "ref")

# The fastest first, by major compute capability. On an H200, 51,000 tokens with heads of 128 in bfloat16,
# FlashAttention-3 reaches 680 TFLOP/s, cuDNN 570, FlashAttention-2 365; elsewhere as the libraries report.
_PREFERRED = {8: ("fa2", "flash", "cudnn"), 9: ("fa3", "cudnn", "fa4", "fa2", "flash")}
_PREFERRED_LATER = ("fa4", "cudnn", "fa2", "flash")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # a package without this submodule
        return False


@lru_cache
def missing(name: str, device: torch.device) -> str | None:
    """Why the backend `name` cannot run on `device`; None where it can."""
    if name in ("sdpa", "ref"):
        return None
    library = LIBRARIES[name]
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    first, last = library.capabilities
    if not first <= major <= last:
        needed = f"{first}.x" if last == first else f"{first}.0 or later"
        return f"it needs compute capability {needed}, not {major}.{minor}"
    if library.modules and not any(map(_is_installed, library.modules)):
        return f"{' or '.join(library.modules)} is not installed ({library.install})"
    return None


@lru_cache
def preferred(device: torch.device) -> str:
    """The fastest backend that `device` has for half precision."""
    if device.type != "cuda":
        return "sdpa"
    major = torch.cuda.get_device_capability(device)[0]
    order = _PREFERRED.get(major, _PREFERRED_LATER if major > 9 else ())
    return next((name for name in order if missing(name, device) is None), "sdpa")


def refusal(q: Tensor) -> str | None:
    """Why the libraries do not take tensors like q; None where they do."""
    if q.shape[3] > _MAX_HEAD_CHANNELS or q.shape[3] % 8:
        return f"takes heads of up to {_MAX_HEAD_CHANNELS} channels, a multiple of 8, not {q.shape[3]}"
    return None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, kernel: SDPBackend | None = None) -> Tensor:
    heads_first = [tensor.transpose(1, 2) for tensor in (q, k, v)]
    if kernel is None:
        return functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    with sdpa_kernel(kernel):
        return functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def _first(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # Some versions return the softmax's statistics beside the result.
    out = function(q, k, v)
    return out[0] if isinstance(out, tuple) else out


@lru_cache
def dense(name: str) -> Dense:
    """Dense attention by the backend `name`, which is there."""
    if name == "sdpa":
        return _sdpa
    library = LIBRARIES[name]
    if library.kernel is not None:
        return partial(_sdpa, kernel=library.kernel)
    module = importlib.import_module(next(module for module in library.modules if _is_installed(module)))
    return partial(_first, module.flash_attn_func)
