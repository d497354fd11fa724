"""What a window is given besides noise: text and image contexts, held latents, the image's channels."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from . import media
from .checkpoint import Checkpoint
from .config import VAE_STRIDE
from .dit.context import Context
from .encoders.image import ImageEncoder
from .encoders.text import TextEncoder, unread
from .placement import Placement
from .request import Settings
from .vae import VAE, Chain


class Conditions:
    """The encoders of one checkpoint: each is loaded when first needed and leaves when it has run."""

    def __init__(self, checkpoint: Checkpoint, placement: Placement, dtype: torch.dtype) -> None:
        self.checkpoint, self.placement, self.dtype = checkpoint, placement, dtype
        self._contexts: dict[str, Tensor] = {}

    def check(self, settings: Settings, guided: bool, prompts: Sequence[str]) -> list[str]:
        """What the user may want to know of the prompts, one line each.

        Raises ValueError for tensors of the wrong shape and for encoders the request needs but the model lacks.
        """
        config = self.checkpoint.config
        for name in ("context", "negative_context"):
            context = getattr(settings, name)
            if context is not None and not _is_context(context, config.text_len, config.text_dim):
                raise ValueError(
                    f"{name}: shape {tuple(context.shape)} is not [n, {config.text_dim}] with n from 1 to "
                    f"{config.text_len}"
                )
        texts = self._texts(settings, guided, prompts)
        tokenizer = TextEncoder.check(self.checkpoint) if texts else None
        if settings.mode == "i2v" and settings.clip_features is None:
            ImageEncoder.check(self.checkpoint)
        return [line for text in texts for line in unread(tokenizer, text)]

    def texts(self, settings: Settings, guided: bool, prompts: Sequence[str]) -> list[list[Tensor]]:
        """For each of the prompts the conditional and, if guided, the unconditional context, each [1, n, text_dim].

        They are on the host, one tensor for each distinct text.
        """
        wanted = self._texts(settings, guided, prompts)
        if wanted.keys() - self._contexts.keys():
            self._contexts = dict(zip(wanted, self._encode(list(wanted)), strict=True))
        texts = {prompt: context[None] for prompt, context in self._contexts.items()}
        own, negative = (
            None if given is None else given[None] for given in (settings.context, settings.negative_context)
        )
        if negative is None:
            negative = texts.get(settings.negative_prompt)
        return [[texts[prompt] if own is None else own, *([negative] if guided else [])] for prompt in prompts]

    @staticmethod
    def _texts(settings: Settings, guided: bool, prompts: Sequence[str]) -> dict[str, None]:
        """The distinct texts to encode."""
        wanted = dict.fromkeys(prompts if settings.context is None else ())
        if guided and settings.negative_context is None:
            wanted[settings.negative_prompt] = None
        return wanted

    def image_tokens(self, settings: Settings, pictures: dict[str, Tensor]) -> Tensor | None:
        """CLIP tokens [1, 257, 1280] of an I2V request's image."""
        if settings.mode != "i2v" or settings.clip_features is not None:
            return settings.clip_features
        encoder = ImageEncoder.load(self.checkpoint, self.dtype, self.placement.encoder_home)
        with self.placement.use(encoder, stay=False):
            return encoder.encode(pictures["image"][:, :, 0])

    def _encode(self, prompts: list[str]) -> list[Tensor]:
        encoder = TextEncoder.load(self.checkpoint, self.dtype, self.placement.encoder_home)
        with self.placement.use(encoder, stay=False):
            return [context.cpu() for context in encoder.encode(prompts)]


class Contexts:
    """What the DiT makes of the texts in use; what it made of others is let go before more is made.

    encode: text context → the DiT's.
    """

    def __init__(self, encode: Callable[[Tensor], Context]) -> None:
        self._encode = encode
        self._kept: dict[int, tuple[Tensor, Context]] = {}

    def of(self, texts: Sequence[Tensor]) -> list[Context]:
        """The contexts of one window's texts, in their order."""
        self._kept = {id(text): self._kept[id(text)] for text in texts if id(text) in self._kept}
        for text in texts:
            if id(text) not in self._kept:
                self._kept[id(text)] = text, self._encode(text)
        return [self._kept[id(text)][1] for text in texts]


class History:
    """The last pixel frames put out, which the next window begins with; on the host, so that the device is free."""

    def __init__(self, limit: int) -> None:
        self.limit, self._chunks = limit, deque[Tensor]()
        self.frames = 0

    def add(self, chunk: Tensor) -> None:
        """Append frames [1, 3, t, H, W] in [−1, 1] and forget those beyond the limit."""
        if not self.limit:
            return
        self._chunks.append(chunk.cpu())
        self.frames += chunk.shape[2]
        while self.frames > self.limit:
            surplus, oldest = self.frames - self.limit, self._chunks.popleft()
            if oldest.shape[2] > surplus:
                self._chunks.appendleft(oldest[:, :, surplus:].clone())
            self.frames -= min(surplus, oldest.shape[2])

    def chunks(self) -> Iterator[Tensor]:
        return iter(self._chunks)

    def whole(self) -> Tensor | None:
        """All that is kept as [1, 3, t, H, W]; None where that is nothing."""
        return torch.cat(list(self._chunks), dim=2) if self._chunks else None


def load_pictures(settings: Settings) -> dict[str, Tensor]:
    """The request's images by field, fitted to its size: float32 [1, 3, 1, H, W] in [−1, 1]."""
    given = {name: getattr(settings, name) for name in ("image", "end_image")}
    return {
        name: media.fit_image(media.load_image(source), settings.height, settings.width)[None]
        for name, source in given.items()
        if source is not None
    }


def image_channels(vae: VAE, image: Tensor, latents: int, shared: Chain | None = None) -> Tensor:
    """I2V's 20 extra channels [1, 20, F, h, w]: 4 of mask, 1 on the given frame, and the latents of (image, zeros).

    shared: the processes that encode together, as in `VAE.encode_stream`.
    """

    def frames() -> Iterator[Tensor]:
        yield image
        empty = torch.zeros_like(image).expand(-1, -1, VAE_STRIDE[0], -1, -1)
        yield from (empty for _ in range(latents - 1))

    encoded = vae.encode_stream(frames(), shared)
    mask = torch.zeros_like(encoded[:, :4])
    mask[:, :, 0] = 1
    return torch.cat([mask, encoded], dim=1)


def _is_context(context: Tensor, text_len: int, text_dim: int) -> bool:
    return context.ndim == 2 and 1 <= context.shape[0] <= text_len and context.shape[1] == text_dim
