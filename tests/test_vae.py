"""The VAE against the reference's numbers, in chunks and in one piece."""

from __future__ import annotations

import copy
import importlib
import json
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, golden_directory, load_golden, rel_l2
from torch.utils._python_dispatch import TorchDispatchMode

import skyreels_fast as sf
from benchmarks.fidelity import psnr_db
from skyreels_fast.vae import VAE, tiles
from skyreels_fast.vae.chain import stages_of
from training.data import draw_scenes, render, trajectory


@pytest.fixture(scope="module")
def vae() -> VAE:
    weights = torch.load(GOLDEN / "Wan2.1_VAE.pth", weights_only=True)
    vae = VAE(VAE.base_dim_of(weights))
    vae.load_state_dict(weights)
    return vae.float().eval().requires_grad_(False)


def test_decode_and_encode_match_the_reference(vae: VAE) -> None:
    golden = load_golden("components")
    assert rel_l2(vae.decode(golden["vae.z"][None])[0], golden["vae.decoded"]) < 1e-5
    assert rel_l2(vae.encode(golden["vae.video"][None])[0], golden["vae.encoded"]) < 1e-5


def test_chunks_give_what_the_whole_video_gives(vae: VAE) -> None:
    torch.manual_seed(0)
    video = torch.rand(2, 3, 13, 32, 48) * 2 - 1
    mean, _ = vae.encode_moments(video)
    normalised = (mean - _channels(vae.latents_mean)) / _channels(vae.latents_std)
    assert rel_l2(vae.encode(video), normalised) < 1e-5
    assert rel_l2(vae.encode_stream(video.split([2, 6, 5], dim=2)), vae.encode(video)) < 1e-6

    whole = vae.decode_raw(mean).clamp(-1, 1)
    parts = list(vae.decode_stream(normalised))
    assert [part.shape[2] for part in parts] == [1, 4, 4, 4]
    assert rel_l2(torch.cat(parts, dim=2), whole) < 1e-5


def _channels(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values).view(1, -1, 1, 1, 1)


def test_frames_past_the_last_group_of_four_are_left_out(vae: VAE) -> None:
    video = torch.rand(1, 3, 8, 16, 16) * 2 - 1
    assert torch.equal(vae.encode(video), vae.encode(video[:, :, :5]))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_layers_tell_the_shapes_of_what_they_give(vae: VAE, count: int) -> None:
    for layers, shape in ((vae.encoder.stages, (count, 2, 16, 8, 3)), (vae.decoder.stages, (count, 2, 2, 1, 16))):
        frames = list(torch.zeros(shape))
        for stage in stages_of(layers, shape):
            frames = list(stage.layer.flow(iter(frames)))
            assert stage.out_shape == (len(frames), *frames[0].shape)
            assert stage.cost > 0


def test_later_frames_do_not_change_earlier_ones(vae: VAE) -> None:
    torch.manual_seed(1)
    latents = torch.randn(1, 16, 4, 4, 6)
    changed = latents.clone()
    changed[:, :, 3] += 1
    before, after = vae.decode(latents), vae.decode(changed)
    assert torch.equal(before[:, :, :9], after[:, :, :9])
    assert not torch.equal(before[:, :, 9:], after[:, :, 9:])


def test_a_size_that_is_no_multiple_of_8_is_refused(vae: VAE) -> None:
    with pytest.raises(ValueError, match=r"divisible by 8.*\(20, 16\)"):
        vae.encode(torch.zeros(1, 3, 1, 20, 16))


@pytest.fixture(scope="module")
def bundled() -> VAE:
    """The bundled model's VAE, which is trained, in float32."""
    directory = Path(sf.__file__).parent / "assets" / "tiny"
    weights = torch.load(directory / "Wan2.1_VAE.pth", weights_only=True)
    vae = VAE(VAE.base_dim_of(weights), **json.loads((directory / "vae_config.json").read_text()))
    vae.load_state_dict(weights)
    return vae.float().eval().requires_grad_(False)


def rendered() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scenes = draw_scenes(2, generator)
    return render(scenes, trajectory(scenes, 5))[0]


def like_photographs() -> torch.Tensor:
    """Noise whose amplitude falls as 1/f in space and time, as that of natural pictures does."""
    frames, height, width = 5, 64, 96
    noise = torch.randn(3, frames, height, width, generator=torch.Generator().manual_seed(1))
    axes = [torch.fft.fftfreq(size) for size in (frames, height, width)]
    frequency = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0).sqrt().clamp(min=1 / width)
    video = torch.fft.ifftn(torch.fft.fftn(noise, dim=(1, 2, 3)) / frequency, dim=(1, 2, 3)).real
    return (0.4 * video / video.std()).clamp(-1, 1)[None]


@pytest.mark.parametrize("video", [rendered(), like_photographs()], ids=["rendered", "like photographs"])
def test_bfloat16_is_within_45_db_of_float32(bundled: VAE, video: torch.Tensor) -> None:
    low = copy.deepcopy(bundled).bfloat16().lay_out()
    latents = bundled.encode(video)
    assert rel_l2(low.encode(video), latents) < 1e-2
    expected = bundled.decode(latents)
    assert psnr_db(low.decode(latents), expected) > 50
    assert psnr_db(low.decode(low.encode(video)), expected) > 45


def test_the_layout_of_the_weights_changes_no_number(vae: VAE) -> None:
    laid_out = copy.deepcopy(vae).lay_out()
    assert laid_out.decoder.conv1.weight.is_contiguous(memory_format=torch.channels_last_3d)
    latents = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(2))
    assert rel_l2(laid_out.decode(latents), vae.decode(latents)) < 1e-6


def test_gradients_are_those_of_the_whole_video(vae: VAE) -> None:
    """Frame by frame or in one piece: the same function, so the same derivatives."""
    generator = torch.Generator().manual_seed(3)
    video = torch.rand(1, 3, 9, 16, 24, generator=generator) * 2 - 1
    direction = torch.randn(1, 16, 3, 2, 3, generator=generator)
    gradients = []
    for encode in (vae.encode, lambda video: vae.encode_moments(video)[0] / _channels(vae.latents_std)):
        pixels = video.clone().requires_grad_()
        (encode(pixels) * direction).sum().backward()
        gradients.append(pixels.grad)
    assert rel_l2(*gradients) < 1e-5


class _LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that are alive at once, of those that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self._users, self.now, self.peak = Counter(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._count(storage.data_ptr(), storage.nbytes(), 1)
                weakref.finalize(tensor, self._count, storage.data_ptr(), storage.nbytes(), -1)
        return out

    def _count(self, place: int, size: int, change: int) -> None:
        before = self._users[place]
        self._users[place] += change
        if not before or not self._users[place]:
            self.now += size if change > 0 else -size
        self.peak = max(self.peak, self.now)


def test_the_estimate_of_memory_holds_and_does_not_grow(vae: VAE) -> None:
    """What decoding really holds, frame after frame, is what the estimate says, and not far below it."""
    latents = torch.randn(1, 16, 5, 16, 24, generator=torch.Generator().manual_seed(4))
    peaks = []
    for frames in (3, 5):
        with torch.no_grad(), _LiveBytes() as live:
            for _ in vae.decode_stream(latents[:, :, :frames]):
                pass
        peaks.append(live.peak)
    assert peaks[1] < 1.01 * peaks[0]
    estimate = tiles.decode_bytes(vae, latents.shape)
    assert 0.5 * estimate < peaks[1] < estimate


def test_tiles_are_whole_frames_where_they_fit(vae: VAE) -> None:
    latents = torch.randn(1, 16, 2, 24, 20, generator=torch.Generator().manual_seed(5))
    enough = tiles.decode_bytes(vae, latents.shape)
    whole = vae.decode(latents)
    assert torch.equal(torch.cat(list(vae.decode_stream(latents, budget_bytes=enough)), dim=2), whole)


def test_tiles_blend_without_a_seam(bundled: VAE) -> None:
    """The video is as good as that of whole frames, and no row or column stands out."""
    generator = torch.Generator().manual_seed(6)
    canvas = (320, 192)
    scenes = draw_scenes(1, generator, canvas=canvas)
    video = render(scenes, trajectory(scenes, 5, canvas=canvas), canvas)[0]
    latents = bundled.encode(video)
    whole = bundled.decode(latents)
    budget = tiles.decode_bytes(bundled, (1, 16, 2, 24, 24))
    parts = list(bundled.decode_stream(latents, budget_bytes=budget))
    assert [part.shape[2] for part in parts] == [1, 4]
    tiled = torch.cat(parts, dim=2)
    assert not torch.equal(tiled, whole)
    assert psnr_db(tiled, whole) > 60
    assert psnr_db(tiled, video) > psnr_db(whole, video) - 0.1
    # A seam would show as a jump between neighbours that whole frames do not have: it stays below half a pixel level.
    for axis in (3, 4):
        others = [d for d in range(5) if d != axis]
        assert (tiled - whole).diff(dim=axis).square().mean(dim=others).sqrt().amax() < 0.5 / 127.5


def test_the_fades_of_tiles_cover_each_pixel() -> None:
    for size in (16, 17, 40, 68):
        for count in range(1, tiles._most_tiles(size) + 1):
            spans = tiles._spans(size, count)
            assert spans[0][0] == 0 and spans[-1][1] == size
            assert all(
                stop - start >= tiles.OVERLAP for (start, _), (_, stop) in zip(spans[1:], spans[:-1], strict=True)
            )
            weights = torch.zeros(8 * size)
            for start, stop in spans:
                weights[8 * start : 8 * stop] += tiles._fade(start, stop, size)
            assert weights.amin() > 0.5


def test_equal_frames_have_equal_latents_however_they_lie(vae: VAE) -> None:
    """As they come from the decoder, joined as a run keeps them, and one by one: the same bits."""
    decoded = list(vae.decode_stream(torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))))
    whole = torch.cat(decoded, dim=2).contiguous()
    assert decoded[0].stride() != decoded[0].contiguous().stride()
    expected = vae.encode_stream(decoded)
    for chunks in ([whole], whole.split(1, dim=2), [chunk.contiguous() for chunk in decoded]):
        assert torch.equal(vae.encode_stream(chunks), expected)


def test_a_budget_below_the_smallest_tile_is_refused(vae: VAE) -> None:
    latents = torch.zeros(1, 16, 1, 40, 24)
    least = tiles.decode_bytes(vae, (1, 16, 1, 16, 16))
    assert next(vae.decode_stream(latents, budget_bytes=least)).shape == (1, 3, 1, 320, 192)
    with pytest.raises(ValueError, match=rf"budget_bytes={least - 1}: decoding needs at least {least} "):
        next(vae.decode_stream(latents, budget_bytes=least - 1))


def test_cudnn_is_left_as_it_was(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    chunks = vae.decode_stream(torch.zeros(1, 16, 2, 2, 2))
    next(chunks)
    assert torch.backends.cudnn.benchmark is True


@pytest.mark.parametrize("allowed", [True, False])
def test_whether_float32_may_be_tf32_is_the_callers_choice(
    vae: VAE, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    layers = importlib.import_module("skyreels_fast.vae.layers")
    convolution = layers.causal_conv3d

    def spied(*args: object) -> torch.Tensor:
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic))
        return convolution(*args)

    monkeypatch.setattr(layers, "causal_conv3d", spied)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    vae.encode(vae.decode(torch.zeros(1, 16, 1, 2, 2)))
    assert set(seen) == {(allowed, True)}


@pytest.mark.gpu
def test_a_gpu_in_float32_gives_what_the_cpu_gives(bundled: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    video = rendered()
    latents = bundled.encode(video)
    gpu = copy.deepcopy(bundled).cuda().lay_out()
    assert rel_l2(gpu.encode(video).cpu(), latents) < 1e-5
    assert rel_l2(gpu.decode(latents).cpu(), bundled.decode(latents)) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "conv2d", "conv3d"])
def test_a_gpu_in_bfloat16_gives_what_the_cpu_gives_in_float32(
    bundled: VAE, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(importlib.import_module("skyreels_fast.ops.causal_conv3d").DEFAULT, "cuda", backend)
    video = rendered()
    latents = bundled.encode(video)
    low = copy.deepcopy(bundled).bfloat16()  # about 1e-2 off: a frame's latents are small beside what they come from
    gpu = copy.deepcopy(low).cuda().lay_out()
    assert rel_l2(gpu.encode(video).cpu(), latents) < 2 * rel_l2(low.encode(video), latents)
    assert psnr_db(gpu.decode(latents).cpu(), bundled.decode(latents)) > 45


def test_a_pipeline_runs_its_vae_in_the_dtype_asked_for(tmp_path: Path) -> None:
    directory = golden_directory("df", tmp_path)
    text = load_golden("text")
    request = sf.Request(
        context=text["cond"], height=32, width=48, num_frames=9, base_num_frames=9, inference_steps=2,
        guidance_scale=1.0, seed=0,
    )  # fmt: skip
    options = {"device": "cpu", "dtype": torch.float32, "mode": "df"}
    wide, low = (sf.Pipeline.from_pretrained(directory, **options, vae_dtype=dtype) for dtype in (None, torch.bfloat16))
    assert (wide.vae_dtype, low.vae_dtype) == (torch.float32, torch.bfloat16)
    expected, actual = wide(request), low(request)
    assert all(parameter.dtype == torch.bfloat16 for parameter in low._load()[1].parameters())
    assert torch.equal(actual.latents[0], expected.latents[0])
    assert psnr_db(actual.frames / 127.5 - 1, expected.frames / 127.5 - 1) > 45
