"""What the user calls a model → the directory that holds it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from textwrap import shorten

from .weights import CheckpointError

_TINY = Path(__file__).parent.parent / "assets" / "tiny"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_WANTED = (
    "*.json",
    "*.safetensors",
    "model.pth",
    "diffusion_pytorch_model.pth",
    "*Wan2.1_VAE.pth",
    "*models_t5_umt5-xxl-enc-bf16.pth",
    "*models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
)
_UNWANTED = ("xlm-roberta-large/*",)  # the tokenizer of CLIP's text side


def locate(path_or_id: str | Path) -> tuple[Path, str]:
    """Find a model's directory and its name, downloading it where it is a hub id that is not in the hub's cache.

    Raises:
        CheckpointError: there is no such directory or id, or the hub is out of reach.
    """
    if path_or_id == "tiny":
        return _TINY, "tiny"
    directory = os.path.expanduser(path_or_id)
    if os.path.isdir(directory):
        return Path(directory), _directory_name(Path(directory).resolve())
    if isinstance(path_or_id, str) and _HUB_ID.fullmatch(path_or_id):
        return _download(path_or_id), path_or_id
    raise CheckpointError(
        f"no such model directory: {path_or_id}; give a directory with config.json, "
        "a hub id such as Skywork/SkyReels-V2-DF-1.3B-540P, or 'tiny'"
    )


def _directory_name(directory: Path) -> str:
    """The last part of the path; of a directory in the hub's cache, the name of its model."""
    cached = re.fullmatch(r"models--(.+?)--(.+)", directory.parent.parent.name)
    if directory.parent.name == "snapshots" and cached:
        return f"{cached[1]}/{cached[2]}"
    return directory.name


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED)))
    except GatedRepoError as error:
        why, remedy = error, "ask for access on its page, then log in with `hf auth login`"
    except RepositoryNotFoundError as error:
        why, remedy = error, "check the id, or log in with `hf auth login` if the model is private"
    except Exception as error:
        why, remedy = error, "check the network and HF_HUB_OFFLINE, or give a directory that holds the model"
    reason = shorten((str(why) or type(why).__name__).splitlines()[0], 160, placeholder=" ...")
    raise CheckpointError(
        f"{hub_id} is no directory here and could not be had from the hub: {remedy} ({reason})"
    ) from why
