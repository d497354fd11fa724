"""What loading costs: `python -m benchmarks.loading --model 14B --directory DIR`.

Writes a model of a published size with random bfloat16 weights to DIR, a new directory, or takes what an earlier call
wrote there. Then times reading the file alone, loading the transformer to the GPU, and loading it for --offload (into
pinned host memory); each cold, its pages dropped from the page cache, and warm. A floor goes with each: cold, reading
the file; warm, its bytes over the rate of pinned copies to the GPU, or for --offload the warm read.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import mmap
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from benchmarks.models import MODELS, RandomCheckpoint, RandomWeights, config
from benchmarks.options import Parser, reason
from skyreels_fast.checkpoint import Checkpoint
from skyreels_fast.dit.model import DiT
from skyreels_fast.placement import Placement

_CHUNK_BYTES = 8 * 2**20
_READERS = 16
WAYS = ("read", "resident", "offload")
# In a directory that `write_model` fills, from before the first byte of the model; holds the model's name.
MARKER = ".written_by_benchmarks_loading"


def write_model(directory: Path, model: str, device: torch.device) -> Path:
    """A model directory with random weights, made tensor by tensor; kept where it is whole already.

    Nothing that is whole is ever replaced. Raises ValueError for a directory with any other file than this wrote.
    """
    file = directory / "model.safetensors"
    part, settings = file.with_suffix(".part"), directory / "config.json"
    _check_own(directory, {file.name, part.name, settings.name}, model)
    if file.exists():
        return file
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MARKER).write_text(model)
    settings.write_text(json.dumps(dataclasses.asdict(config(model, "t2v"))))
    weights = RandomCheckpoint.of(model, "t2v", device, torch.bfloat16, text=False).transformer_weights()
    with part.open("wb") as out:
        out.write(_header(weights))
        for name in weights:
            out.write(weights[name].cpu().view(torch.uint8).numpy().data)
        out.flush()
        os.fsync(out.fileno())
    return part.rename(file)


def _check_own(directory: Path, files: set[str], model: str) -> None:
    there = {path.name for path in directory.iterdir()} if directory.exists() else set()
    marker = directory / MARKER
    if foreign := sorted(there - (files | {MARKER} if marker.name in there else set())):
        raise ValueError(f"holds {foreign[0]}, which this benchmark did not write; give a new directory")
    if there and (written := marker.read_text()) != model:
        raise ValueError(f"holds a random {written}, no {model}; give another directory")


def _header(weights: RandomWeights) -> bytes:
    """What a safetensors file begins with."""
    entries, end = {}, 0
    for name, shape in weights.shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def drop(file: Path) -> float:
    """Drop the file from the page cache; the share of it that stayed all the same."""
    gc.collect()
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            view = np.frombuffer(mapped, dtype=np.uint8)
            pages = np.zeros(-(-len(view) // mmap.PAGESIZE), dtype=np.uint8)
            address, length = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(view))
            failed = ctypes.CDLL(None).mincore(address, length, ctypes.c_void_p(pages.ctypes.data))
            del view
    return float("nan") if failed else float((pages & 1).mean())


def read_file(file: Path) -> None:
    """Read it whole with several threads, each into a buffer of its own."""
    size = file.stat().st_size
    descriptor = os.open(file, os.O_RDONLY)

    def read(reader: int) -> None:
        buffer = bytearray(_CHUNK_BYTES)
        for start in range(reader * _CHUNK_BYTES, size, _READERS * _CHUNK_BYTES):
            os.preadv(descriptor, [buffer], start)

    try:
        with ThreadPoolExecutor(_READERS) as pool:
            list(pool.map(read, range(_READERS)))
    finally:
        os.close(descriptor)


def load(directory: Path, device: torch.device, *, offload: bool) -> DiT:
    checkpoint = Checkpoint.open(directory)
    placement = Placement(device, offload=offload)
    with torch.device("meta"):
        dit = DiT(checkpoint.config)
    checkpoint.load_transformer(dit, placement.home, torch.bfloat16)
    harness.synchronize(device)
    return dit


def pcie_bytes_per_s(device: torch.device) -> float | None:
    """Of copies from pinned host memory to a GPU."""
    if device.type != "cuda":
        return None
    source = torch.ones(2**30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    timing = harness.measure(lambda: target.copy_(source, non_blocking=True), device, repeats=(5, 10), flush=False)
    return source.nbytes / timing.median


def measure(directory: Path, file: Path, device: torch.device) -> list[dict[str, Any]]:
    """Values of a row for each way, cold and warm."""
    ways: dict[str, Callable[[], object]] = {
        "read": lambda: read_file(file),
        "resident": lambda: load(directory, device, offload=False),
        "offload": lambda: load(directory, device, offload=True),
    }
    nbytes, rate = file.stat().st_size, pcie_bytes_per_s(device)
    rows = []
    for way in WAYS:
        for cache in ("cold", "warm"):
            stayed = drop(file) if cache == "cold" else None
            start = time.perf_counter()
            made = ways[way]()
            seconds = time.perf_counter() - start
            del made
            gc.collect()
            rows.append({"way": way, "cache": cache, "seconds": seconds, "gb_per_s": nbytes / seconds / 1e9,
                         "stayed_cached": stayed})  # fmt: skip
    reads = {row["cache"]: row["seconds"] for row in rows if row["way"] == "read"}
    for row in rows:
        by_pcie = rate is not None and (row["way"], row["cache"]) == ("resident", "warm")
        floor_s = nbytes / rate if by_pcie else reads[row["cache"]]
        row |= {"floor_s": floor_s, "times_floor": row["seconds"] / floor_s, "bytes": nbytes}
        row["pcie_gb_per_s"] = None if rate is None else rate / 1e9
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'':12}{'cache':>8}{'s':>10}{'GB/s':>10}{'floor s':>10}{'times':>8}{'stayed':>9}"]
    for row in rows:
        stayed = "" if row["stayed_cached"] is None else f"{row['stayed_cached']:.1%}"
        lines.append(
            f"{row['way']:12}{row['cache']:>8}{row['seconds']:10.2f}{row['gb_per_s']:10.2f}{row['floor_s']:10.2f}"
            f"{row['times_floor']:8.2f}{stayed:>9}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__, "loading")
    parser.add_argument("--model", default="14B", choices=MODELS)
    parser.add_argument("--directory", type=Path, required=True, help="new, or what an earlier call has written")
    args = parser.parse_args(argv)
    device, out = args.device, args.out
    print(harness.provenance(device))
    try:
        file = write_model(args.directory, args.model, device)
    except (ValueError, OSError) as error:
        parser.error(f"--directory {args.directory}: {reason(error)}")
    print(f"{file}: {file.stat().st_size / 1e9:.2f} GB", flush=True)
    rows = measure(args.directory, file, device)
    for row in rows:
        harness.append(out, {"bench": "loading", "impl": "skyreels_fast", "model": args.model, **row,
                             **harness.common(device)})  # fmt: skip
    print(table(rows))
    print(f"rows appended to {out}" if out else "no row was kept: give --out FILE")
    return 0


if __name__ == "__main__":
    sys.exit(main())
