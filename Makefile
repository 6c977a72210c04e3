# Each target that needs the environment makes it, and makes it again only when
# pyproject.toml or constraints.txt changed. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
WORKERS ?= 2
PYTEST := $(PY) -m pytest -n $(WORKERS) --dist worksteal
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-gpu check bench bench-full bench-gpu mutants docs clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 14

# An interpreter whose venv module lacks ensurepip still works: its own pip then puts one into the environment.
$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV) || $(PYTHON) -m venv --clear --without-pip $(VENV)
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m pip --python $(PY) install pip
	$(PY) -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP) ## train the paper's network with and without batch normalization; writes demo/
	$(VENV)/bin/batchnorm reproduce --out demo

test: $(STAMP) ## all tests but the slow ones, doctests included
	$(PYTEST)

test-all: $(STAMP) ## all tests
	$(PYTEST) -m "slow or not slow"

# These two install nothing: a machine with a GPU has an environment of its own (PYTHON=...), and perhaps no network.
test-gpu: ## the GPU kernels' tests on a GPU; needs PyTorch, Triton, numpy, pytest and hypothesis
	$(PYTHON) tests/on_gpu.py

bench-gpu: ## the GPU kernels against PyTorch and a copy, on a GPU; needs PyTorch and Triton
	PYTHONPATH=src:. $(PYTHON) -m benchmarks.gpu

check: $(STAMP) ## lint, format, types, import directions
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/test_imports.py

bench: $(STAMP) ## the short benchmark, a table of ratios
	$(PY) -m benchmarks.run

bench-full: $(STAMP) ## every case of the benchmark's registry
	$(PY) -m benchmarks.run --full

mutants: $(STAMP) ## break the code in known ways, one at a time; each must turn a test red
	$(PY) tests/mutants.py

docs: $(STAMP) ## run the examples in the documentation and follow its relative links
	$(PY) -m pytest -q tests/test_docs.py

clean: ## remove the environment and everything that is made
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
