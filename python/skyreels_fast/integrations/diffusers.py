"""Our ops under diffusers' SkyReels-V2 and Wan transformers: `accelerate(pipe)`, undone by `restore(pipe)`.

The models stay diffusers' own, with their weights, names, configs and hooks; what changes is how they compute:

- modulation stays a row a latent frame; it is not expanded to tokens, nor causal blocks to a mask;
- gate, residual, norm and modulation are one pass, with a float32 residual within a block;
- the norm of queries and keys and their rotary positions are one pass, the positions computed from the grid;
- the feed-forward's first product applies GELU too.

A linear layer that is more than a plain one is called as the module that it is, so LoRA, quantised layers, offloading
and layerwise casting work as before. Keys and values of the text are computed at every call, as diffusers does: they
are a hundredth of the tokens, and no key made of tensors tells that a LoRA was fused into the weights in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from skyreels_fast.integrations._diffusers_block import Context, Grid, check_processor, replacements
from skyreels_fast.integrations._forwards import Replacement, check_replaceable, install, remove
from skyreels_fast.ops import choose_attention, norm_scale_shift

Subject = TypeVar("Subject")

_COMPONENTS = ("transformer", "transformer_2")


class _Transformer(Replacement):
    """What the two models share: all but how they are conditioned."""

    def _grid(self, latents: Tensor) -> Grid:
        frames, height, width = (
            size // patch for size, patch in zip(latents.shape[2:], self.module.config.patch_size, strict=True)
        )
        return frames, height, width

    def _denoise(
        self, latents: Tensor, e: Tensor, e0: Tensor, context: Context, block_tokens: int | None = None
    ) -> Tensor:
        """Latents [B, C, F, H, W] through patches, blocks and head; e [B, F', D] and e0 [B, F', 6 * D] modulate."""
        model, grid = self.module, self._grid(latents)
        tokens = grid[0] * grid[1] * grid[2]
        if e.shape[1] not in (1, grid[0], tokens):
            raise ValueError(f"timestep must be one a video, a latent frame ({grid[0]}) or a token, not {e.shape[1]}")
        if e.shape[0] not in (1, latents.shape[0]):
            raise ValueError(f"timestep must be that of one video or of all {latents.shape[0]}, not of {e.shape[0]}")
        e, e0 = (rows.expand(latents.shape[0], -1, -1) for rows in (e, e0))
        e0 = e0.unflatten(-1, (6, -1))
        x = model.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()
        checkpointed = torch.is_grad_enabled() and model.gradient_checkpointing
        for block in model.blocks:
            if checkpointed:
                x = model._gradient_checkpointing_func(block, x, context, e0, grid, block_tokens)
            else:
                x = block(x, context, e0, grid, block_tokens)
        # Where a model is spread over devices, the last block's is not the embedding's.
        rows = (model.scale_shift_table.float() + e.float().unsqueeze(2)).to(x.device)
        shift, scale = rows.unbind(2)
        y = model.proj_out(norm_scale_shift(x, scale, shift, eps=model.norm_out.eps))
        return _unpatch(y, grid, tuple(model.config.patch_size))

    def _lora_scaled(self, attention_kwargs: dict[str, Any] | None) -> AbstractContextManager[None]:
        scale = (attention_kwargs or {}).get("scale", 1.0)
        return nullcontext() if scale == 1.0 else _lora_scaled(self.module, scale)


class _SkyReels(_Transformer):
    """SkyReelsV2Transformer3DModel: timestep [B], or [B, F] for one a latent frame; causal blocks of latent frames."""

    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        enable_diffusion_forcing: bool = False,
        fps: Tensor | list[int] | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        model = self.module
        _, height, width = self._grid(hidden_states)
        frames_a_block = model.config.num_frame_per_block
        block_tokens = frames_a_block * height * width if frames_a_block > 1 else None
        with self._lora_scaled(attention_kwargs):
            e, e0, *context = model.condition_embedder(timestep, encoder_hidden_states, encoder_hidden_states_image)
            if timestep.dim() == 1:
                e, e0 = e.unsqueeze(1), e0.unsqueeze(1)
            if model.config.inject_sample_info:
                e0 = e0 + self._frame_rate(fps, e0.device)
            out = self._denoise(hidden_states, e, e0, Context(*context), block_tokens)
        return _output(out, return_dict)

    def _frame_rate(self, fps: Tensor | list[int] | None, device: torch.device) -> Tensor:
        """The modulation [1 or B, 1, 6 * D] of each video's frame rate: 0 for 16 fps, 1 for any other."""
        if fps is None:
            raise ValueError("this model is conditioned on the frame rate: give fps, 0 for 16 fps and 1 for others")
        model = self.module
        index = torch.as_tensor(fps, dtype=torch.long, device=device).reshape(-1)
        return model.fps_projection(model.fps_embedding(index)).unsqueeze(1)


class _Wan(_Transformer):
    """WanTransformer3DModel: timestep [B], [B, F], or [B, L] for one a token, as Wan 2.2 TI2V gives it."""

    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        conditions = (encoder_hidden_states, encoder_hidden_states_image)
        with self._lora_scaled(attention_kwargs):
            if timestep.dim() == 1:
                e, e0, *context = self.module.condition_embedder(timestep, *conditions)
                e, e0 = e.unsqueeze(1), e0.unsqueeze(1)
            else:
                rows = _one_a_frame(timestep, self._grid(hidden_states))
                options = {"timestep_seq_len": rows.shape[1]}
                e, e0, *context = self.module.condition_embedder(rows.flatten(), *conditions, **options)
            out = self._denoise(hidden_states, e, e0, Context(*context))
        return _output(out, return_dict)


def _one_a_frame(timestep: Tensor, grid: Grid) -> Tensor:
    """timestep [B, L] as [B, F] where the tokens of each frame share theirs, else as it is.

    Looking costs a wait for the device, so a graph that is being compiled keeps a row a token.
    """
    if torch.compiler.is_compiling() or timestep.shape[1] != grid[0] * grid[1] * grid[2]:
        return timestep
    frames = timestep.unflatten(1, (grid[0], -1))
    return frames[..., 0] if bool((frames == frames[..., :1]).all()) else timestep


def _unpatch(tokens: Tensor, grid: Grid, patch: Grid) -> Tensor:
    """Tokens [B, f * h * w, pf * ph * pw * C], channels last in a patch, to [B, C, f * pf, h * ph, w * pw]."""
    cut = tokens.unflatten(1, grid).unflatten(-1, (*patch, -1)).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return cut.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _output(out: Tensor, return_dict: bool) -> Any:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=out) if return_dict else (out,)


@contextmanager
def _lora_scaled(model: nn.Module, scale: float) -> Iterator[None]:
    from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers

    if not USE_PEFT_BACKEND:  # then no LoRA is loaded either
        yield
        return
    scale_lora_layers(model, scale)
    try:
        yield
    finally:
        unscale_lora_layers(model, scale)


def _transformers(subject: Any) -> dict[nn.Module, type[_Transformer]]:
    """The models of a pipeline, or the one given, each with the forward it takes. Raises for what is neither."""
    try:
        from diffusers import SkyReelsV2Transformer3DModel, WanTransformer3DModel
        from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2Attention  # noqa: F401
    except ImportError:  # the last one: an attention of another kind, before 0.36
        raise ImportError("this needs diffusers 0.36 or later: pip install 'skyreels-fast[diffusers]'") from None
    forwards = {SkyReelsV2Transformer3DModel: _SkyReels, WanTransformer3DModel: _Wan}
    found = {}
    given = [subject] if isinstance(subject, nn.Module) else [getattr(subject, name, None) for name in _COMPONENTS]
    for model in given:
        model = getattr(model, "_orig_mod", model)  # of torch.compile
        for known, forward in forwards.items():
            if isinstance(model, known) and type(model).forward is known.forward:
                found[model] = forward
    unknown = [model for model in given if model is not None and getattr(model, "_orig_mod", model) not in found]
    if unknown or not found:
        what = type(unknown[0] if unknown else subject).__name__
        raise ValueError(
            f"{what} is not supported: give a {' or a '.join(cls.__name__ for cls in forwards)}, or a pipeline with "
            f"such a {' or '.join(_COMPONENTS)}"
        )
    return found


def _check(model: nn.Module) -> None:
    name = type(model).__name__
    if getattr(model, "_parallel_config", None) is not None:
        raise ValueError(f"{name}: its tokens are split over devices by enable_parallelism, which is not supported")
    for index, block in enumerate(model.blocks):
        for label, attn in (("attn1", block.attn1), ("attn2", block.attn2)):
            check_processor(attn, f"{name}: blocks.{index}.{label}")


def _device(model: nn.Module) -> torch.device:
    """Where it will run: offloaded weights, and those not moved yet, are on the CPU now."""
    now = next(model.parameters()).device
    return torch.device("cuda") if now.type in ("cpu", "meta") and torch.cuda.is_available() else now


def _replacements(model: nn.Module, forward: type[_Transformer], backend: str | None = None) -> list[Replacement]:
    return [forward(model), *(one for block in model.blocks for one in replacements(block, backend))]


def accelerate(pipe_or_transformer: Subject, *, attention: str | None = None) -> Subject:
    """Let diffusers' SkyReels-V2 or Wan compute with our ops; returns what it was given.

    pipe_or_transformer: a SkyReelsV2Transformer3DModel, a WanTransformer3DModel, or a pipeline with such a
    `transformer` (and `transformer_2`). attention: a backend of `ops.attention` (default: its own choice); diffusers'
    attention backend is not asked. Works before or after LoRAs are loaded, offloading is set up or blocks are
    compiled; again, with another `attention`, too. Nothing is copied.

    Raises ValueError for other models, attention processors that are not the model's own, models split over devices,
    and a backend that is not there; ImportError where diffusers is not installed.
    """
    models = _transformers(pipe_or_transformer)
    wanted = []
    for model, forward in models.items():
        _check(model)
        choose_attention(attention, _device(model), model.dtype)
        wanted += _replacements(model, forward, attention)
    for replacement in wanted:
        check_replaceable(replacement.module)
    for replacement in wanted:
        install(replacement)
    return pipe_or_transformer


def restore(pipe_or_transformer: Subject) -> Subject:
    """Undo `accelerate`; returns what it was given, and changes nothing that was not accelerated."""
    for model, forward in _transformers(pipe_or_transformer).items():
        for replacement in _replacements(model, forward):
            remove(replacement.module)
    return pipe_or_transformer
