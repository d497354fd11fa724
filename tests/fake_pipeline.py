"""A stand-in for the pipeline, for tests of what the commands do around it."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

from skyreels_fast import cli

# A pipeline that renders grey frames of a tiny size, here or in a process of its own.
FAKE = """
import time
from types import SimpleNamespace
import torch
from skyreels_fast.request import resolve

opened, budgets = [], []
loaded = []
DEFAULTS = {"height": 64, "width": 96, "num_frames": 17, "base_num_frames": 17, "inference_steps": 2}
error_at_open = error_at_plan = error_at_chunk = None
chunks, pause_s, short_of_memory = 4, 0.0, False

def memory_note(full):
    return "denoising needs about 34.5 GiB" if full or short_of_memory else None

class Progress:
    def stage(self, name): pass
    def window(self, index, count, calls): pass
    def step(self): pass

class Plan(SimpleNamespace):
    def describe(self):
        return f"plan: {self.frames} frames"

class Pipeline:
    machine = SimpleNamespace(world=None, leads=True, memory_note=lambda plan, full=False: memory_note(full))

    @classmethod
    def from_pretrained(cls, path, device="cuda", dtype=None, mode=None, vram=None, **options):
        budgets.append(vram)
        opened.append((path, device, dtype, options["offload"], mode, options))
        if error_at_open: raise error_at_open
        pipe = cls()
        pipe.mode = mode or "t2v"
        return pipe

    def plan(self, request):
        if error_at_plan: raise error_at_plan
        settings = resolve(request, mode=self.mode, defaults=DEFAULTS, resolution_hint="540P")
        return Plan(settings=settings, calls=(2, 2), frames=4 * chunks, notes=settings.notes)

    def identity(self, plan):
        return {"seed": plan.settings.seed}

    def __call__(self, plan, stream=False, progress=None, run=None, keep_latents=True):
        assert stream
        loaded.append(plan)
        result = SimpleNamespace(frames=None, latents=[], settings=plan.settings, timings={})
        result.frames = self.render(plan, result, progress)
        return result

    def render(self, plan, result, progress):
        progress.stage("load")
        for window in range(2):
            progress.window(window, 2, 2)
            progress.stage("denoise")
            progress.step()
            progress.step()
            result.timings["denoise"] = result.timings.get("denoise", 0) + 0.5
            for index in range(chunks // 2):
                progress.stage("decode")
                if error_at_chunk and error_at_chunk[0] == window * (chunks // 2) + index:
                    raise error_at_chunk[1]
                time.sleep(pause_s)
                yield torch.full((4, plan.settings.height, plan.settings.width, 3), 99, dtype=torch.uint8)
"""
COMMANDS = {"generate_video_df.py": cli.generate_video_df, "generate_video.py": cli.generate_video}
CPU = ["--device", "cpu", "--model_id", "tiny"]


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """The stand-in pipeline; the command runs in an empty directory."""
    module = types.ModuleType("skyreels_fast.pipeline")
    exec(FAKE, module.__dict__)
    monkeypatch.setitem(sys.modules, "skyreels_fast.pipeline", module)
    monkeypatch.delitem(sys.modules, "skyreels_fast._progress", raising=False)
    monkeypatch.chdir(tmp_path)
    return module


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (96, 64)).save(path)
    return str(path)


def decoded(path) -> int:
    import imageio_ffmpeg

    exe = imageio_ffmpeg.get_ffmpeg_exe()
    done = subprocess.run([exe, "-i", str(path), "-f", "null", "-"], capture_output=True, text=True)
    found = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("frame=")]
    return int(found[-1].split("=")[1].split()[0]) if found else 0


def sidecar(path: Path) -> dict:
    return json.loads(path.with_suffix(".json").read_text())
