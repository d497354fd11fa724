"""Whether other algorithms of cuBLASLt would do a block's products faster: `python -m benchmarks.algorithms`.

Every algorithm that cuBLASLt's heuristics offer for each matrix product of a DiT block, with bias and where the forward
has it GELU in the epilogue, beside torch's choice, which is the first of them. Each runs for `--seconds` without a
pause, since a GPU at its power limit lowers its clock, and its result is held against torch's, bit by bit.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.options import Parser
from benchmarks.products import TOKENS, WIDTHS, layer
from skyreels_fast.dit.block import FEED_FORWARD_TOKENS
from skyreels_fast.ops import linear_gelu

_LIBRARIES = ("libcublasLt.so.13", "libcublasLt.so.12")
_WORKSPACE_BYTES = 64 * 2**20
_MOST = 32  # algorithms asked for
# Of cublasLt.h.
_COMPUTE_32F, _R_32F, _R_16BF = 68, 0, 14
_TRANSA, _TRANSB, _EPILOGUE, _BIAS_POINTER = 3, 4, 7, 8
_EPILOGUE_BIAS, _EPILOGUE_GELU_BIAS = 4, 36
_MAX_WORKSPACE = 1
_ALGORITHM = {"id": 0, "tile": 1, "split_k": 2, "swizzle": 4, "custom": 5, "stages": 6, "cluster": 8}


class _Found(ctypes.Structure):
    _fields_ = (("algorithm", ctypes.c_uint64 * 8), ("workspace", ctypes.c_size_t), ("state", ctypes.c_int),
                ("waves", ctypes.c_float), ("reserved", ctypes.c_int * 4))  # fmt: skip


class Product(NamedTuple):
    """x [rows, inner] times weight [outer, inner] and bias, GELU behind it or not."""

    model: str
    rows: int
    inner: int
    outer: int
    gelu: bool


def products() -> Iterator[Product]:
    for model, (dim, hidden) in WIDTHS.items():
        yield Product(model, TOKENS, dim, dim, False)
        for rows in (FEED_FORWARD_TOKENS, TOKENS):
            yield Product(model, rows, dim, hidden, True)
            yield Product(model, rows, hidden, dim, False)


class CublasLt:
    """One product's descriptors and algorithms. Raises OSError where the library is not loaded or refuses."""

    def __init__(self, product: Product, bias: Tensor) -> None:
        self._lib = next(filter(None, map(_loaded, _LIBRARIES)), None)
        if self._lib is None:
            raise OSError(f"none of {', '.join(_LIBRARIES)} is there: this torch is not built with CUDA 12 or 13")
        self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=bias.device)
        self._handle, self._product = self._made("Create"), self._made("MatmulDescCreate", _COMPUTE_32F, _R_32F)
        for attribute, value, kind in (
            (_TRANSA, 1, ctypes.c_int32),
            (_TRANSB, 0, ctypes.c_int32),
            (_EPILOGUE, _EPILOGUE_GELU_BIAS if product.gelu else _EPILOGUE_BIAS, ctypes.c_int32),
            (_BIAS_POINTER, bias.data_ptr(), ctypes.c_uint64),
        ):
            self._set("MatmulDescSetAttribute", self._product, attribute, kind(value))
        # Column by column, as cuBLAS counts, out^T = (weight^T)^T x^T.
        shapes = ((product.inner, product.outer), (product.inner, product.rows), (product.outer, product.rows))
        self._layouts = [self._layout(*shape) for shape in shapes]

    def algorithms(self) -> list[_Found]:
        preference = self._made("MatmulPreferenceCreate")
        self._set("MatmulPreferenceSetAttribute", preference, _MAX_WORKSPACE, ctypes.c_uint64(_WORKSPACE_BYTES))
        found, count = (_Found * _MOST)(), ctypes.c_int()
        weight, x, out = self._layouts
        self._call("MatmulAlgoGetHeuristic", self._handle, self._product, weight, x, out, out, preference, _MOST, found,
                   ctypes.byref(count))  # fmt: skip
        return [one for one in found[: count.value] if one.state == 0]

    def run(self, algorithm: _Found, x: Tensor, weight: Tensor, out: Tensor) -> None:
        one, zero = ctypes.c_float(1), ctypes.c_float(0)
        of_weight, of_x, of_out = self._layouts
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, x, out, self._workspace)]
        stream = ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream)
        self._call("Matmul", self._handle, self._product, ctypes.byref(one), pointers[0], of_weight, pointers[1], of_x,
                   ctypes.byref(zero), pointers[2], of_out, pointers[2], of_out, ctypes.byref(algorithm.algorithm),
                   pointers[3], ctypes.c_size_t(_WORKSPACE_BYTES), stream)  # fmt: skip

    def describe(self, algorithm: _Found) -> dict[str, int | None]:
        values: dict[str, int | None] = {}
        for name, attribute in _ALGORITHM.items():
            value, size = ctypes.c_uint32(0), 2 if name == "cluster" else 4
            function = self._lib.cublasLtMatmulAlgoConfigGetAttribute
            status = function(ctypes.byref(algorithm.algorithm), attribute, ctypes.byref(value), ctypes.c_size_t(size),
                              ctypes.byref(ctypes.c_size_t()))  # fmt: skip
            values[name] = None if status else value.value
        return values

    def _layout(self, rows: int, columns: int) -> ctypes.c_void_p:
        sizes = ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows)
        return self._made("MatrixLayoutCreate", _R_16BF, *sizes)

    def _made(self, function: str, *args: Any) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self._call(function, ctypes.byref(made), *args)
        return made

    def _set(self, function: str, of: ctypes.c_void_p, attribute: int, value: Any) -> None:
        self._call(function, of, attribute, ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value)))

    def _call(self, function: str, *args: Any) -> None:
        if status := getattr(self._lib, f"cublasLt{function}")(*args):
            raise OSError(f"cublasLt{function} gave status {status}")


def _loaded(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def rows_of(product: Product, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """A row for torch's own way and for each algorithm, the fastest first."""
    x = torch.randn(product.rows, product.inner, device=device, dtype=torch.bfloat16)
    weight, bias = layer(product.outer, product.inner, device, torch.bfloat16)
    out = x.new_empty(product.rows, product.outer)

    def by_torch() -> Tensor:
        return linear_gelu(x, weight, bias) if product.gelu else torch.addmm(bias, x, weight.t(), out=out)

    def timed(run: Callable[[], object]) -> float:
        return harness.measure(run, device, budget_s=seconds, repeats=(3, 2000), flush=False).median

    expected, library = by_torch().clone(), CublasLt(product, bias)
    row = {"bench": "algorithms", **product._asdict()}
    flops = 2 * product.rows * product.inner * product.outer
    timed(by_torch)  # so that all of them find the GPU warm, at the clock that it can keep
    found = [({"impl": "torch", "equal": True}, timed(by_torch))]
    for place, algorithm in enumerate(library.algorithms()):
        library.run(algorithm, x, weight, out)
        described = {"impl": f"cublasLt #{place}", "equal": torch.equal(out, expected), **library.describe(algorithm)}
        found.append((described, timed(lambda algorithm=algorithm: library.run(algorithm, x, weight, out))))
    for described, time_s in sorted(found, key=lambda pair: pair[1]):
        yield row | described | {"ms_median": time_s * 1e3, "tflops": flops / time_s / 1e12}


def line(row: dict[str, Any]) -> str:
    what = f"{row['rows']} x {row['inner']} -> {row['outer']}{' GELU' if row['gelu'] else ''}"
    equal = "" if row["equal"] else "  other bits"
    return f"{row['model']:5} {what:30} {row['impl']:13} {row['ms_median']:8.3f} ms {row['tflops']:6.0f} TFLOP/s{equal}"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__, "algorithms", device=False)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each algorithm (default: %(default)s)")
    args = parser.parse_args(argv)
    device, out = args.device, args.out
    if device.type != "cuda":
        parser.error("cuBLASLt runs on a GPU, and there is none here")
    print(harness.provenance(device))
    for product in products():
        rows = rows_of(product, device, args.seconds)
        harness.keep((row | harness.common(device) for row in rows), line, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
