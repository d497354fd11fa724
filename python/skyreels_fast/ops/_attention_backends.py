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
import inspect
from collections.abc import Callable
from functools import lru_cache, partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from skyreels_fast.ops._dispatch import adjoining

Dense = Callable[[Tensor, Tensor, Tensor], Tensor]
DenseWithLse = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

DTYPES = (torch.float16, torch.bfloat16)
_MAX_HEAD_CHANNELS = 256


class Library(NamedTuple):
    """modules: the first that is installed has the function; none: torch's own. capabilities: (first, last) major."""

    modules: tuple[str, ...]
    kernel: SDPBackend | None
    capabilities: tuple[int, int]
    install: str


_LATEST = 99
# FlashAttention-3's tiles have 128 queries. With so many keys (by the arithmetic, half as many) pairing the tiles
# saves more than copying q takes.
_PAIR = 256
_WORTH_A_COPY = 8192
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


def _capability(device: torch.device) -> tuple[int, int]:
    if not torch.cuda.is_available():
        raise ValueError(f"attention: PyTorch finds no CUDA device here for {str(device)!r}")
    return torch.cuda.get_device_capability(device)


@lru_cache
def missing(name: str, device: torch.device) -> str | None:
    """Why the backend `name` cannot run on `device`; None where it can."""
    if name in ("sdpa", "ref"):
        return None
    library = LIBRARIES[name]
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    major, minor = _capability(device)
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
    major, _ = _capability(device)
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
    return partial(_first, _library_function(name))


def _library_function(name: str) -> Callable[..., Any]:
    modules = LIBRARIES[name].modules
    function = importlib.import_module(next(module for module in modules if _is_installed(module))).flash_attn_func
    return wraps(function)(partial(_in_pairs, function)) if name == "fa3" else function


def query_rows(rows: int) -> int:
    """As far as storage should go on behind `rows` queries [1, rows, N, Dh], so that "fa3" need not copy them.

    It is twice as fast at loading keys and values for an even number of its tiles of 128 queries; whatever stands in
    the rows behind changes nothing.
    """
    return -(-rows // _PAIR) * _PAIR


def _in_pairs(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, **flags: bool) -> Any:
    """FlashAttention-3 with an even number of tiles of queries: only then do two share each load of keys and values."""
    rows = q.shape[1]
    out = function(_even(q) if _is_odd(q) and k.shape[1] >= _WORTH_A_COPY else q, k, v, **flags)
    return (out[0][:, :rows], *out[1:]) if isinstance(out, tuple) else out[:, :rows]


def _is_odd(q: Tensor) -> bool:
    """Whether the number of tiles is; heads below 128 channels are never paired."""
    return q.shape[0] == 1 and q.shape[3] >= 128 and -(-q.shape[1] // (_PAIR // 2)) % 2 == 1


def _even(q: Tensor) -> Tensor:
    """q [1, L, N, Dh] with rows of any values behind it: those of its storage, or else it is copied."""
    rows = query_rows(q.shape[1])
    if not torch.compiler.is_compiling() and q.is_contiguous():
        end = q.storage_offset() + rows * q.stride(1)
        if end * q.itemsize <= q.untyped_storage().nbytes():
            return q.as_strided((1, rows, *q.shape[2:]), q.stride())
    return functional.pad(q, (0, 0, 0, 0, 0, rows - q.shape[1]))


def _sdpa_with_lse(q: Tensor, k: Tensor, v: Tensor, kernel: SDPBackend | None = None) -> tuple[Tensor, Tensor]:
    """As `_sdpa`; torch's own choice is not to be had with the log-sum-exp, so the kernel of widest use stands in."""
    # Called as here, not through torch's choice, the kernels take a stride of 1 between channels for granted.
    heads_first = [adjoining(x).transpose(1, 2) for x in (q, k, v)]
    if kernel is SDPBackend.CUDNN_ATTENTION:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads_first, None, True)
    elif kernel is SDPBackend.FLASH_ATTENTION:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*heads_first)
    elif q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(*heads_first, None, True)
    return out.transpose(1, 2), lse


def _first_two(function: Callable[..., Any], flags: dict[str, bool], *qkv: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, *_ = function(*qkv, **flags)
    return out, lse


@lru_cache
def dense_with_lse(name: str) -> DenseWithLse:
    """As `dense`, with the log-sum-exp of the scores: B * N * Lq values in this order, each row perhaps padded."""
    if name == "sdpa":
        return _sdpa_with_lse
    if (kernel := LIBRARIES[name].kernel) is not None:
        return partial(_sdpa_with_lse, kernel=kernel)
    function = _library_function(name)
    # Versions that have neither argument return it always.
    known = inspect.signature(function).parameters
    return partial(_first_two, function, {flag: True for flag in ("return_attn_probs", "return_lse") if flag in known})
