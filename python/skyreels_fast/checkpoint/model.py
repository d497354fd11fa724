"""`Checkpoint`: what a model directory holds, in the published layout or in diffusers'."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..config import LATENT_CHANNELS, LATENTS_MEAN, LATENTS_STD, MODES, TransformerConfig
from .fill import Home, check, fill
from .locate import locate
from .renames import publish, transformer_name, transformer_settings, vae_name
from .weights import CheckpointError, one_line, read_json, read_weights, weight_files

# Each part beside the transformer: its file in the published layout; in diffusers' it is the folder of its name.
_PUBLISHED = {
    "vae": "Wan2.1_VAE.pth",
    "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
    "image_encoder": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
}
_TOKENIZERS = ("google/umt5-xxl", "tokenizer")


class Encoder(Protocol):
    """A module that knows under which of its own names a checkpoint's tensors go."""

    def renamed(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]: ...

    def name_in_checkpoint(self, name: str) -> str: ...


@dataclass(frozen=True)
class Checkpoint:
    """One model directory. Make it with `open`; weights are read when asked for, and then mapped, not loaded."""

    root: Path
    name: str  # the hub id, or the directory's name
    config: TransformerConfig
    generation_config: dict  # the model's own defaults for requests; {} where it has none

    @classmethod
    def open(cls, path_or_id: str | Path) -> Checkpoint:
        """Open a directory, a hub id ("org/name", downloaded once), or "tiny", the bundled model.

        Raises:
            CheckpointError (a ValueError): it cannot be found, or its config.json is missing or unusable.
        """
        root, name = locate(path_or_id)
        config_file = _transformer_directory(root) / "config.json"
        values = read_json(config_file)
        if not values:
            raise CheckpointError(
                f"{root} is no model directory: config.json (or transformer/config.json) is missing or empty"
            )
        try:
            settings = transformer_settings(values) if "num_attention_heads" in values else values
            config = TransformerConfig.from_dict(settings)
        except (ValueError, TypeError, ArithmeticError) as error:
            raise CheckpointError(f"{config_file}: {str(error).removeprefix('config.json: ')}") from error
        return cls(root, name, config, read_json(root / "generation_config.json"))

    def resolution_hint(self) -> str:
        """Whether the name, or the way the published 720P models name their shards, says "720P"; else "540P"."""
        named = "720P" in self.name.upper()
        return "720P" if named or any(self.root.glob("diffusion_pytorch_model-*.safetensors")) else "540P"

    def mode_hint(self) -> str | None:
        """What the model was made for ("df", "t2v" or "i2v"), as far as its files and its name tell."""
        if self.config.model_type == "i2v":
            return "i2v"
        if mode := self.generation_config.get("mode"):
            if mode not in MODES:
                raise CheckpointError(f"{self.root}: generation_config.json: mode {mode!r} is not one of {MODES}")
            return mode
        pipeline = read_json(self.root / "model_index.json").get("_class_name", "")
        if "DiffusionForcing" in pipeline or self.config.inject_sample_info or _has_word(self.name, "DF"):
            return "df"
        return "t2v" if pipeline == "SkyReelsV2Pipeline" or _has_word(self.name, "T2V") else None

    def require(self, *parts: str) -> None:
        """Check that parts ("vae", "text_encoder" with its tokenizer, "image_encoder") are there.

        Raises CheckpointError naming every file that is not.
        """
        if lacking := [file for part in parts for file in self._lacking(part)]:
            raise CheckpointError(f"{self.root} lacks {', '.join(lacking)}")

    def files(self) -> dict[str, Path]:
        """Every file that decides what the model makes, by its name in the directory."""
        files = [self.root / "model_index.json", *weight_files(_transformer_directory(self.root))]
        files.append(_transformer_directory(self.root) / "config.json")
        for part in _PUBLISHED:
            files += [*self._files(part), self._settings_file(part)]
        files += [self.root / name / "tokenizer.json" for name in _TOKENIZERS]
        return {str(file.relative_to(self.root)): file for file in files if file.is_file()}

    def transformer_weights(self) -> dict[str, Tensor]:
        """The DiT's tensors under their published names, mapped."""
        directory = _transformer_directory(self.root)
        files = weight_files(directory)
        if not files:
            raise CheckpointError(f"{directory} lacks model.safetensors (or its shards model-000NN-of-000MM)")
        weights = read_weights(files)
        return publish(weights, transformer_name) if "condition_embedder.time_proj.weight" in weights else weights

    def check_transformer(self, model: nn.Module) -> None:
        """Compare names and shapes with `model`'s, a DiT that may be on the meta device; reads no data.

        Raises CheckpointError naming the tensors that are missing, unknown or misshapen.
        """
        check(model, self.transformer_weights(), model.key_parts(), what=self._label("transformer"))

    def load_transformer(self, model: nn.Module, device: torch.device | str | Home, dtype: torch.dtype) -> None:
        """Give `model`, a DiT on the meta device, its weights, all in `dtype`. Raises as `check_transformer`."""
        sources, parts = self.transformer_weights(), model.key_parts()
        fill(model, sources, parts, device=device, dtype=dtype, what=self._label("transformer"))

    def vae_weights(self) -> dict[str, Tensor]:
        """The VAE's tensors, named as in Wan2.1_VAE.pth, mapped."""
        weights, _ = self._part("vae")
        return publish(weights, vae_name) if "encoder.conv_in.weight" in weights else weights

    def vae_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each latent channel: from vae_config.json or vae/config.json, or Wan 2.1's.

        Raises CheckpointError where they are not 16 finite numbers each, or a deviation is not above 0.
        """
        file, settings = self._settings_file("vae"), self._settings("vae")
        mean, std = settings.get("latents_mean", LATENTS_MEAN), settings.get("latents_std", LATENTS_STD)
        for name, values, is_right in (("latents_mean", mean, _is_finite), ("latents_std", std, _is_positive)):
            is_list = isinstance(values, (list, tuple)) and len(values) == LATENT_CHANNELS
            if not is_list or not all(map(is_right, values)):
                above = " above 0" if name == "latents_std" else ""
                raise CheckpointError(f"{file}: {name} is not a list of {LATENT_CHANNELS} finite numbers{above}")
        return tuple(mean), tuple(std)

    def check_vae(self, vae: nn.Module) -> None:
        """As `check_transformer`, of the VAE."""
        check(vae, self.vae_weights(), what=self._label("VAE"))

    def load_vae(self, vae: nn.Module, device: torch.device | str | Home, dtype: torch.dtype) -> None:
        """Give `vae`, on the meta device, its weights. Raises CheckpointError where they do not fit it exactly."""
        fill(vae, self.vae_weights(), device=device, dtype=dtype, what=self._label("VAE"))

    def text_weights(self) -> tuple[dict[str, Tensor], dict]:
        """The text encoder's tensors, mapped, with the published names or transformers', and its settings."""
        return self._part("text_encoder")

    def image_weights(self) -> tuple[dict[str, Tensor], dict]:
        """The image encoder's tensors, mapped, with the published names or transformers', and its settings."""
        return self._part("image_encoder")

    def tokenizer_path(self) -> Path:
        """The directory with the text encoder's tokenizer.json. Raises CheckpointError where there is none."""
        for name in _TOKENIZERS:
            if (self.root / name / "tokenizer.json").is_file():
                return self.root / name
        raise CheckpointError(f"{self.root} lacks {_TOKENIZERS[0]}/tokenizer.json (or {_TOKENIZERS[1]}/)")

    def check_encoder(self, part: str, make: Callable[[dict[str, Tensor], dict], Encoder]) -> Encoder:
        """Compare the names and shapes of an encoder's tensors with those it needs; reads no data.

        Returns the encoder, still on the meta device.

        Args:
            part: "text_encoder" or "image_encoder".
            make: (tensors, settings) → the encoder on the meta device; whatever it raises is what is wrong with them.

        Raises:
            CheckpointError: one line with the tensors that are missing, unknown or misshapen, or with what `make` said.
        """
        what = self._label(part.replace("_", " "))
        weights, settings = self._part(part)
        try:
            encoder = make(weights, settings)
            sources = encoder.renamed(weights)
        except Exception as error:  # the libraries beneath raise what they like at odd shapes and settings
            raise CheckpointError(f"{what}: {one_line(error)}") from error
        check(encoder, sources, what=what, shown=encoder.name_in_checkpoint)
        return encoder

    def load_text_encoder(self, encoder: Encoder, device: torch.device | str | Home, dtype: torch.dtype) -> None:
        """Give `encoder`, made from `text_weights`, its weights. Raises CheckpointError where they do not fit."""
        self._load_encoder(encoder, "text_encoder", device, dtype)

    def load_image_encoder(self, encoder: Encoder, device: torch.device | str | Home, dtype: torch.dtype) -> None:
        """Give `encoder`, made from `image_weights`, its weights. Raises CheckpointError where they do not fit."""
        self._load_encoder(encoder, "image_encoder", device, dtype)

    def _load_encoder(self, encoder: Encoder, part: str, device: torch.device | str | Home, dtype: torch.dtype) -> None:
        sources, what = encoder.renamed(self._part(part)[0]), self._label(part.replace("_", " "))
        fill(encoder, sources, device=device, dtype=dtype, what=what, shown=encoder.name_in_checkpoint)

    def _label(self, part: str) -> str:
        return f"{part} of {self.name}"

    def _part(self, part: str) -> tuple[dict[str, Tensor], dict]:
        self.require(part)
        return read_weights(self._files(part)), self._settings(part)

    def _files(self, part: str) -> list[Path]:
        file = self.root / _PUBLISHED[part]
        return [file] if file.is_file() else weight_files(self.root / part)

    def _settings(self, part: str) -> dict:
        return read_json(self._settings_file(part))

    def _settings_file(self, part: str) -> Path:
        """A part's own config.json in diffusers' layout; beside a published file, an optional PART_config.json."""
        is_published = (self.root / _PUBLISHED[part]).is_file()
        return self.root / f"{part}_config.json" if is_published else self.root / part / "config.json"

    def _lacking(self, part: str) -> list[str]:
        lacking = [] if self._files(part) else [f"{_PUBLISHED[part]} (or {part}/)"]
        if part == "text_encoder" and not any((self.root / name / "tokenizer.json").is_file() for name in _TOKENIZERS):
            lacking.append(f"{_TOKENIZERS[0]}/tokenizer.json (or {_TOKENIZERS[1]}/)")
        return lacking


def _transformer_directory(root: Path) -> Path:
    inner = root / "transformer"
    return inner if (inner / "config.json").is_file() else root


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def _is_positive(value: object) -> bool:
    return _is_finite(value) and value > 0


def _has_word(name: str, word: str) -> bool:
    """Whether `word` stands alone in the name's last part, between anything but letters and digits."""
    return bool(re.search(rf"(?<![a-z0-9]){word}(?![a-z0-9])", name.rpartition("/")[2], re.IGNORECASE))
