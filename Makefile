# make demo | test | lint | format | bench | peers | gpu-check | clean | distclean
# Everything is installed into .venv, from requirements/tested.txt (peers: into build/peers, from
# benchmarks/peers/requirements); nothing outside this folder changes.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# after .venv exists: its tools first, cmake's wheel among them
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

CXX_SOURCES := $(shell find kernels -name '*.cpp' -o -name '*.h')
BUILD_FILES := $(CXX_SOURCES) CMakeLists.txt kernels/CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test lint format bench peers gpu-check clean distclean
.DELETE_ON_ERROR:

# optimizes the three bundled checkpoints; writes report.json, report.md, report.png
demo: $(VENV)/.installed
	$(VENV)/bin/python benchmarks/demo.py $(ARGS)

# a process a core, four at most: each takes some gigabytes. ARGS goes to pytest: make test ARGS="tests/ops -k int4"
WORKERS ?= auto
test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist worksteal $(ARGS)

lint: $(VENV)/.dependencies
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy --strict
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(VENV)/.dependencies
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_SOURCES)

# kernels against the machine's ceilings; ARGS goes to `llmopt kernels`
bench: $(VENV)/.installed
	$(VENV)/bin/llmopt kernels $(ARGS)

# llmopt beside other engines, each in an environment of its own; the first time takes many minutes. ARGS goes to
# benchmarks/peers; IK_BENCH=path/to/llama-bench adds an ik_llama.cpp that you have built
peers: $(VENV)/.installed
	$(VENV)/bin/python -m benchmarks.peers $(if $(IK_BENCH),--ik-bench "$(IK_BENCH)") $(ARGS)

# everything that runs on an NVIDIA GPU, checked and then timed; with the python that has torch for CUDA (GPU_PYTHON), for
# .venv has the CPU build. ARGS goes to benchmarks/gpu_check: --quick, --interpret
GPU_PYTHON ?= $(PYTHON)
gpu-check:
	$(GPU_PYTHON) -m benchmarks.gpu_check $(ARGS)

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.dependencies: requirements/tested.txt requirements/cmake.txt | $(VENV)/bin/pip
	$(PIP) install --quiet -r requirements/tested.txt
	command -v cmake >/dev/null || $(PIP) install --quiet -r requirements/cmake.txt
	touch $@

$(VENV)/.installed: $(VENV)/.dependencies $(BUILD_FILES)
	$(PIP) install --quiet --no-build-isolation --no-deps --editable .
	@if test -f llmopt/lib/libllmopt_kernels.so; then touch $@; \
	else echo "no C++ compiler: llmopt runs on PyTorch alone; install g++ and run make again"; fi

clean:
	rm -rf build dist *.egg-info llmopt/lib $(VENV)/.installed report.json report.md report.png
	rm -rf .pytest_cache .mypy_cache .ruff_cache

distclean: clean
	rm -rf $(VENV)
