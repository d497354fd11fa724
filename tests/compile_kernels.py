"""Compile every Triton kernel of the ops for a GPU, on a machine that need have none: `compile_kernels.py [90]`.

Prints the kernels, each as MODULE.NAME. Triton's interpreter, in which they run on the CPU, takes more than its
compiler does.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from skyreels_fast import ops
from skyreels_fast.ops import _dispatch


class NoDevice:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int = 0) -> int:
        return 0


def only_compiled(compiled: set[str]) -> None:
    """From now on kernels are compiled where they would be launched, and their names put into `compiled`."""
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, **options: Any) -> Any:
        compiled.add(f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}")
        return run(self, *args, **(options | {"warmup": True}))

    JITFunction.run = compile_only


def call_all(dtype: torch.dtype) -> None:
    """Each op that has a Triton kernel, with all that it can be given and with the least."""
    tokens, rows, vector = torch.ones(1, 8, 96, dtype=dtype), torch.ones(1, 2, 96), torch.ones(96, dtype=dtype)
    modulation = {"scale": rows, "shift": rows, "weight": vector, "bias": vector}
    triton = {"backend": "triton"}
    ops.norm_scale_shift(tokens, rows, rows, **triton)
    ops.norm_scale_shift(tokens, **modulation, residual=tokens, gate=rows, **triton)
    ops.scale_residual(tokens, tokens, rows, addend=tokens, **triton)
    ops.scale_residual_norm_scale_shift(tokens, tokens, rows, **modulation, addend=tokens, **triton)

    fused = torch.ones(1, 8, 3, 3, 32, dtype=dtype)
    q, k, v = fused.unbind(2)
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    for x, y in ((q, k), apart, (q.contiguous(), k.contiguous())):
        ops.qk_norm(x, vector, **triton)
        ops.qk_norm_rope3d(x, y, vector, vector, (2, 2, 2), **triton)
        ops.qk_norm_rope3d_(x, y, vector, vector, (2, 2, 2), **triton)
    if dtype is not torch.float32:
        ops.attention_weights(q, k, **triton)
        ops.attention_weights(q, k, log_counts=torch.ones(8), norm_weight=vector, **triton)
    ops.merge_attention(q, torch.ones(1, 3, 8), v, torch.ones(1, 3, 8), **triton)

    frame, weight, bias = torch.ones(1, 6, 7, 32, dtype=dtype), torch.ones(32, 32, 3, 3, 3, dtype=dtype), vector[:32]
    ops.norm_silu(frame, bias, **triton)
    ops.norm_silu(tokens, vector, silu=False, **triton)
    ops.causal_conv3d([frame] * 3, weight, **triton)
    ops.causal_conv3d([frame], weight, bias, frame, bias, **triton)
    ops.causal_conv3d([frame] * 2, weight, bias, frame, backend="conv2d")
    ops.relative_l1(tokens, tokens + 1, **triton)
    ops.residual_save(tokens, tokens, **triton)
    ops.residual_add(tokens, tokens, **triton)


def main(capability: int = 90) -> None:
    driver.set_active(NoDevice(capability))
    _dispatch._PRESENT["cpu"] = ["ref", "triton"]
    compiled: set[str] = set()
    only_compiled(compiled)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            call_all(dtype)
    print(*sorted(compiled))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
