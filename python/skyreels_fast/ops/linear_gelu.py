"""A linear layer and GELU in one product: what opens a DiT's feed-forward.

    y = gelu(x W^T + b),  gelu(u) = u / 2 (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3)))       (arXiv 1606.08415)

x: [..., D]; weight: [H, D], bias: [H] or None, one dtype, which the result takes. The product accumulates in float32.
The backend "cublaslt" adds bias and GELU where the sums still are in registers, so that u is never written: it is
float32 there, and rounded once. It takes float16 and bfloat16 on CUDA, and is not differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from skyreels_fast.ops._dispatch import check_backend, check_no_grad, check_tensors, needs_grad, without_autocast

BACKENDS = ("cublaslt", "ref")
_DTYPES = (torch.float16, torch.bfloat16)


def linear_gelu_ref(x: Tensor, weight: Tensor, bias: Tensor | None, *, math_dtype: torch.dtype | None = None) -> Tensor:
    """`linear_gelu` in plain torch, computed in `math_dtype` (default: x's dtype)."""
    dtype = math_dtype or x.dtype
    bias = None if bias is None else bias.to(dtype)
    u = functional.linear(x.to(dtype), weight.to(dtype), bias)
    return functional.gelu(u, approximate="tanh").to(x.dtype)


def linear_gelu_cost(tokens: int, dim: int, hidden: int, *, itemsize: int = 2) -> tuple[int, int]:
    """(bytes moved, flops) of one call on x [tokens, dim] with `hidden` outputs."""
    return (tokens * (dim + hidden) + dim * hidden) * itemsize, 2 * tokens * dim * hidden


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"linear_gelu: x {list(x.shape)} does not fit the weight {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_gelu: the bias must be [{weight.shape[0]}], not {list(bias.shape)}")
    dtypes = [tensor.dtype for tensor in (x, weight, bias) if tensor is not None]
    if any(dtype != x.dtype for dtype in dtypes):
        raise ValueError(f"linear_gelu: x, weight, bias must have one dtype, not {', '.join(map(str, dtypes))}")
    check_tensors("linear_gelu", x=x, weight=weight, bias=bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: str | None = None) -> Tensor:
    """gelu(x W^T + b) of x [..., D] with weight [H, D] and bias [H], None for 0: [..., H] in x's dtype.

    backend: "cublaslt" or "ref"; None: "cublaslt" where it can. Raises ValueError for shapes or dtypes that do not fit,
    a dtype that is not one of float16, bfloat16, float32 and float64, or a backend that is not there or does not take
    them.
    """
    _check(x, weight, bias)
    check_backend("linear_gelu", backend, BACKENDS)
    fits = x.is_cuda and x.dtype in _DTYPES
    if backend is None:
        backend = "cublaslt" if fits and not needs_grad(x, weight, bias) else "ref"
    if backend == "ref":
        with without_autocast(x):
            return linear_gelu_ref(x, weight, bias)
    if not fits:
        raise ValueError(
            f"linear_gelu: backend 'cublaslt' takes float16 and bfloat16 on CUDA, not {x.dtype} on {x.device.type}"
        )
    check_no_grad("linear_gelu", backend, x, weight, bias)
    if bias is None:  # the epilogue with GELU has one always
        bias = x.new_zeros(weight.shape[0])
    rows = x.reshape(-1, x.shape[-1])
    # Autocast knows nothing of it.
    return torch._addmm_activation(bias, rows, weight.t(), use_gelu=True).view(*x.shape[:-1], -1)
