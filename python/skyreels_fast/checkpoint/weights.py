"""Weight files: which ones a directory holds, and their tensors, memory-mapped."""

from __future__ import annotations

import json
import mmap
import re
import sys
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})")
_KNOWN_STEMS = ("model", "diffusion_pytorch_model")
# Weights of other parts, which lie beside the transformer's in the published layout.
_OTHER_PARTS = ("Wan2.1_VAE", "models_t5", "models_clip")
_MAP_NORESERVE = 0x4000  # on Linux; Python names it from 3.13 on
_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class CheckpointError(ValueError):
    """A model directory that is unknown, incomplete, damaged or not what it says it is."""


def read_json(file: Path) -> dict:
    """The object in a JSON file; {} where there is no file. Raises CheckpointError when it is not a JSON object."""
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not readable JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return values


def weight_files(directory: Path) -> list[Path]:
    """The files that together hold one model's weights; [] where there are none.

    Taken in this order: X.safetensors, the shards that X.safetensors.index.json names, X-000NN-of-000MM.safetensors,
    X.pth; with X = model, then diffusion_pytorch_model, then the one other name there is.

    Raises:
        CheckpointError: a shard is missing, or several names are there and none is known.
    """
    for stem in _KNOWN_STEMS:
        if files := _files_named(directory, stem):
            return files
    stems = sorted({_stem(file) for file in (*directory.glob("*.safetensors"), *directory.glob("*.pth"))})
    stems = [stem for stem in stems if not stem.startswith(_OTHER_PARTS)]
    if len(stems) > 1:
        raise CheckpointError(
            f"{directory} holds weights named {', '.join(stems)}: name those to use model.safetensors"
        )
    return _files_named(directory, stems[0]) if stems else []


def _stem(file: Path) -> str:
    shard = _SHARD.fullmatch(file.stem)
    return shard[1] if shard else file.stem


def _files_named(directory: Path, stem: str) -> list[Path]:
    single = directory / f"{stem}.safetensors"
    if single.is_file():
        return [single]
    index = directory / f"{stem}.safetensors.index.json"
    names = _index_shards(index) if index.is_file() else _numbered_shards(directory, stem)
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise CheckpointError(f"{directory} lacks {', '.join(missing)} of its {len(names)} weight files: download them")
    single_pth = directory / f"{stem}.pth"
    return [directory / name for name in names] or ([single_pth] if single_pth.is_file() else [])


def _index_shards(index: Path) -> list[str]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{index} holds no weight_map")
    for name, shard in shards.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index}: weight_map: {name}: {shard!r:.80} is not the name of a file beside it")
    return sorted(set(shards.values()))


def _numbered_shards(directory: Path, stem: str) -> list[str]:
    shards = [_SHARD.fullmatch(file.stem) for file in directory.glob(f"{stem}-*.safetensors")]
    counts = sorted({shard[2] for shard in shards if shard and shard[1] == stem})
    return [f"{stem}-{i:05d}-of-{count}.safetensors" for count in counts for i in range(1, int(count) + 1)]


@torch.inference_mode(False)
def read_weights(files: Iterable[Path]) -> dict[str, Tensor]:
    """Every tensor of the files by name, on the CPU, mapped: data is read from disk only when it is used.

    Raises CheckpointError when a file is damaged or a name comes twice.
    """
    weights: dict[str, Tensor] = {}
    for file in files:
        tensors = _read(file)
        if twice := weights.keys() & tensors.keys():
            raise CheckpointError(f"{file} holds {min(twice)}, which another weight file beside it holds too")
        weights.update(tensors)
    return weights


def one_line(error: BaseException) -> str:
    """What an error says, as far as its first line goes; what it is where it says nothing."""
    line = str(error).strip().split("\n", 1)[0]
    return line if line and not isinstance(error, KeyError) else f"{type(error).__name__} {line}".strip()


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix != ".safetensors":
        return _read_pth(file)
    try:
        with safe_open(file, framework="numpy"):  # checks the header, and that the data is all there
            return _mapped_tensors(file)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read, download it again ({one_line(error)})") from error


def _mapped_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a sound safetensors file: 8 bytes of header length, the header in JSON, the data."""
    data = _mapped(file)
    start = 8 + int.from_bytes(data[:8].numpy().tobytes(), "little")
    header = json.loads(data[8:start].numpy().tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{name} is of type {entry['dtype']}")
        begin, end = entry["data_offsets"]
        flat, dtype = data[start + begin : start + end], _DTYPES[entry["dtype"]]
        aligned = flat if flat.storage_offset() % dtype.itemsize == 0 else flat.clone()
        tensors[name] = aligned.view(dtype).view(entry["shape"])
    return tensors


def _mapped(file: Path) -> Tensor:
    """A file's bytes; what is written to them stays in memory. Files larger than the memory can be mapped, too."""
    with file.open("rb") as opened:
        if sys.platform == "linux":
            flags, access = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            mapped = mmap.mmap(opened.fileno(), 0, flags=flags, prot=access)
        else:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(mapped, dtype=torch.uint8)


def _read_pth(file: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # guesses at a damaged file, which is refused anyway
            # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read, download it again ({one_line(error)})") from error
    except Exception as error:  # a pickle of anything raises anything; torch's own words advise to run its code
        reason = "it is damaged, or holds more than plain tensors"
        raise CheckpointError(f"{file} cannot be read, download it again ({reason})") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise CheckpointError(f"{file} holds something else than named tensors")
    return dict(tensors)
