"""The bundled model's training: what its parts promise, and all of it at toy sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import rel_l2

from benchmarks import adherence
from skyreels_fast.checkpoint import Checkpoint
from skyreels_fast.dit import DiT
from skyreels_fast.encoders.text import TextEncoder
from training import package, train_df, train_vae
from training.data import sample_batch
from training.latents import Clips, scene_index
from training.muon import orthogonalise
from training.noising import make_example, noise_levels
from training.optim import Master
from training.prompts import (
    ALL_SCENES,
    HELDOUT_SCENES,
)
from training.text import encode_text, prompt_ids, unconditional_ids
from training.whiten import Moments, rewrite


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def toy_clips(n: int, frames: int = 6) -> Clips:
    return Clips(torch.randn(n, 16, frames, 2, 4), torch.randn(n, 16, 1, 2, 4), torch.arange(n))


@pytest.mark.parametrize("end", [False, True])
def test_examples_hold_what_is_given(end: bool, generator: torch.Generator) -> None:
    example = make_example(toy_clips(5), toy_clips(5), 200, 6, end, generator)
    level = example.timestep[:, None, :, None, None] / 1000
    clean = example.noised - level * example.velocity
    held = (example.timestep == 0)[:, None, :, None, None]
    assert torch.equal(held, example.learnt == 0)
    torch.testing.assert_close(torch.where(held, example.noised - clean, 0), torch.zeros_like(clean))
    assert example.noised.shape[2] == 6 + end
    if end:
        assert (example.timestep[:, -1] == 0).all()
    prefixes = (example.timestep == 0).long().cumprod(1).sum(1)
    assert 0.1 < (prefixes > 0).float().mean() < (1 if end else 0.6)
    assert (example.timestep[:, :6] > 0).any(1).float().mean() > 0.9


def test_noise_levels_cover_the_samplers(generator: torch.Generator) -> None:
    levels = noise_levels(2000, 8, generator)
    assert levels.min() >= 0 and 0.99 < levels.max() < 1
    equal = (levels == levels[:, :1]).all(1).float().mean()
    assert 0.3 < equal < 0.5
    rising = (levels.diff(dim=1) >= 0).all(1) & (levels[:, 0] < levels[:, -1])
    assert rising.float().mean() > 0.1


def test_unconditional_ids_end_like_prompts(generator: torch.Generator) -> None:
    ids = unconditional_ids(300, generator)
    assert ((ids == 1).sum(1) == 1).all()
    after = (ids == 1).long().cumsum(1).sub((ids == 1).long()) > 0
    assert (ids[after] == 0).all()
    assert 0.35 < (ids[:, 0] == 1).float().mean() < 0.65
    assert scene_index(torch.tensor([[7, 3, 4, 3], [0, 0, 0, 0]])).tolist() == [639, 0]


def test_orthogonalise_evens_singular_values(generator: torch.Generator) -> None:
    for shape in ((3, 8, 32), (2, 48, 16)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=generator)))
        assert values.min() > 0.5 and values.max() < 1.3


def test_whitening_changes_the_latents_and_not_the_video(generator: torch.Generator) -> None:
    torch.manual_seed(0)
    vae = train_vae.build(8).double()
    with torch.no_grad():
        vae.conv1.weight[:16] *= torch.logspace(-1, 1, 16)[:, None, None, None, None]
        vae.conv1.bias[16:] -= 4
    video = sample_batch(8, generator, frames=5, canvas=(32, 32))[0].double()
    moments = Moments("cpu")
    with torch.no_grad():
        mean, log_variance = vae.encode_moments(video)
        before = vae.decode_raw(mean)
        moments.add(mean, log_variance)
        matrix, centre = moments.whitening()
        rewrite(vae, matrix, centre)
        whitened, _ = vae.encode_moments(video)
        assert rel_l2(vae.decode_raw(whitened), before) < 1e-6
    rows = whitened.transpose(0, 1).flatten(1)
    noise = matrix @ torch.diag(log_variance.exp().mean((0, 2, 3, 4))) @ matrix.T
    torch.testing.assert_close(torch.cov(rows, correction=0) + noise, torch.eye(16).double(), atol=1e-6, rtol=0)
    assert rows.mean(1).abs().max() < 1e-6


def test_master_learns_swaps_and_resumes(tmp_path: Path, generator: torch.Generator) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    master = Master({"net": net}, ema=0.9)
    x, y = torch.randn(64, 8, generator=generator), torch.randn(64, 4, generator=generator)
    losses = []
    for _ in range(60):
        loss = (net(x) - y).square().mean()
        loss.backward()
        losses.append(loss.item())
        master.step(2e-2, 1e-2)
    assert losses[-1] < 0.8 * losses[0]
    before = net[0].weight.clone()
    master.swap()
    assert not torch.equal(net[0].weight, before)
    master.swap()
    assert torch.equal(net[0].weight, before)
    master.save(tmp_path, {"elapsed_s": 3.5})
    other = Master({"net": torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))})
    assert other.load(tmp_path) == {"elapsed_s": 3.5, "steps": 60}
    assert rel_l2(other.params[0].detach(), before.detach()) < 4e-3  # rounded to bfloat16
    assert (other.steps, len(list(tmp_path.glob("state-*.pt")))) == (60, 1)
    with pytest.raises(ValueError, match="sizes"):
        Master({"net": torch.nn.Linear(8, 4)}).load(tmp_path)


TOY = {"height": 32, "width": 32, "device": "cpu"}
VAE_ARGS = {**TOY, "base_dim": 8, "batch": 1, "frames": 5, "long_frames": 5, "crop": 16, "statistics": 2}
DF_ARGS = {
    **TOY,
    "dim": 64,
    "layers": 1,
    "clips": 6,
    "encode_batch": 2,
    "frames": 9,
    "batch": 2,
    "prompts": 3,
    "inference_steps": 2,
    "long_frames": 13,
    "overlap": 5,
    "guidance_scale": 2,
    "log_every": 1,
}


def flags(**values: object) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages run for two steps, stopped, resumed and packaged."""
    root = tmp_path_factory.mktemp("trained")
    vae, df = root / "vae", root / "df"
    for more in ({"steps": 2}, {"steps": 3, "resume": vae}):
        train_vae.train(train_vae.parse_args(flags(out=vae, **VAE_ARGS, **more)))
    for more in ({"steps": 2}, {"steps": 3, "resume": df, "save_seconds": 0}):
        train_df.train(train_df.parse_args(flags(vae=vae, out=df, **DF_ARGS, **more)))
    (root / "results").mkdir()
    shares = {"colour": {"all": 1.0, "heldout": 0.5, "asked": 0.95}}
    (root / "results" / "sync.json").write_text(json.dumps({"shares": shares}))
    sizes = {"height": 32, "width": 32, "frames": 9, "inference_steps": 2}
    package.main(flags(vae=vae, df=df, out=root / "tiny", results=root / "results", **sizes))
    return root


def test_training_resumes_and_logs(trained: Path) -> None:
    for stage, steps in (("vae", 3), ("df", 3)):
        assert json.loads((trained / stage / "state.json").read_text())["steps"] == steps
    rows = [json.loads(line) for line in (trained / "df" / "train.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "step" in row] == [0, 1, 2]
    assert {"sync", "async", "image", "long", "long async"} <= {row.get("event") for row in rows}
    statistics = json.loads((trained / "vae" / "vae_config.json").read_text())
    assert len(statistics["latents_mean"]) == 16 and min(statistics["latents_std"]) > 0


def test_package_gives_back_the_trained_model(trained: Path, generator: torch.Generator) -> None:
    args = train_df.parse_args(flags(vae="unused", out="unused", **DF_ARGS))
    model = train_df.Model(args)
    master = Master({"dit": model.dit, "text": model.text}, outer=args.outer)
    master.load(trained / "df")
    master.swap()
    checkpoint = Checkpoint.open(trained / "tiny")
    checkpoint.require("vae", "text_encoder")
    with torch.device("meta"):
        dit = DiT(checkpoint.config)
    checkpoint.load_transformer(dit, "cpu", torch.float32)
    prompt = ALL_SCENES[5].prompt
    latents, timestep = torch.randn(1, 16, 3, 4, 4, generator=generator), torch.tensor([[0, 500, 999]])
    with torch.no_grad():
        text = encode_text(model.text, prompt_ids([prompt]))
        context = TextEncoder.load(checkpoint, torch.float32).encode([prompt])[0]
        assert rel_l2(context, text[0, : len(context)]) < 1e-5
        expected = model.dit(latents, timestep, model.dit.encode_context(text))
        assert rel_l2(dit(latents, timestep, dit.encode_context(context[None])), expected) < 1e-5
    assert checkpoint.mode_hint() == "df"
    assert checkpoint.vae_statistics() == ((0.0,) * 16, (1.0,) * 16)


def test_model_card_lists_what_was_held_out(trained: Path) -> None:
    card = (trained / "tiny" / "README.md").read_text()
    assert all(scene.prompt in card for scene in HELDOUT_SCENES)
    assert "| sync | 100% (50%) |" in card


def test_benchmark_runs_through_the_pipeline(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--model_id", str(trained / "tiny"), "--n", "2", "--device", "cpu", "--out", str(tmp_path / "out.json")]
    assert adherence.main(options) == 1  # two steps teach it nothing
    assert adherence.main([*options, "--image-test"]) == 1
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 2
    assert "asked for" in capsys.readouterr().out
