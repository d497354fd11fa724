"""How many windows a video takes, and which latent frames each holds: integers only.

A window is what one run of the denoising loop sees. A long video is a chain of windows; every window after the first
starts with the latents of the last `overlap_history` pixel frames that came before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from skyreels_fast._words import counted, listed
from skyreels_fast.config import MODES, VAE_STRIDE

_STRIDE = VAE_STRIDE[0]


@dataclass(frozen=True)
class Window:
    """One window of a video, in latent frames unless said otherwise."""

    latents: int  # given and generated frames together, without the end image's
    prefix: int  # how many of the first frames are given
    drop: int  # pixel frames at the start of its decode that are already in the video
    frames: int  # pixel frames it adds to the video
    end: bool  # an end image stands after its last frame


def latent_frames(num_frames: int) -> int:
    """Latent frames that `num_frames` pixel frames make: one for the first frame, then one for each whole four."""
    return (num_frames - 1) // _STRIDE + 1


def pixel_frames(latents: int) -> int:
    """Pixel frames that `latents` latent frames decode to."""
    return (latents - 1) * _STRIDE + 1


def plan_windows(
    num_frames: int,
    base_num_frames: int = 97,
    overlap_history: int | None = None,
    *,
    image: bool = False,
    end_image: bool = False,
    extend: bool = False,
    causal_block_size: int = 1,
    mode: str = "df",
    sliding: bool = False,
) -> tuple[Window, ...]:
    """Plan the windows of a video; their `frames` add up to the frames that come out.

    num_frames, base_num_frames, overlap_history: pixel frames of the video, of one window, and shared by neighbours.
        `num_frames` counts down to the nearest 4k+1, as the VAE makes no other length.
    image: the first latent frame is given. end_image: the last window ends in a given frame.
    extend: the first window, too, starts with `overlap_history` given frames; `num_frames` counts them, `frames` not.
    causal_block_size: latent frames denoised together; every window is a whole number of such blocks.
    mode: "df" (diffusion forcing), or "t2v" / "i2v": always one window, with nothing given.
    sliding: a video longer than one window without `overlap_history` is one window through which the schedule slides.

    Raises ValueError, naming the nearest valid value, for a plan that would lose or repeat frames.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not one of {', '.join(map(repr, MODES))}")
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames} is less than one frame; give at least 1")
    total = latent_frames(num_frames)
    if mode != "df":
        if extend or end_image:
            raise ValueError(f"mode={mode!r} takes no end image and no video to extend; use a diffusion forcing model")
        return (Window(total, prefix=0, drop=0, frames=pixel_frames(total), end=False),)

    _check_values(base_num_frames, overlap_history, causal_block_size, image=image, extend=extend)
    base = latent_frames(base_num_frames)
    overlap = 0 if overlap_history is None else latent_frames(overlap_history)
    first_prefix = overlap if extend else int(image)
    if total <= first_prefix:
        given = "the image" if image else f"overlap_history={overlap_history}"
        raise ValueError(
            f"num_frames={num_frames} leaves no frame to generate beside {given}; "
            f"give at least {pixel_frames(first_prefix + 1)}"
        )
    if total > base and not overlap and not sliding:
        raise ValueError(
            f"num_frames={num_frames} is more than base_num_frames={base_num_frames}: give overlap_history "
            f"(17 or 37 are usual), or at most {counted(pixel_frames(base), 'frame')}"
        )
    lengths = _lengths(total, base, overlap)
    _check_blocks(num_frames, base_num_frames, causal_block_size, overlap, lengths, first_prefix, sliding)

    windows = []
    for k, latents in enumerate(lengths):
        prefix = overlap if k else first_prefix
        drop = pixel_frames(overlap) if k or extend else 0
        windows.append(
            Window(latents, prefix, drop, pixel_frames(latents) - drop, end=end_image and k == len(lengths) - 1)
        )
    return tuple(windows)


def _check_values(
    base_num_frames: int, overlap_history: int | None, causal_block_size: int, *, image: bool, extend: bool
) -> None:
    if base_num_frames < 1:
        raise ValueError(f"base_num_frames={base_num_frames} is less than one frame; give at least 1")
    if causal_block_size < 1:
        raise ValueError(f"causal_block_size={causal_block_size} is less than one latent frame; give at least 1")
    if extend and image:
        raise ValueError("an image and a video to extend both give the first frames; leave one out")
    if overlap_history is None:
        if extend:
            raise ValueError("extending a video needs overlap_history (17 or 37 are usual)")
        return
    if overlap_history < 1 or overlap_history % _STRIDE != 1:
        below = pixel_frames(max(latent_frames(overlap_history), 1))
        nearest = [1] if overlap_history < 1 else [below, below + _STRIDE]
        raise ValueError(
            f"overlap_history={overlap_history} is not one more than a multiple of {_STRIDE}; "
            f"nearest valid overlap_history: {listed(nearest, 'or')}"
        )
    if latent_frames(overlap_history) >= latent_frames(base_num_frames):
        raise ValueError(
            f"overlap_history={overlap_history} fills the window of base_num_frames={base_num_frames}; "
            f"give base_num_frames of at least {overlap_history + _STRIDE}"
        )


def _lengths(total: int, base: int, overlap: int) -> list[int]:
    """Latents of each window; without overlap all of them are one window's."""
    if not overlap:
        return [total]
    lengths = [min(total, base)]
    left = total - lengths[0]
    while left > 0:
        lengths.append(min(left + overlap, base))
        left -= lengths[-1] - overlap
    return lengths


def _check_blocks(
    num_frames: int, base_num_frames: int, block: int, overlap: int, lengths: list[int], prefix: int, sliding: bool
) -> None:
    base, total = latent_frames(base_num_frames), latent_frames(num_frames)
    if total > base and base % block:
        below = base // block * block
        nearest = [pixel_frames(n) for n in (below, below + block) if n > overlap]
        raise ValueError(
            f"base_num_frames={base_num_frames} gives windows of {base} latent frames, not a multiple of "
            f"causal_block_size={block}; nearest valid base_num_frames: {listed(nearest, 'or')}"
        )
    wrong = [n for n in lengths if n % block]
    if not wrong:
        return

    def fits(candidate: int) -> bool:
        if candidate > base and (base % block or not (overlap or sliding)):
            return False
        return candidate > prefix and not any(n % block for n in _lengths(candidate, base, overlap))

    # Lengths repeat with a period below base + block, so the nearest on either side is within that reach.
    reach = base + block
    below = next((n for n in range(total - 1, max(total - reach, 0), -1) if fits(n)), None)
    above = next((n for n in range(total + 1, total + reach + 1) if fits(n)), None)
    nearest = [str(pixel_frames(n)) for n in (below, above) if n is not None]
    if above is None:  # the next whole block is past the base
        longer = pixel_frames(-(-total // block) * block)
        nearest.append(f"{longer} (with base_num_frames={longer})")
    raise ValueError(
        f"num_frames={num_frames} gives a window of {counted(wrong[0], 'latent frame')}, not a multiple of "
        f"causal_block_size={block}; nearest valid num_frames: {listed(nearest, 'or')}"
    )
