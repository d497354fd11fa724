"""What both training runs share: float32 masters of low-precision modules, a time-based rate, sharded files."""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.muon import Muon

SHARD_BYTES = 15 * 2**20  # no checkpoint file is larger: transfers may be limited to 16 MiB a file


class Master:
    """Muon and AdamW on float32 copies of the modules' parameters, and their moving average.

    The modules themselves compute in whatever dtype they were given; after each step they take the rounded masters.
    Muon takes the inner matrices and convolutions; AdamW what is left, at a rate of its own and without weight decay.

    Args:
        modules: prefix to module; parameters are called "prefix.name".
        outer: pattern of the names of matrices that AdamW takes as well.
        ema: decay of the moving average, reached after a warm-up.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        *,
        outer: str = "",
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
        ema: float = 0.999,
        max_norm: float = 1.0,
    ) -> None:
        named = {f"{p}.{name}": value for p, module in modules.items() for name, value in module.named_parameters()}
        self.names, self.params = list(named), list(named.values())
        self.masters = [param.detach().float().clone() for param in self.params]
        self.average = [master.clone() for master in self.masters]
        pairs = list(zip(self.names, self.masters, strict=True))
        inner = {name: m for name, m in pairs if _is_matrix(m) and not (outer and re.search(outer, name))}
        self.adamw = {name: m for name, m in pairs if name not in inner}
        self.muon = Muon(list(inner.values()), weight_decay=weight_decay)
        rest = list(self.adamw.values())
        self.optimizer = torch.optim.AdamW(rest, lr=0.0, betas=betas, weight_decay=0.0, fused=rest[0].is_cuda)
        self.ema, self.max_norm, self.steps = ema, max_norm, 0
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self._reset_moments()

    def _reset_moments(self) -> None:
        for master in self.adamw.values():
            step = torch.tensor(float(self.steps), device=master.device if master.is_cuda else "cpu")
            state = {"step": step, "exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
            self.optimizer.state[master] = state

    @torch.no_grad()
    def step(self, rate: float, adamw_rate: float | None = None) -> Tensor:
        """One step from the modules' gradients, which are cleared. Returns their norm before clipping, 0-dim."""
        grads = [master.grad for master in self.masters]
        torch._foreach_zero_(grads)
        used = [i for i, param in enumerate(self.params) if param.grad is not None]
        torch._foreach_copy_([grads[i] for i in used], [self.params[i].grad for i in used])
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_mul_(grads, (self.max_norm / (norm + 1e-6)).clamp(max=1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = rate if adamw_rate is None else adamw_rate
        self.optimizer.step()
        self.muon.step(rate)
        self.steps += 1
        torch._foreach_copy_(self.params, self.masters)
        torch._foreach_lerp_(self.average, self.masters, 1 - min(self.ema, self.steps / (self.steps + 10)))
        for param in self.params:
            param.grad = None
        return norm

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange masters and average, in the modules too; a second call undoes the first."""
        held = [master.clone() for master in self.masters]
        torch._foreach_copy_(self.masters, self.average)
        torch._foreach_copy_(self.average, held)
        torch._foreach_copy_(self.params, self.masters)

    def _kinds(self) -> dict[str, dict[str, Tensor]]:
        squares = {name: self.optimizer.state[master]["exp_avg_sq"] for name, master in self.adamw.items()}
        named = {"ema": self.average, "master": self.masters}
        return {kind: dict(zip(self.names, values, strict=True)) for kind, values in named.items()} | {
            "squares": squares
        }

    def save(self, directory: Path, meta: dict[str, Any]) -> None:
        """Write average, masters and second moments in bfloat16, in shards, and `meta` as state.json.

        First moments are left out: they are back after a dozen steps.
        """
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{kind}/{name}": tensor.to("cpu", torch.bfloat16)
            for kind, values in self._kinds().items()
            for name, tensor in values.items()
        }
        save_shards(directory, tensors)
        (directory / "state.json").write_text(json.dumps({**meta, "steps": self.steps}, indent=2) + "\n")

    @torch.no_grad()
    def load(self, directory: Path) -> dict[str, Any]:
        """Take up from `save`. Returns its `meta`. Raises ValueError when names or shapes differ."""
        meta = json.loads((directory / "state.json").read_text())
        self.steps = meta["steps"]
        self._reset_moments()
        for kind, tensors in self._kinds().items():
            saved = load_shards(directory, kind)
            if saved.keys() != tensors.keys():
                raise ValueError(f"{directory}: the checkpoint's parameters are not this model's; check its sizes")
            for name, tensor in tensors.items():
                if saved[name].shape != tensor.shape:
                    raise ValueError(
                        f"{directory}: {name} has shape {tuple(saved[name].shape)}, not {tuple(tensor.shape)}"
                    )
                tensor.copy_(saved[name])
        torch._foreach_copy_(self.params, self.masters)
        return meta


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.ndim > 1 and min(tensor.shape[0], tensor[0].numel()) > 1


def save_shards(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Write state-1.pt, state-2.pt, … of at most SHARD_BYTES each."""
    shards: list[dict[str, Tensor]] = [{}]
    room = SHARD_BYTES
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = tensor.contiguous()
        room -= tensor.nbytes
    for number, shard in enumerate(shards, start=1):
        torch.save(shard, directory / f"state-{number}.pt")


def load_shards(directory: Path, kind: str) -> dict[str, Tensor]:
    """The tensors of one kind ("ema", "master", "squares") by name. Raises ValueError when there is no checkpoint."""
    paths = sorted(directory.glob("state-*.pt"))
    if not paths:
        raise ValueError(f"{directory}: no state-*.pt there; train first, or name the checkpoint's directory")
    tensors = {name: value for path in paths for name, value in torch.load(path, weights_only=True).items()}
    return {name.partition("/")[2]: value for name, value in tensors.items() if name.startswith(f"{kind}/")}


class Clock:
    """Time is the schedule: a run of `minutes` in all, of which earlier sessions spent `spent_s` seconds."""

    def __init__(self, minutes: float, session_minutes: float | None = None, spent_s: float = 0.0) -> None:
        self.total_s, self.spent_s = minutes * 60, spent_s
        self.session_s = min(math.inf if session_minutes is None else session_minutes * 60, self.total_s - spent_s)
        self.began = time.perf_counter()

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far, earlier sessions included."""
        return self.spent_s + time.perf_counter() - self.began

    @property
    def progress(self) -> float:
        return min(self.elapsed_s / self.total_s, 1.0)

    @property
    def over(self) -> bool:
        return time.perf_counter() - self.began >= self.session_s

    def rate(self, peak: float, step: int, warm_up: int, floor: float = 0.02) -> float:
        """Linear warm-up by steps, then a cosine from `peak` to `floor`·peak by time."""
        cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * self.progress))
        return peak * cosine * min(1.0, (step + 1) / warm_up)


class Log:
    """Rows of numbers to a JSON-lines file and, in short, to the terminal."""

    def __init__(self, path: Path, fresh: bool = True) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        if fresh:
            path.unlink(missing_ok=True)

    def __call__(self, **values: Any) -> None:
        """Append one row; 0-dim tensors are read here. Raises FloatingPointError when a `loss` is not finite."""
        row = {key: value.item() if isinstance(value, Tensor) else value for key, value in values.items()}
        row = {key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print("  ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
        if not math.isfinite(row.get("loss", 0.0)):
            raise FloatingPointError(f"the loss is {row['loss']} at step {row['step']}; resume from a checkpoint")


def parse_run(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Add what every training run takes from the command line, and parse it."""
    parser.add_argument("--session_minutes", type=float, default=None, help="stop earlier, to be resumed")
    parser.add_argument("--steps", type=int, default=10**9, help="stop after so many steps at the latest")
    parser.add_argument("--resume", type=Path, default=None, help="directory of an earlier session's checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=None, help="default: bfloat16 on a GPU")
    parser.add_argument("--weight_decay", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    return args


def parameters(modules: Iterable[nn.Module]) -> int:
    return sum(param.numel() for module in modules for param in module.parameters())
