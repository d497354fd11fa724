"""Tensors into a module: every parameter from exactly the tensors that belong to it, or an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from ..transfer import Rows, load
from .weights import CheckpointError, one_line

Parts = Mapping[str, tuple[str, ...]]
_NAMED = 4  # names an error message lists before it counts


class Home(Protocol):
    """Something that takes weights in where no device is to have them whole."""

    def hold(self, module: nn.Module, rows: Mapping[str, Rows], dtype: torch.dtype) -> None: ...


def check(
    module: nn.Module,
    sources: Mapping[str, Tensor],
    parts: Parts | None = None,
    *,
    what: str,
    shown: Callable[[str], str] = str,
) -> None:
    """Compare names and shapes, reading no data.

    Args:
        module: may be on the meta device.
        sources: the checkpoint's tensors, named as `parts` says.
        parts: parameter name → names of the tensors that make it up, one below the other along dim 0;
            None where both are named alike.
        what: begins the error message.
        shown: a name in `sources` → what the message calls it.

    Raises:
        CheckpointError: tensors are missing, left over or misshapen.
    """
    parameters = dict(module.named_parameters())
    parts = parts or {name: (name,) for name in parameters}
    needed = {name for names in parts.values() for name in names}
    complaints = []
    if missing := [name for name in needed if name not in sources]:
        complaints.append(f"missing {_listed(map(shown, missing))}")
    if unknown := sources.keys() - needed:
        complaints.append(f"unknown {_listed(map(shown, unknown))}")
    misfits = [
        f"{' + '.join(map(shown, names))} {_shapes(sources, names)} in place of {tuple(parameters[target].shape)}"
        for target, names in parts.items()
        if all(name in sources for name in names) and not _fits(parameters[target], [sources[n] for n in names])
    ]
    if misfits:
        complaints.append(f"misshapen {_listed(misfits)}")
    if complaints:
        raise CheckpointError(f"{what}: {'; '.join(complaints)}")


@torch.inference_mode(False)
def fill(
    module: nn.Module,
    sources: Mapping[str, Tensor],
    parts: Parts | None = None,
    *,
    device: torch.device | str | Home,
    dtype: torch.dtype,
    what: str,
    shown: Callable[[str], str] = str,
) -> None:
    """Give every parameter of `module` its data, on `device` in `dtype`; see `check` for the arguments and errors.

    Data is copied at most once. On the CPU a tensor of the same dtype becomes the parameter as it is, still mapped
    to its file. Buffers must not be on the meta device; they move to `device` too. A Home decides for itself.
    """
    check(module, sources, parts, what=what, shown=shown)
    rows = {
        name: Rows(parameter.shape, sources, parts[name] if parts else (name,))
        for name, parameter in module.named_parameters()
    }
    try:
        if isinstance(device, (torch.device, str)):
            load(module, rows, device, dtype)
            module.to(device)
        else:
            device.hold(module, rows, dtype)
    except OSError as error:
        raise CheckpointError(f"{what}: cannot be read ({one_line(error)})") from error


def _fits(parameter: Tensor, tensors: list[Tensor]) -> bool:
    if len(tensors) == 1:
        return parameter.shape == tensors[0].shape
    trailing = {tuple(tensor.shape[1:]) for tensor in tensors}
    return trailing == {tuple(parameter.shape[1:])} and sum(tensor.shape[0] for tensor in tensors) == len(parameter)


def _shapes(sources: Mapping[str, Tensor], names: Iterable[str]) -> str:
    return " + ".join(str(tuple(sources[name].shape)) for name in names)


def _listed(names: Iterable[str]) -> str:
    names = sorted(set(names))
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + rest
