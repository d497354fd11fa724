"""What a user asks for, checked before anything heavy is imported, and the same with every default filled in."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ._values import RequestError, checked, probe_image, probe_video
from ._words import listed
from .config import NEGATIVE_PROMPT, NEGATIVE_PROMPT_DF, RESOLUTIONS
from .prompts import Prompts, checked_prompts
from .sampling.windows import latent_frames, pixel_frames

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

__all__ = ["DEFAULT_PROMPT", "Request", "RequestError", "Settings", "resolve"]

DEFAULT_PROMPT = (
    "A red fox trots along a snowy forest trail at dawn, its breath rising in the cold air, sunlight slipping between "
    "the pines while the camera glides beside it."
)
# What only diffusion forcing does, with the value that leaves it off.
_DF_ONLY = {
    "video": None,
    "end_image": None,
    "ar_step": 0,
    "causal_attention": False,
    "causal_block_size": 1,
    "base_num_frames": None,
    "overlap_history": None,
    "addnoise_condition": 0,
    "prompts": None,
}
# The same of TeaCache.
_TEACACHE_ONLY = {"teacache_thresh": None, "use_ret_steps": False, "teacache_coefficients": None}
_NEEDS = {"height": "width", "width": "height", "end_image": "image", "video": "overlap_history (17 or 37 are usual)"}


@dataclass(frozen=True, eq=False)
class Request:
    """One video to render. Fields are the commands' flags (`video` is `--video_path`); None takes the model's default.

    height, width: pixels, multiples of 16, in place of `resolution` ("540P" or "720P"); they are taken as they are,
        while a size that comes from a name or from the model turns with a portrait image or video.
    prompts: prompts over time in place of `prompt`: texts, one a window (the last stays for those left), or
        (first frame, text) pairs; a window takes the text that holds at its first new frame.
    image, end_image: path or PIL image. video: path, or uint8 [F, H, W, 3].
    context, negative_context: [n <= 512, text_dim] tensors in place of the prompts; clip_features: [1, 257, 1280].
    teacache_coefficients: of the polynomial, highest power first.

    Raises RequestError, a ValueError of one line, for anything that is wrong whatever the model.
    """

    prompt: str | None = None
    negative_prompt: str | None = None
    prompts: Prompts | None = None
    resolution: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    image: str | Path | Image | None = None
    end_image: str | Path | Image | None = None
    video: str | Path | np.ndarray | Tensor | None = None
    ar_step: int | None = None
    causal_attention: bool | None = None
    causal_block_size: int | None = None
    base_num_frames: int | None = None
    overlap_history: int | None = None
    addnoise_condition: int | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    inference_steps: int | None = None
    fps: float | None = None
    seed: int | None = None
    teacache: bool | None = None
    teacache_thresh: float | None = None
    use_ret_steps: bool | None = None
    teacache_coefficients: tuple[float, ...] | None = None
    context: Tensor | None = None
    negative_context: Tensor | None = None
    clip_features: Tensor | None = None
    # (height, width, fps or None) of the video, else of the image, as found while checking them.
    source: tuple[int, int, float | None] | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        names = [item.name for item in dataclasses.fields(self) if item.init]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        for name, value in given.items():
            object.__setattr__(self, name, checked_prompts(value) if name == "prompts" else checked(name, value))
        _check_together(self, given)
        source = None
        for name in [name for name in ("end_image", "image") if name in given]:
            source = probe_image(name, given[name])
        if self.video is not None:
            source = probe_video("video", self.video, self.overlap_history)
        object.__setattr__(self, "source", source)

    @property
    def asks_diffusion_forcing(self) -> bool:
        """Whether it holds what a text-to-video model has no use for: a first image, or a field about windows."""
        return self.image is not None or any(getattr(self, name) is not None for name in _DF_ONLY)


@dataclass(frozen=True, eq=False)
class Settings:
    """A request on one model: every field filled, None only for inputs that were not given."""

    mode: str  # "df", "t2v" or "i2v"
    prompt: str
    negative_prompt: str
    prompts: Prompts | None  # in place of the prompt, which is then the first of them
    height: int
    width: int
    num_frames: int
    base_num_frames: int
    overlap_history: int | None
    guidance_scale: float
    shift: float
    inference_steps: int
    fps: float
    seed: int
    ar_step: int
    causal_attention: bool
    causal_block_size: int
    addnoise_condition: int
    teacache: bool
    teacache_thresh: float
    use_ret_steps: bool
    teacache_coefficients: tuple[float, ...] | None  # None: the published ones
    image: str | Path | Image | None
    end_image: str | Path | Image | None
    video: str | Path | np.ndarray | Tensor | None
    context: Tensor | None
    negative_context: Tensor | None
    clip_features: Tensor | None
    notes: tuple[str, ...]  # what the user may want to know, one line each


def resolve(request: Request, *, mode: str, defaults: dict[str, Any], resolution_hint: str | None) -> Settings:
    """Fill in what a request leaves open: from the model's `defaults`, else as the reference's commands do.

    mode: "df", "t2v" or "i2v". defaults: the model's generation_config. resolution_hint: its "540P" or "720P".
    fps is the request's, else the source video's, else the default. Without a seed one is drawn.

    Raises RequestError where the request and the model do not fit together.
    """
    _check_mode(request, mode)
    height, width = _size(request, defaults, resolution_hint)
    source_fps = request.source[2] if request.source else None
    negative_prompt = NEGATIVE_PROMPT_DF if mode == "df" else NEGATIVE_PROMPT
    fallbacks = {
        "prompt": DEFAULT_PROMPT,
        "negative_prompt": negative_prompt,
        "num_frames": 97,
        "base_num_frames": 97,
        "guidance_scale": 6.0,
        "shift": 8.0,
        "inference_steps": 30,
        "fps": 24.0,
        "teacache_coefficients": None,
    }
    if source_fps is not None:
        defaults = defaults | {"fps": source_fps}
    values = {name: _pick(request, name, defaults, fallback) for name, fallback in fallbacks.items()}
    if mode != "df":
        values["base_num_frames"] = values["num_frames"]
    if request.prompts is not None:
        first = request.prompts[0]
        values["prompt"] = first if isinstance(first, str) else first[1]
    for context, prompt in (("context", "prompt"), ("negative_context", "negative_prompt")):
        if getattr(request, context) is not None:
            values[prompt] = getattr(request, prompt) or ""
    return Settings(
        mode=mode,
        height=height,
        width=width,
        seed=random.randrange(4294967294) if request.seed is None else request.seed,
        ar_step=request.ar_step or 0,
        causal_attention=bool(request.causal_attention),
        causal_block_size=request.causal_block_size or 1,
        addnoise_condition=request.addnoise_condition or 0,
        teacache=bool(request.teacache),
        teacache_thresh=0.2 if request.teacache_thresh is None else request.teacache_thresh,
        use_ret_steps=bool(request.use_ret_steps),
        overlap_history=request.overlap_history,
        prompts=request.prompts,
        image=request.image,
        end_image=request.end_image,
        video=request.video,
        context=request.context,
        negative_context=request.negative_context,
        clip_features=request.clip_features,
        notes=tuple(_notes(request, mode, values)),
        **values,
    )


def _pick(request: Request, name: str, defaults: dict[str, Any], fallback: Any) -> Any:
    value = getattr(request, name)
    if value is None and defaults.get(name) is not None:
        value = checked(name, defaults[name], where="generation_config.json ")
    return fallback if value is None else value


def _size(request: Request, defaults: dict[str, Any], hint: str | None) -> tuple[int, int]:
    if request.height is not None:
        return request.height, request.width
    height, width = RESOLUTIONS[request.resolution or hint or "540P"]
    if request.resolution is None and None not in (defaults.get("height"), defaults.get("width")):
        height, width = (_pick(request, name, defaults, None) for name in ("height", "width"))
    portrait = request.source is not None and request.source[0] > request.source[1]
    return (max(height, width), min(height, width)) if portrait else (height, width)


def _notes(request: Request, mode: str, values: dict[str, Any]) -> list[str]:
    notes = []
    if (request.addnoise_condition or 0) > 60:
        notes.append(f"addnoise_condition={request.addnoise_condition}: above 60 given frames drift; 20 is usual")
    for name in ("num_frames", "base_num_frames") if mode == "df" else ("num_frames",):
        frames, whole = values[name], pixel_frames(latent_frames(values[name]))
        if frames != whole:
            notes.append(f"{name}={frames}: counts as {whole}, since the model makes 4k + 1 frames")
    if request.resolution is not None and request.height is not None:
        notes.append(f"resolution={request.resolution!r}: has no effect beside a height and a width")
    if mode == "df" and values["num_frames"] <= values["base_num_frames"] and request.video is None:
        if request.overlap_history is not None:
            notes.append(f"overlap_history={request.overlap_history}: has no effect on a video of one window")
        if request.addnoise_condition and request.image is None:
            notes.append(f"addnoise_condition={request.addnoise_condition}: has no effect where no frames are given")
    idle = [name for name, off in _TEACACHE_ONLY.items() if getattr(request, name) not in (None, off)]
    if idle and not request.teacache:
        notes.append(f"{listed(idle)} {'has' if len(idle) == 1 else 'have'} no effect without teacache")
    return notes


def _check_mode(request: Request, mode: str) -> None:
    if mode == "i2v" and request.image is None:
        raise RequestError("image", None, "this model makes a video from an image, so it needs one")
    if mode == "t2v" and request.image is not None:
        fix = "this model takes no image: use generate_video_df.py with a diffusion forcing model, or an I2V model"
        raise RequestError("image", request.image, fix)
    if mode != "i2v" and request.clip_features is not None:
        raise RequestError("clip_features", request.clip_features, "only an I2V model takes them: leave them out")
    for name, off in _DF_ONLY.items():
        value = getattr(request, name)
        if mode != "df" and value is not None and (off is None or value != off):
            fix = "only diffusion forcing does this: use generate_video_df.py with a diffusion forcing model"
            raise RequestError(name, value, fix)


def _check_together(request: Request, given: dict[str, Any]) -> None:
    for name, other in _NEEDS.items():
        if name in given and other.split()[0] not in given:
            raise RequestError(name, given[name], f"needs {other} as well")
    if "image" in given and "video" in given:
        raise RequestError("image", given["image"], "a video to extend gives the first frames already: leave one out")
    for name in ("prompt", "context"):
        if "prompts" in given and name in given:
            fix = f"stands in place of one for all windows: leave it out, or do not give {name}"
            raise RequestError("prompts", None, fix)
    if request.causal_attention and "end_image" in given:
        fix = "has no effect with causal_attention, whose blocks never see a later frame: leave one out"
        raise RequestError("end_image", given["end_image"], fix)
    widths = {given[name].shape[1] for name in ("context", "negative_context") if name in given}
    if len(widths) > 1:
        raise RequestError("negative_context", given["negative_context"], "must be as wide as context")
