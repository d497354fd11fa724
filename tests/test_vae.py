"""The VAE against the reference's numbers, in chunks and in one piece."""

from __future__ import annotations

import pytest
import torch
from conftest import GOLDEN, load_golden, rel_l2

from skyreels_fast.vae import VAE


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
