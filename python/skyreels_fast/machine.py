"""The GPU or the GPUs that a pipeline renders on, and what a plan takes of them."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from . import ops
from ._meta import without_weights
from .config import DTYPES, PIXEL_MULTIPLE, TransformerConfig
from .dit.model import DiT
from .footprint import GIB, OVERHEAD_BYTES, Footprint, check_vram
from .parallel import Degrees, Layout, World, choose_layout
from .parallel import Team as Sharing
from .placement import Placement
from .plan import Plan
from .sampling.team import Alone, Team
from .vae import VAE, tiles


def checked_device(name: str | torch.device) -> torch.device:
    """Raises ValueError for a device that is unknown or not there."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cuda", "cpu"):
        raise ValueError(f'device={str(name)!r}: must be "cuda", "cuda:N" or "cpu"')
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f'device="{device}": PyTorch finds no CUDA device here; give device="cpu"')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f'device="{device}": PyTorch finds {torch.cuda.device_count()} CUDA devices here')
    return device


def check_dtypes(**dtypes: torch.dtype | None) -> None:
    """Raises ValueError for one in which a model cannot be had. None stands for a default."""
    known = [getattr(torch, name) for name in DTYPES]
    for name, dtype in dtypes.items():
        if dtype is not None and dtype not in known:
            raise ValueError(f"{name}={dtype!r}: must be {', '.join(map(str, known[:-1]))} or {known[-1]}")


class Machine:
    """Where one process computes, and with which others together.

    attention: the backend that half-precision attention takes. world: the processes that render together, or None.
    """

    def __init__(
        self,
        config: TransformerConfig,
        device: torch.device,
        dtype: torch.dtype,
        *,
        offload: bool,
        vram: float | None,
        attention: str | None,
        degrees: Degrees | None,
    ) -> None:
        """Arguments as in `Pipeline.from_pretrained`, checked. Raises ValueError for what does not go on `device`."""
        check_vram(vram, device, offload)
        self.attention = ops.choose_attention(attention, device, dtype)
        self.attend = partial(ops.attention, backend=attention)
        self.placement = Placement(device, offload=offload, vram_bytes=None if vram is None else int(vram * GIB))
        self.world = None if degrees is None else World.join(device)
        self._config, self._device, self._dtype = config, device, dtype
        self._offload, self._vram = offload, vram
        self._backend, self._degrees = attention, degrees

    @property
    def leads(self) -> bool:
        """Whether this process is the one that reads, writes and puts frames out."""
        return self.world is None or self.world.leads

    def check(self, plan: Plan) -> None:
        """Raises ValueError where a plan does not go on this machine as asked."""
        self.layout(plan)
        if self._vram is not None:
            self.footprint(plan).check(self._vram)

    def layout(self, plan: Plan) -> Layout:
        """Over which processes a plan is spread. Raises ValueError where it does not go as asked."""
        if self.world is None:
            return Layout()
        return choose_layout(
            self._degrees,
            self.world.size,
            heads=self._config.num_heads,
            guided=plan.guided,
            tokens_per_frame=_tokens_per_frame(plan),
            guidance_scale=plan.settings.guidance_scale,
        )

    def team(self, plan: Plan) -> Team:
        """Those who denoise the plan together."""
        if self.world is None:
            return Alone(self.attend)
        return Sharing(self.world, self.layout(plan), _tokens_per_frame(plan), self._backend)

    def footprint(self, plan: Plan) -> Footprint:
        """What denoising the plan needs of GPU memory, of each GPU if there are several."""
        with without_weights():
            dit = DiT(self._config)
        layout = self.layout(plan)
        branches, teacache = (1 + plan.guided) // layout.branches, plan.settings.teacache
        return Footprint.of(dit, self._dtype, plan.tokens, branches, shards=layout.sequence, teacache=teacache)

    def memory_note(self, plan: Plan, *, full: bool = False) -> str | None:
        """One line where the GPU has less memory than the plan needs, or, with `full`, in any case; None otherwise."""
        if self._device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(self._device)
        needs, how = self.footprint(plan), {"offload": self._offload, "vram": self._vram}
        if not full and needs.needed(**how) <= total:
            return None
        frames_flag = "--base_num_frames" if plan.settings.mode == "df" else "--num_frames"
        return needs.advice(**how, total=total, free=free, frames_flag=frames_flag)

    def spare_bytes(self, needs: Footprint, team: Team) -> int | None:
        """GPU memory that every process may fill for speed alone, a tenth of it left for all else; None: no limit."""
        if self._device.type != "cuda":
            return None
        if self._vram is not None:
            return team.least(max(0, int(self._vram * GIB) - needs.total))
        free, total = torch.cuda.mem_get_info(self._device)
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return team.least(max(0, free + cached - total // 10))

    def decode_bytes(self, dit: nn.Module, vae: VAE) -> int | None:
        """GPU memory for decoding beside those weights that are there; None: no limit.

        Of --vram, or else of the whole GPU, whatever is free of it: the same run decodes the same way again. Never less
        than the smallest tile takes: what has been denoised is at least tried to be decoded.
        """
        device = self.placement.device
        if device.type != "cuda":
            return None
        total = torch.cuda.mem_get_info(device)[1] if self._vram is None else int(self._vram * GIB)
        parameters = (*dit.parameters(), *vae.parameters())
        weights = sum(tensor.nbytes for tensor in parameters if tensor.device == device)
        return max(tiles.least_bytes(vae), total - OVERHEAD_BYTES - weights)


def _tokens_per_frame(plan: Plan) -> int:
    return plan.settings.height * plan.settings.width // PIXEL_MULTIPLE**2
