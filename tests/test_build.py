"""The extension builds for every GPU it names, imports where there is none, is left out where it cannot be built."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARCHS = ["80", "86", "89", "90a"]
CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")

pytestmark = pytest.mark.skipif(CMAKE is None, reason="CMake is not installed")


def run(*command: str | Path, **keywords) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        **keywords,
    )


def configure(build: Path, *definitions: str) -> subprocess.CompletedProcess:
    pybind11 = pytest.importorskip("pybind11").get_cmake_dir()
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    return run(
        CMAKE, "-S", ROOT, "-B", build, *generator, f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11}", *definitions,
    )  # fmt: skip


@pytest.fixture(scope="module")
def extension(tmp_path_factory) -> Path:
    """The folder of a freshly built `_C`."""
    if NVCC is None:
        pytest.skip("nvcc is not installed")
    build = tmp_path_factory.mktemp("build")
    configured = configure(build, "-DSKYREELS_FAST_CUDA=ON")
    assert configured.returncode == 0, configured.stdout
    built = run(CMAKE, "--build", build, "--parallel", "2")
    assert built.returncode == 0, built.stdout
    return build


def in_extension(folder: Path, code: str) -> str:
    """What `code` prints in a fresh interpreter that holds the extension as `_C`, and no GPU."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = run(sys.executable, "-c", f"import _C\n{code}", cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_builds_for_every_gpu_and_imports_without_one(extension):
    info = json.loads(in_extension(extension, "import json; print(json.dumps(_C.build_info()))"))
    assert info["archs"] == ARCHS
    assert info["build_type"] == "Release"
    assert set(info) == {"version", "cuda", "archs", "compiler", "build_type"}
    assert int(info["cuda"].split(".")[0]) >= 11


def test_holds_machine_code_for_every_gpu(extension):
    (module,) = extension.glob("_C*.so")
    triton = importlib.util.find_spec("triton")  # its wheel has one
    places = [Path(NVCC).resolve().parent] + ([Path(triton.origin).parent / "backends/nvidia/bin"] if triton else [])
    cuobjdump = next((place / "cuobjdump" for place in places if (place / "cuobjdump").exists()), None)
    if cuobjdump is None:
        pytest.skip("cuobjdump is not installed")
    listed = run(cuobjdump, "--list-elf", module).stdout
    assert all(f"sm_{arch}.cubin" in listed for arch in ARCHS), listed


def test_needs_no_cuda_library(extension):
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    (module,) = extension.glob("_C*.so")
    needed = run("readelf", "-d", module).stdout
    assert "libstdc++" in needed
    assert "libcuda" not in needed


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("qk_norm(16, 16, 16, (1, 4, 2, 8), STRIDES, 1e-6, 9, 0, 0)", "qk_norm: dtype code 9"),
        ("qk_norm(16, 16, 16, (1, 0, 2, 8), STRIDES, 1e-6, 0, 0, 0)", "no tokens"),
        ("qk_norm(16, 16, 16, (1, 4, 2, 7), STRIDES, 1e-6, 0, 0, 0)", "heads of 7 channels are not even"),
        ("qk_norm(16, 18, 16, (1, 4, 2, 8), STRIDES, 1e-6, 0, 0, 0)", "qk_norm: x is not aligned"),
        ("qk_norm(0, 16, 16, (1, 4, 2, 8), STRIDES, 1e-6, 2, 2, 0)", "qk_norm: x_out is null"),
        ("qk_norm(16, 16, 16, (1, 4, 2, 8), STRIDES, 1e-6, 1, 2, 0)", "weights are neither float32 nor"),
        (
            "qk_norm_rope3d(*[16] * 7, (1, 4, 2, 8), *[STRIDES] * 4, (1, 2, 3), (0, 6), 1e-6, 0, 0, 0)",
            "the tokens are not those of the grid",
        ),
    ],
)
def test_entries_check_their_arguments(extension, call, message):
    code = f"STRIDES = (64, 16, 8)\ntry:\n    _C.{call}\nexcept ValueError as error:\n    print(error)"
    assert message in in_extension(extension, code)


def test_errors_of_cuda_are_exceptions(extension):
    call = "_C.qk_norm(16, 16, 16, (1, 4, 2, 8), (64, 16, 8), 1e-6, _C.FLOAT32, _C.FLOAT32, 0)"
    code = f"try:\n    {call}\nexcept RuntimeError as error:\n    print(error)"
    assert "qk_norm: cudaError" in in_extension(extension, code)


def test_left_out_on_request(tmp_path):
    configured = configure(tmp_path, "-DSKYREELS_FAST_CUDA=OFF")
    assert configured.returncode == 0, configured.stdout
    assert "pure Python" in configured.stdout and "SKYREELS_FAST_CUDA=ON" in configured.stdout
    assert not list(tmp_path.glob("**/CMakeCXXCompiler.cmake"))  # no compiler was asked for


def test_forced_without_a_compiler(tmp_path):
    configured = configure(tmp_path, "-DSKYREELS_FAST_CUDA=ON", "-DSKYREELS_FAST_NVCC=")
    assert configured.returncode != 0
    assert "the CUDA kernels cannot be built: no nvcc" in configured.stdout


def test_setting_is_one_of_three(tmp_path):
    assert "must be AUTO, ON or OFF" in configure(tmp_path, "-DSKYREELS_FAST_CUDA=maybe").stdout
