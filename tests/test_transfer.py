"""Reading weights: from the files where they are mapped, in chunks, by threads; how much the host has room for."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from skyreels_fast import host_memory, transfer
from skyreels_fast.checkpoint import CheckpointError, fill
from skyreels_fast.transfer import Reader, located

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(333, 257, generator=generator),
        "half": torch.randn(1031, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.0),
        "empty": torch.empty(0, 3),
    }


def mapped(directory: Path, name: str) -> dict[str, Tensor]:
    file = directory / name
    if file.suffix == ".pth":
        torch.save(weights(), file)
        return torch.load(file, mmap=True, weights_only=True)
    save_file(weights(), file)
    return load_file(file)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(transfer, "_INLINE_BYTES", 0)


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts, preadv = [], os.preadv

    def counted(descriptor: int, buffers: list, offset: int) -> int:
        # As the system may: less than was asked for.
        counts.append(preadv(descriptor, [memoryview(buffers[0])[:300]], offset))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counted)
    return counts


@linux
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["a.safetensors", "a file.pth"])
def test_mapped_tensors_are_read_from_their_file(
    tmp_path: Path, name: str, dtype: torch.dtype | None, small_chunks: None, bytes_read: list[int]
) -> None:
    tensors, expected = mapped(tmp_path, name), weights()
    targets = {key: torch.full(t.shape, -1.0, dtype=dtype or t.dtype) for key, t in tensors.items()}
    with Reader("cpu", threads=3) as reader:
        reader.copy(zip(located(tensors.values()), targets.values(), strict=True))
    assert sum(bytes_read) == sum(tensor.nbytes for tensor in expected.values())
    for key, target in targets.items():
        assert torch.equal(target, expected[key].to(target.dtype))


@linux
def test_views_are_located_in_their_file(tmp_path: Path, bytes_read: list[int]) -> None:
    matrix = mapped(tmp_path, "a.safetensors")["matrix"]
    parts = [matrix[100:200], matrix.reshape(-1)[5:50], matrix.t()[3]]
    targets = [torch.empty(part.shape) for part in parts]
    with Reader("cpu") as reader:
        reader.copy(zip(located(parts), targets, strict=True))
    expected = weights()["matrix"]
    assert torch.equal(targets[0], expected[100:200]) and torch.equal(targets[1], expected.reshape(-1)[5:50])
    assert torch.equal(targets[2], expected.t()[3])  # with gaps between its elements: copied
    assert sum(bytes_read) == targets[0].nbytes + targets[1].nbytes


@linux
def test_a_file_that_was_replaced_is_not_read(tmp_path: Path, bytes_read: list[int]) -> None:
    """The map still shows what it was."""
    tensors = mapped(tmp_path, "a.safetensors")
    other = {name: tensor + 1 for name, tensor in weights().items()}
    save_file(other, tmp_path / "new.safetensors")
    os.replace(tmp_path / "new.safetensors", tmp_path / "a.safetensors")
    target = torch.empty(333, 257)
    with Reader("cpu") as reader:
        reader.copy([(located([tensors["matrix"]])[0], target)])
    assert not bytes_read and torch.equal(target, weights()["matrix"])


def test_tensors_of_no_file_are_copied(small_chunks: None, bytes_read: list[int]) -> None:
    tensors = weights()
    targets = [torch.empty_like(tensor) for tensor in tensors.values()]
    with Reader("cpu", threads=3) as reader:
        reader.copy(zip(located(tensors.values()), targets, strict=True))
    assert not bytes_read
    assert all(torch.equal(*pair) for pair in zip(targets, tensors.values(), strict=True))


@linux
def test_a_file_that_ends_too_early_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"qkv": torch.ones(3, 5000)}, file)
    sources = {f"{part}.weight": rows[0] for part, rows in zip("qkv", load_file(file)["qkv"].split(1), strict=True)}
    os.truncate(file, 4096)
    with torch.device("meta"):
        module = nn.Module()
        module.weight = nn.Parameter(torch.empty(15000))
    parts = {"weight": ("q.weight", "k.weight", "v.weight")}
    with pytest.raises(CheckpointError, match="^toy: cannot be read .*in the middle of a tensor"):
        fill(module, sources, parts, device="cpu", dtype=torch.float32, what="toy")


# Host memory


def machine(monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    monkeypatch.delenv(host_memory.PINNED_VARIABLE, raising=False)
    monkeypatch.setattr(host_memory, "_lines", lambda file: files.get(str(file), "").splitlines())


GIB = 2**30
MEMINFO = {"/proc/meminfo": f"MemTotal: 1 kB\nMemAvailable:   {100 * 2**20} kB\n"}


def test_a_part_of_what_is_available_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, MEMINFO)
    assert host_memory.available_bytes() == 100 * GIB
    assert host_memory.pinnable_bytes() == 80 * GIB
    machine(monkeypatch, {"/proc/meminfo": f"MemAvailable: {20 * 2**20} kB"})
    assert host_memory.pinnable_bytes() == 12 * GIB
    machine(monkeypatch, {"/proc/meminfo": f"MemAvailable: {5 * 2**20} kB"})
    assert host_memory.pinnable_bytes() == 0
    machine(monkeypatch, {})
    assert host_memory.pinnable_bytes() == 0
    monkeypatch.setenv(host_memory.PINNED_VARIABLE, "40")
    assert host_memory.pinnable_bytes(held=15 * GIB) == 25 * GIB


def test_cgroups_limit_it(monkeypatch: pytest.MonkeyPatch) -> None:
    group = "/sys/fs/cgroup/job"
    v2 = {
        "/proc/self/cgroup": "0::/job/step",
        f"{group}/memory.max": str(64 * GIB),
        f"{group}/memory.current": str(50 * GIB),
        f"{group}/memory.stat": f"anon {20 * GIB}\ninactive_file {20 * GIB}\nactive_file {6 * GIB}",
        f"{group}/step/memory.max": "max",
        f"{group}/step/memory.current": str(50 * GIB),
    }
    machine(monkeypatch, MEMINFO | v2)
    assert host_memory.available_bytes() == 40 * GIB
    v1 = {
        "/proc/self/cgroup": "3:cpu,cpuacct:/job\n2:memory:/job",
        "/sys/fs/cgroup/memory/job/memory.limit_in_bytes": str(10 * GIB),
        "/sys/fs/cgroup/memory/job/memory.usage_in_bytes": str(4 * GIB),
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),
        "/sys/fs/cgroup/memory/memory.usage_in_bytes": str(4 * GIB),
    }
    machine(monkeypatch, MEMINFO | v1)
    assert host_memory.available_bytes() == 6 * GIB
