# Everything a checkout needs. `demo`, `test` and `lint` set up .venv themselves, once.
#   PYTHON=python3.12   the interpreter that .venv is made from
#   SYSTEM_TORCH=1      use PYTHON with its own torch: no .venv, no network, only the C++ build
#   OUT=folder          where demo (runs/digits), cuda-check (build), bench and gpu
#                       (benchmarks/results) leave files

PYTHON ?= python3
SYSTEM_TORCH ?=
OUT ?=
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
GPU_ARGS ?=

VENV := .venv
EXTENSION := sparse_cocktail/_C.abi3.so
SOURCES := $(wildcard csrc/*/*)
TORCH := torch==2.13.0
TOOLS := pytest pytest-xdist pytest-benchmark hypothesis ruff scikit-image transformers \
	accelerate pytorch-lightning
BESIDE_TORCH := torchvision timm

ifeq ($(SYSTEM_TORCH),1)
PY := $(PYTHON)
SET_UP :=
TESTERS :=
PARALLEL :=
else
PARALLEL := -n 2 --dist loadfile
PY := $(VENV)/bin/python
SET_UP := $(VENV)/.set-up
TESTERS := $(VENV)/.testers
endif
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test bench cuda-check gpu gpu-smoke gpu-proof lint clean
.DELETE_ON_ERROR:

help:  ## list the targets (the default)
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/'
	@sed -n 's/^#   /  /p' Makefile

demo: $(EXTENSION)  ## co-train on digits; DEMO_ARGS="--epochs 1 --stages 2" OUT=folder
	$(PY) -m sparse_cocktail.cli train --recipe digits --out "$(or $(OUT),runs/digits)" --overwrite $(DEMO_ARGS)

test: $(EXTENSION) $(TESTERS)  ## run the test suite; TEST_ARGS="-k masks -n 0"
	$(PY) -m pytest $(PARALLEL) $(TEST_ARGS)

bench: $(EXTENSION)  ## time the mask ops on this CPU; BENCH_ARGS="--cases resnet50 --threads 1"
	$(PY) -m sparse_cocktail.cli bench masks $(if $(OUT),--out "$(OUT)") $(BENCH_ARGS)

cuda-check: | $(SET_UP)  ## compile the CUDA kernels for all cards and read them; needs nvcc, no GPU
	$(PY) tests/cuda_check.py $(if $(OUT),--out "$(OUT)")

# These use PYTHON with its own torch, as SYSTEM_TORCH=1 does, and do all in one go.
gpu-smoke:  ## on a machine with a GPU: build, the tests of the masks, a short bench (2 minutes)
	$(PYTHON) benchmarks/gpu.py smoke $(if $(OUT),--out "$(OUT)")

gpu:  ## build, tests, benchmarks on a GPU (9 minutes); GPU_ARGS="--skip tests --benches train serve"
	$(PYTHON) benchmarks/gpu.py full $(if $(OUT),--out "$(OUT)") $(GPU_ARGS)

gpu-proof:  ## on a machine with a GPU: every tile of the 2:4 kernels, under checkers and profiler
	$(PYTHON) benchmarks/gpu.py proof $(if $(OUT),--out "$(OUT)") $(GPU_ARGS)

lint: $(TESTERS)  ## check style and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:  ## remove what was built; .venv and runs/ stay
	rm -rf build dist *.egg-info $(EXTENSION) .pytest_cache .ruff_cache .hypothesis .benchmarks
	find sparse_cocktail kernels benchmarks tests -name __pycache__ -prune -exec rm -rf {} +

# torch goes first and alone: pip then takes a CPU build where one is configured. The package goes
# in without its extension, which has its own rule below.
$(VENV)/.set-up: pyproject.toml constraints.txt setup.py
	@echo "Setting up $(VENV). pip downloads about 0.5 GB (torch for the CPU) to 3.5 GB (torch with"
	@echo "CUDA), less what its cache holds. SYSTEM_TORCH=1 uses an installed torch instead."
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) setuptools wheel ninja
	SPARSE_COCKTAIL_NO_EXT=1 $(PIP) --no-build-isolation -e .
	@touch $@

# torchvision asks for the one torch that it was built with, and timm asks for torchvision:
# --no-deps keeps pip from replacing torch. What else they need is there by then.
$(VENV)/.testers: $(VENV)/.set-up
	$(PIP) $(TOOLS)
	$(PIP) --no-deps $(BESIDE_TORCH)
	@touch $@

$(EXTENSION): $(SOURCES) setup.py | $(SET_UP)
	$(PY) setup.py --quiet build_ext --inplace
	@touch -c $@
