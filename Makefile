# make demo    a virtual environment in .venv, the package in it, a video with the bundled model
# make test    ruff, the import contracts and every test that needs no GPU; builds the CUDA kernels where nvcc is
# make clean   remove all of that
#
#   TORCH=torch==2.7.1   another build of torch (any from 2.6 on; a wheel's URL works too)
#   PYTHON=python3.12    another Python (3.10 to 3.13)
#   PYTEST_ARGS="-k vae" more arguments for pytest

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
NVCC := $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard $(CUDA_HOME)/bin/nvcc /usr/local/cuda/bin/nvcc))
# By the environment, for the option of pip came late.
WITH_CUDA := $(if $(NVCC),SKBUILD_CMAKE_DEFINE="SKYREELS_FAST_CUDA=ON")

BUILD_FILES := pyproject.toml CMakeLists.txt $(wildcard csrc/*)
PACKAGE_FILES := $(shell find python -type f -not -path '*/__pycache__/*')
# The install for tests is editable, so that it serves the demo too.
INSTALLED := $(if $(wildcard $(VENV)/.for-test),$(VENV)/.for-test,$(VENV)/.for-demo)

PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not slow"

.PHONY: demo test clean

demo: $(INSTALLED)
	$(BIN)/python generate_video_df.py --model_id tiny --seed 42 --outdir demo \
	  --prompt "a red circle moving right on a black background"
	@echo "The video is $$(ls -t $(CURDIR)/result/demo/*.mp4 | head -1)"

test: $(VENV)/.for-test
	$(BIN)/ruff check .
	$(PYTEST) -n 2 --dist loadfile $(PYTEST_ARGS)

$(VENV)/.for-demo: $(VENV)/.torch $(BUILD_FILES) $(PACKAGE_FILES)
	$(PIP) install .
	@touch $@

$(VENV)/.for-test: $(VENV)/.torch $(BUILD_FILES)
	$(WITH_CUDA) $(PIP) install -e '.[test]'
	@touch $@

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)"
	@touch $@

clean:
	rm -rf $(VENV) build dist result .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
