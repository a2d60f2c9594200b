# Everything a developer runs. VENV=path uses (or makes) another environment; an environment that
# already has a torch keeps it.
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
BUILD ?= build/cpp
GPU_OUT ?= build/gpu
PAGES ?= build/docs
# Modules with a page of the API; the package comes first.
DOCUMENTED = lstmx $(addprefix lstmx.,modules ops reference dropout diagnostics text) \
             $(addprefix lstmx.text.,awd_lstm batches chapter checkpoints classifier corpus fit generation \
             human_numbers interchange memory optimisers regularisers storage tokenizer training)

bin := $(abspath $(VENV))/bin
python := $(bin)/python
sources := $(shell find csrc -type f) setup.py pyproject.toml
cpp_files := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo test check bench docs fuzz mutate lint format pytest slow ctest objects-ctest sanitize gpu cuda-build clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.text  ## train the chapter's AWD-LSTM, compare it with the book, let it count
	$(bin)/lstmx chapter --models 7 --plot build/demo.png --checkpoint build/demo

test: pytest objects-ctest lint  ## what must be green before a change lands

check: slow fuzz mutate sanitize  ## what takes longer: slow tests, fuzz, mutations, sanitizers

pytest: $(VENV)/.dev
	LSTMX_STRICT_SKIPS=1 $(bin)/pytest -q -m "not slow and not gpu" --benchmark-disable

slow: $(VENV)/.dev
	LSTMX_STRICT_SKIPS=1 $(bin)/pytest -q -m "slow and not gpu"

mutate: $(VENV)/.dev  ## break each gradient term and the mask; every break must fail a test
	$(python) tests/mutate.py

docs: $(VENV)/.dev  ## the pages of the API, from the docstrings, in build/docs
	$(python) -W error -m pdoc -d google -o $(PAGES) $(DOCUMENTED)

fuzz: $(VENV)/.dev  ## 10,000 random calls of our modules and torch's
	OMP_NUM_THREADS=1 $(python) tests/fuzz.py

# The C++ tests of the very objects that Python loads.
objects-ctest: $(VENV)/.dev
	$(MAKE) ctest BUILD=build/objects CMAKE_FLAGS=-DLSTMX_OBJECTS=$(abspath build/editable)

ctest:  ## the C++ tests, without torch
	cmake -S . -B $(BUILD) -DCMAKE_BUILD_TYPE=Release $(CMAKE_FLAGS)
	cmake --build $(BUILD) -j 2
	ctest --test-dir $(BUILD) --output-on-failure

sanitize:  ## the C++ tests under AddressSanitizer with UBSan, then under ThreadSanitizer
	$(MAKE) ctest BUILD=build/asan CMAKE_FLAGS=-DLSTMX_SANITIZE=address,undefined
	$(MAKE) ctest BUILD=build/tsan CMAKE_FLAGS=-DLSTMX_SANITIZE=thread

lint: $(VENV)/.dev  ## ruff, clang-format, mypy
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/clang-format --dry-run -Werror $(cpp_files)
	$(bin)/mypy

format: $(VENV)/.dev  ## format all code in place
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
	$(bin)/clang-format -i $(cpp_files)

bench: $(VENV)/.dev  ## time lstmx against torch.nn; BENCH="--cell gru --resume": a part, go on
	$(python) -m benchmarks --json build/bench.json --plot build/bench.png $(BENCH)

gpu:  ## on a machine with a GPU: build, test, benchmark
	scripts/gpu_check.sh $(GPU_OUT)

cuda-build:  ## compile with CUDA where no GPU is: downloads a CUDA build of torch
	scripts/cuda_build.sh build/cuda

clean:  ## remove everything that was built
	rm -rf build dist lstmx/*.so *.egg-info $(VENV)/.text $(VENV)/.dev

# ---- Environments: a stamp for each set of packages, newer than the sources it was built from.

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(VENV)/bin/python
	$(python) -c "import torch" 2>/dev/null || $(bin)/pip install -q "$(TORCH)"
	$(bin)/pip install -q "setuptools>=77" wheel ninja pybind11
	touch $@

$(VENV)/.text: $(VENV)/.torch $(sources)
	LSTMX_WERROR=1 $(bin)/pip install -q --no-build-isolation -e '.[text]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(sources)
	LSTMX_WERROR=1 $(bin)/pip install -q --no-build-isolation -e '.[dev]'
	touch $@ $(VENV)/.text
