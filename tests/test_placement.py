"""Where weights are: resident, or on the device only while in use."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from skyreels_fast.placement import Placement


def make_module() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    module.requires_grad_(False)
    return module.eval()


def places(module: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in (*module.parameters(), *module.buffers())}


@pytest.mark.parametrize("offload", [False, True])
def test_on_the_cpu_weights_stay_the_same_tensors(offload: bool) -> None:
    module, placement = make_module(), Placement("cpu", offload=offload)
    before = [tensor.data_ptr() for tensor in module.parameters()]
    with placement.use(module) as used:
        assert used is module
        assert [tensor.data_ptr() for tensor in module.parameters()] == before
    assert [tensor.data_ptr() for tensor in module.parameters()] == before
    assert placement.home.type == "cpu"


def test_errors_inside_pass_through() -> None:
    with pytest.raises(ZeroDivisionError), Placement("cpu", offload=True).use(make_module()):
        _ = 1 / 0


def test_blocks_come_in_order() -> None:
    dit = nn.Module()
    dit.blocks = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))
    assert list(Placement("cpu").blocks(dit)) == list(dit.blocks)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("offload", "stay", "leaves"), [(False, None, False), (True, None, True), (False, False, True)]
)
def test_on_the_gpu_while_in_use(offload: bool, stay: bool | None, leaves: bool) -> None:
    module, placement = make_module(), Placement("cuda", offload=offload)
    host = [tensor.data_ptr() for tensor in module.parameters()]
    x = torch.randn(2, 3)
    expected = module(x)
    with torch.inference_mode():
        for _ in range(2):
            with placement.use(module, stay=stay):
                assert places(module) == {"cuda"}
                assert torch.allclose(module(x.cuda()).cpu(), expected, atol=1e-5)
            assert places(module) == ({"cpu"} if leaves else {"cuda"})
    if leaves:
        assert [tensor.data_ptr() for tensor in module.parameters()] == host


@pytest.mark.gpu
def test_offloaded_weights_leave_no_memory_behind_even_after_an_error() -> None:
    module, placement = nn.Linear(1024, 1024), Placement("cuda", offload=True)
    before = torch.cuda.memory_allocated()
    with pytest.raises(ZeroDivisionError), placement.use(module):
        assert torch.cuda.memory_allocated() > before
        _ = 1 / 0
    assert torch.cuda.memory_allocated() == before and places(module) == {"cpu"}


@pytest.mark.gpu
def test_the_outermost_use_decides() -> None:
    module, placement = make_module(), Placement("cuda", offload=True)
    with placement.use(module):
        with placement.use(module):
            pass
        assert places(module) == {"cuda"}
    assert places(module) == {"cpu"}
