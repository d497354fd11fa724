"""Our ops under diffusers' transformers against diffusers itself, and under what its users put on top."""

from __future__ import annotations

import copy
import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import rel_l2
from diffusers_models import CASES, FRAMES, PER_FRAME, cast, inputs, lower, sample, sky, token_timesteps, wan
from kernels import assert_within_twice
from torch import Tensor, nn

from skyreels_fast.integrations import _diffusers_block
from skyreels_fast.integrations.diffusers import accelerate, restore

pytest.importorskip("diffusers")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The backend that each call of our attention asks for: empty while diffusers computes."""
    backends, attend = [], _diffusers_block.attention

    def spy(*tensors: Tensor, backend: str | None, **options) -> Tensor:
        backends.append(backend)
        return attend(*tensors, backend=backend, **options)

    monkeypatch.setattr(_diffusers_block, "attention", spy)
    return backends


@pytest.mark.parametrize("case", CASES)
def test_float32_is_theirs_and_restored_to_the_bit(case: str, asked: list) -> None:
    model, given = CASES[case]()
    expected, state = sample(model, given), model.state_dict()
    assert accelerate(model) is model and not asked
    out = sample(model, given)
    assert rel_l2(out, expected) <= 1e-5
    assert len(asked) == len(model.blocks) * (3 if "i2v" in case and "ti2v" not in case else 2)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(after[name].data_ptr() == state[name].data_ptr() for name in state)
    assert restore(model) is model
    asked.clear()
    assert torch.equal(sample(model, given), expected) and not asked
    assert not any("forward" in vars(module) for module in model.modules())


def assert_rule_holds(case: str, dtype: torch.dtype, device: str, attention: str | None = None) -> None:
    """Frame by frame and over all, against float32 on the same rounded weights and inputs."""
    model, given = CASES[case]()
    model, given = lower(model, dtype).to(device), cast(given, dtype, device)
    low = sample(model, given)
    out = sample(accelerate(model, attention=attention), given)
    exact = sample(restore(model).float(), cast(given, torch.float32, device))
    assert rel_l2(out, exact) <= 2 * rel_l2(low, exact) + torch.finfo(dtype).eps
    assert_within_twice(*(latents.movedim(2, 1).flatten(2) for latents in (out, low, exact)))


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_within_the_rule(case: str) -> None:
    assert_rule_holds(case, torch.bfloat16, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("attention", [None, "sdpa", "ref"])
@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_within_the_rule_on_a_gpu(case: str, attention: str | None) -> None:
    assert_rule_holds(case, torch.bfloat16, "cuda", attention)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["sky-df-causal", "wan-i2v"])
def test_compiled_by_inductor_on_a_gpu(case: str) -> None:
    torch._dynamo.reset()
    model, given = CASES[case]()
    model, given = accelerate(model.cuda()), cast(given, torch.float32, "cuda")
    expected = sample(model, given)
    model.compile_repeated_blocks(fullgraph=True)
    assert rel_l2(sample(model, given), expected) < 1e-3  # the GPU's products may be TF32


def rows_seen(model: nn.Module, given: dict) -> tuple[int, ...]:
    """The shape of the modulation that the blocks are given."""
    seen = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[2].shape)))
    sample(model, given)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("case", "rows"),
    [
        ("sky-df-causal", FRAMES),
        ("sky-t2v", 1),
        ("wan-t2v", 1),
        ("wan-ti2v", FRAMES),
        ("wan-ti2v-by-token", FRAMES * PER_FRAME),
    ],
)
def test_modulation_is_as_short_as_the_timesteps_allow(case: str, rows: int) -> None:
    model, given = CASES[case]()
    batch = given["hidden_states"].shape[0]
    assert rows_seen(accelerate(model), given) == (batch, rows, 6, model.config.num_attention_heads * 32)


def test_timesteps_by_frame_are_those_by_token() -> None:
    model = wan()
    expected = sample(model, inputs(timestep=token_timesteps()))
    out = sample(accelerate(model), inputs(timestep=token_timesteps()[:, ::PER_FRAME]))
    assert rel_l2(out, expected) <= 1e-5
    with pytest.raises(ValueError, match=r"a latent frame \(4\) or a token, not 3"):
        sample(model, inputs(timestep=torch.tensor([[1, 2, 3]])))


def test_frame_rates_of_a_batch() -> None:
    """diffusers cannot take two videos of different frame rates in diffusion forcing; alone they are right."""
    model = sky(inject_sample_info=True)
    timestep = torch.tensor([[5, 40, 300, 900], [0, 0, 700, 999]])
    given = inputs(batch=2, timestep=timestep, enable_diffusion_forcing=True)
    alone = []
    for video, fps in enumerate((0, 1)):
        one = {name: value[video : video + 1] for name, value in given.items() if isinstance(value, Tensor)}
        alone.append(sample(model, {**one, "enable_diffusion_forcing": True, "fps": [fps]}))
    assert rel_l2(sample(accelerate(model), given | {"fps": [0, 1]}), torch.cat(alone)) <= 1e-5
    with pytest.raises(ValueError, match="give fps, 0 for 16 fps"):
        sample(model, given)


def test_attention_is_the_one_asked_for(asked: list) -> None:
    model, given = CASES["wan-i2v"]()
    expected = sample(model, given)
    for backend in ("ref", None):
        assert rel_l2(sample(accelerate(model, attention=backend), given), expected) <= 1e-5
        assert asked == [backend] * 3 * len(model.blocks)
        asked.clear()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "blocks"])
@pytest.mark.parametrize("case", ["sky-df-causal", "wan-ti2v"])
def test_compiles_without_a_break(case: str, whole: bool, when: str) -> None:
    torch._dynamo.reset()
    model, given = CASES[case]()
    expected = sample(model, given)
    if when == "after":
        accelerate(model)
    options = {"backend": "aot_eager", "fullgraph": True}
    compiled = torch.compile(model, **options) if whole else model
    if not whole:
        model.compile_repeated_blocks(**options)
    if when == "before":
        accelerate(compiled)
    assert rel_l2(sample(compiled, given), expected) <= 1e-5


class LoRA(nn.Module):
    """A linear layer with a low-rank part, which has no weight of its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(4, base.in_features) * 0.2)
        self.up = nn.Parameter(torch.randn(base.out_features, 4) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def put_lora(model: nn.Module) -> None:
    torch.manual_seed(3)
    for name, module in list(model.blocks.named_modules()):
        if isinstance(module, nn.Linear):
            model.blocks.set_submodule(name, LoRA(module))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("case", ["sky-df", "wan-i2v"])
def test_lora_layers_are_called(case: str, when: str) -> None:
    model, given = CASES[case]()
    plain = sample(model, given)
    steps = [put_lora, accelerate] if when == "before" else [accelerate, put_lora]
    for step in steps:
        step(model)
    out = sample(model, given)
    expected = sample(restore(model), given)
    assert rel_l2(out, expected) <= 1e-5 < rel_l2(plain, expected)


def test_gelu_is_fused_into_plain_layers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = []
    monkeypatch.setattr(_diffusers_block, "linear_gelu", lambda x, *_: fused.append(1) or x.repeat(1, 1, 3)[..., :224])
    model, given = CASES["wan-t2v"]()
    expected = sample(model, given)
    sample(accelerate(model), given)
    assert len(fused) == len(model.blocks)
    for block in model.blocks:
        block.ffn.net[0].proj.register_forward_hook(lambda module, args, out: out)
    assert rel_l2(sample(model, given), expected) <= 1e-5 and len(fused) == len(model.blocks)


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_peft_adapters_and_their_scale(scale: float) -> None:
    peft = pytest.importorskip("peft")
    model, given = CASES["wan-t2v"]()
    plain = sample(accelerate(model), given)
    layers = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    model.add_adapter(peft.LoraConfig(r=4, target_modules=layers, init_lora_weights=False))
    given["attention_kwargs"] = {"scale": scale}
    out = sample(model, given)
    expected = sample(restore(model), given)
    assert rel_l2(out, expected) <= 1e-5 < rel_l2(plain, expected)


def test_fused_projections_are_used() -> None:
    model, given = CASES["wan-i2v"]()
    expected = sample(model, given)
    model.fuse_qkv_projections()
    for block in model.blocks:  # what fusing replaced must not be asked any more
        block.attn1.to_q = block.attn1.to_k = block.attn2.to_v = block.attn2.add_k_proj.forward = None
    assert rel_l2(sample(accelerate(model), given), expected) <= 1e-5


def sequential(model: nn.Module) -> None:
    """Every weight is on the meta device but while its module runs."""
    pytest.importorskip("accelerate").cpu_offload(model, execution_device=torch.device("cpu"))


def grouped(model: nn.Module, **options) -> None:
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, **options)


def forget_sequential(model: nn.Module) -> None:
    pytest.importorskip("accelerate").hooks.remove_hook_from_module(model, recurse=True)


OFFLOADS = {
    "sequential": sequential,
    "by-block": lambda model: grouped(model, offload_type="block_level", num_blocks_per_group=1),
    "by-leaf": lambda model: grouped(model, offload_type="leaf_level"),
    "layerwise-casting": lambda model: model.enable_layerwise_casting(torch.float16, torch.float32),
    "first-block-cache": lambda model: model.enable_cache(first_block_cache()),
}


def first_block_cache():
    from diffusers import FirstBlockCacheConfig

    return FirstBlockCacheConfig(threshold=0.0)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("hook", OFFLOADS)
def test_hooks_stay_in_force(hook: str, when: str, asked: list) -> None:
    model, given = CASES["wan-i2v"]()
    steps = [OFFLOADS[hook], accelerate] if when == "before" else [accelerate, OFFLOADS[hook]]
    for step in steps:
        step(model)
    with model.cache_context("ours"):
        out = sample(model, given)
    assert len(asked) == 3 * len(model.blocks)
    restore(model)
    with model.cache_context("theirs"):
        theirs = sample(model, given)
    assert rel_l2(out, theirs) <= 1e-5 and len(asked) == 3 * len(model.blocks)


@pytest.mark.gpu
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["sequential", "by-block", "by-leaf", "by-leaf-streamed"])
def test_offloading_from_a_gpu(kind: str, when: str) -> None:
    model, given = CASES["wan-i2v"]()
    expected = sample(model, given)

    def offload(model: nn.Module) -> None:
        if kind == "sequential":
            pytest.importorskip("accelerate").cpu_offload(model, execution_device=torch.device("cuda"))
            return
        options = {"offload_type": "block_level", "num_blocks_per_group": 1}
        if kind.startswith("by-leaf"):
            options = {"offload_type": "leaf_level", "use_stream": kind.endswith("streamed")}
        model.enable_group_offload(onload_device=torch.device("cuda"), **options)

    for step in [offload, accelerate] if when == "before" else [accelerate, offload]:
        step(model)
    for _ in range(2):  # streams learn the order of the layers in the first call
        out = sample(model, cast(given, torch.float32, "cuda"))
        assert rel_l2(out.cpu(), expected) < 1e-3  # the GPU's convolution may be TF32


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_come_off_again(when: str, asked: list) -> None:
    model, given = CASES["sky-df"]()
    theirs = sample(model, given)
    for step in [sequential, accelerate] if when == "before" else [accelerate, sequential]:
        step(model)
    forget_sequential(model)
    assert rel_l2(sample(model, given), theirs) <= 1e-5 and len(asked) == 2 * len(model.blocks)
    assert torch.equal(sample(restore(model), given), theirs)


def test_a_copy_stands_alone() -> None:
    model, given = CASES["sky-df"]()
    expected = sample(accelerate(model), given)
    other = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(sample(other, given), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_theirs(checkpointing: bool) -> None:
    model, given = CASES["sky-df-fps"]()
    model.requires_grad_(True).train()
    if checkpointing:
        model.enable_gradient_checkpointing()

    def gradients() -> list[Tensor]:
        loss = model(**given, return_dict=False)[0].square().mean()
        return torch.autograd.grad(loss, list(model.parameters()))

    expected = gradients()
    accelerate(model)
    for name, mine, theirs in zip(dict(model.named_parameters()), gradients(), expected, strict=True):
        # A key's bias moves all scores of a query alike: its gradient is zero, and rounding is all there is of it.
        if not name.endswith("to_k.bias"):
            assert rel_l2(mine, theirs) < 1e-3, name


@pytest.mark.parametrize("made", [sky, wan])
def test_signatures_are_theirs(made) -> None:
    model = accelerate(made(num_layers=1))
    for module in (model, model.blocks[0]):
        mine, theirs = (
            list(inspect.signature(forward).parameters) for forward in (module.forward, type(module).forward)
        )
        assert mine[: len(theirs) - 1] == theirs[1:]  # Wan's block knows no causal blocks


def test_what_is_returned_is_theirs() -> None:
    model, given = CASES["wan-t2v"]()
    accelerate(model)
    with torch.no_grad():
        out = model(*given.values())
    assert type(out).__name__ == "Transformer2DModelOutput"
    assert torch.equal(out.sample, sample(model, given))


def wan_pipeline(**parts) -> object:
    from diffusers import UniPCMultistepScheduler, WanPipeline

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, **parts)


def test_a_pipeline_of_two_transformers() -> None:
    pipe = wan_pipeline(transformer=wan(num_layers=1), transformer_2=wan(num_layers=2), boundary_ratio=0.9)
    embeds = inputs(batch=2)["encoder_hidden_states"].split(1)
    given = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1], "output_type": "latent"}
    given |= {"height": 48, "width": 80, "num_frames": 13, "num_inference_steps": 4}

    def run() -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        return pipe(**given, generator=torch.Generator().manual_seed(0)).frames

    expected = run()
    assert accelerate(pipe) is pipe
    assert all("forward" in vars(model) for model in (pipe.transformer, pipe.transformer_2))
    assert rel_l2(run(), expected) <= 1e-5
    restore(pipe)
    assert torch.equal(run(), expected)
    accelerate(wan_pipeline(transformer_2=wan(num_layers=1)))


@pytest.mark.parametrize("case", ["sky-df", "wan-ti2v"])
def test_one_timestep_serves_a_batch(case: str) -> None:
    model, given = CASES[case]()
    given = given | {name: value for name, value in inputs(batch=2).items() if name != "timestep"}
    if case == "sky-df":
        given = given | {"timestep": torch.tensor([801]), "enable_diffusion_forcing": False}
    assert rel_l2(sample(model, given), sample(accelerate(model), given)) <= 1e-5


def test_a_timestep_of_another_batch_is_one_line() -> None:
    model = accelerate(wan(num_layers=1))
    with pytest.raises(ValueError, match="timestep must be that of one video or of all 3, not of 2$"):
        sample(model, inputs(batch=3) | {"timestep": torch.tensor([1, 2])})


def test_a_processor_set_later_is_not_passed_by() -> None:
    model = accelerate(wan(num_layers=1))
    sample(model, inputs())
    model.blocks[0].attn1.processor = SimpleNamespace()
    with pytest.raises(ValueError, match="WanAttention has a SimpleNamespace, which would be passed by: take it out, "):
        sample(model, inputs())


def own_processor() -> nn.Module:
    class Processor:
        pass

    model = wan(num_layers=1)
    model.blocks[0].attn2.processor = Processor()
    return model


def own_forward() -> nn.Module:
    model = wan(num_layers=1)
    model.blocks[0].forward = lambda *args: args[0]
    return model


def split() -> nn.Module:
    model = wan(num_layers=1)
    model._parallel_config = SimpleNamespace()
    return model


SUPPORTED = "give a SkyReelsV2Transformer3DModel or a WanTransformer3DModel, or a pipeline with such a transformer"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: nn.Linear(2, 2), f"Linear is not supported: {SUPPORTED} or transformer_2"),
        (lambda: SimpleNamespace(unet=None), f"SimpleNamespace is not supported: {SUPPORTED}"),
        (lambda: SimpleNamespace(transformer=wan(num_layers=1), transformer_2=nn.ReLU()), "ReLU is not supported"),
        (own_processor, "blocks.0.attn2 has a Processor"),
        (own_forward, "forward of a WanTransformerBlock is already replaced"),
        (split, "enable_parallelism"),
    ],
)
def test_refusals_are_one_line_and_change_nothing(given, message: str) -> None:
    subject = given()
    with pytest.raises(ValueError, match=message) as caught:
        accelerate(subject)
    assert "\n" not in str(caught.value)
    model = getattr(subject, "transformer", subject)
    assert not isinstance(model, nn.Module) or "forward" not in vars(model)


def test_unknown_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no backend 'xformers'; give one of fa3"):
        accelerate(wan(num_layers=1), attention="xformers")


def test_without_diffusers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'skyreels-fast\[diffusers\]'"):
        accelerate(nn.Linear(2, 2))
