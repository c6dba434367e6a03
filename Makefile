# Two commands on a fresh machine: `make demo` and `make test`. Both install what they need into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install demo demo-clean lint types test test-all test-cluster clean

help:
	@echo "make demo      pack, pretrain, release, evaluate and report on the shipped pictures (10 minutes on 2 cores)"
	@echo "make test      lint, types and tests       make test-all  the slow tests too"
	@echo "make test-cluster   the tests on a real Slurm of four nodes on this machine (root; installs Debian's packages)"
	@echo "make install   only create $(VENV)             make demo-clean  delete what the demo made"

$(STAMP): setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "uniemox-dist needs Python 3.10 or newer; try make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing (torch and DeepSpeed are large: some minutes on a first run)"
	$(BIN)/python -m pip install --quiet -e ".[train,cluster,persons,dev]"
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

test: lint types
	$(BIN)/python -m pytest -m "not slow and not cluster"

test-all: lint types
	$(BIN)/python -m pytest -m "not cluster"

# The tests bring up a cluster of their own with tools/mini-slurm, and take it down.
test-cluster: $(STAMP)
	$(BIN)/python -m pytest -m cluster $(or $(TESTS),tests/cluster)

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
