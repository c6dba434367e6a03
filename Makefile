# Two commands on a fresh machine: `make demo` and `make test`. Both install what they need into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := train,cluster,persons,dev
# Tests run on all cores; a file's tests stay together, because they share what the file made.
# One thread a process: ranks and test processes share the cores.
JOBS ?= auto
# GPUs are hidden: `make test` gives the same on every machine, and its ranks outnumber the GPUs of most.
PYTEST := CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile
# Unit tests of the packages that import without torch, but for those that kill packs and run batch scripts.
LIGHT := $(addprefix tests/unit/,test_imports.py core config scheduler runs launch shards/format shards/edit shards/inspect shards/sources)
WITH_TORCH := $(addprefix tests/unit/launch/,test_plan_memory_parts.py test_plan_teacher.py)

.PHONY: help install demo demo-clean lint types check test test-all test-gpu test-latest test-cluster clean

help:
	@echo "make demo          pack, pretrain, release, evaluate and report on the shipped pictures (10 minutes on 2 cores)"
	@echo "make check         lint, types and the quick torch-free unit tests (a minute on 2 quiet cores)"
	@echo "make test          lint, types and tests"
	@echo "make test-all      the slow tests too"
	@echo "make test-gpu      the tests that need a GPU; with SHORT=1 only those that take seconds"
	@echo "make test-latest   the tests with the newest versions that setup.py allows, in an environment of their own"
	@echo "make test-cluster  the tests on a real Slurm of four nodes on this machine (root; installs Debian packages)"
	@echo "make install       only create $(VENV), with the versions in constraints.txt"
	@echo "make demo-clean    delete what the demo made"

$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "uniemox-dist needs Python 3.10 or newer; try make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing (torch and DeepSpeed are large: some minutes on a first run)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $(STAMP)

install: $(STAMP)

demo: $(STAMP)
	@$(BIN)/python tools/demo.py

demo-clean:
	rm -rf demo

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

check: lint types
	$(PYTEST) -m "not long and not slow and not cluster" $(LIGHT) $(addprefix --ignore=,$(WITH_TORCH))

test: lint types
	$(PYTEST) -m "not slow and not cluster"

test-all: lint types
	$(PYTEST) -m "not cluster"

# Each test has its own ranks on the GPUs, so tests can run at the same time.
test-gpu: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(or $(GPU_JOBS),4) -rs -m "gpu$(if $(SHORT), and not slow)" tests/gpu

# Without constraints.txt: shows whether the newest releases of the dependencies still work.
test-latest:
	$(PYTHON) -m venv --clear .venv-latest
	.venv-latest/bin/python -m pip install --quiet --upgrade pip
	.venv-latest/bin/python -m pip install --quiet -e ".[$(EXTRAS)]"
	OMP_NUM_THREADS=1 .venv-latest/bin/python -m pytest -n $(JOBS) --dist loadfile -m "not slow and not cluster"

# The tests bring up a cluster of their own with tools/mini-slurm, and take it down. One at a time.
test-cluster: $(STAMP)
	$(BIN)/python -m pytest -m cluster $(or $(TESTS),tests/cluster)

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .venv-latest
