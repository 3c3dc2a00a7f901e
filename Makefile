# deftx: `make help` lists the targets. Each one that needs the project installs it into .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test soak wheel ray lint type bench bench-base clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: $(STAMP)  ## create .venv with deftx, its tested pins and the development tools

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch>=2.8"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(STAMP)

demo: setup  ## pretrain a tiny encoder, train language and task SFTs, print the zero-shot table
	$(BIN)/deftx run experiment=demo

test: setup  ## run the test suite (offline, under five minutes)
	$(BIN)/python -m pytest -n 2 --dist loadfile

soak: setup  ## run the tests that take minutes (kills, several devices, the wheel in an empty environment)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m soak

wheel: setup  ## build the wheel and run it in an empty environment (part of soak)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m soak tests/test_installed.py

ray: setup  ## install ray and run a sweep through it (not in CI)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "ray>=2.40"
	$(BIN)/python -m pytest tests/test_ray.py -m ray

lint: setup  ## check style and format with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: setup  ## check types with mypy, strictly in deftx.core
	$(BIN)/mypy

bench: setup  ## time each step beside a plain implementation, on a small model (under five minutes)
	$(BIN)/python -m benchmarks

bench-base: setup  ## do the same at the size of XLM-R base (hours on two cores, 24 GB)
	$(BIN)/python -m benchmarks --shape base

clean:  ## remove .venv and tool caches; runs and the stage cache are kept
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -not -path './.venv/*' -exec rm -rf {} +
