# Each target does its own set-up: an environment is made once for each set of pins, outside the checkout, and .venv links to it.
PYTHON ?= python3
RUN := .venv/bin/python
# Two threads on two busy cores are slower than one, by far.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# One process per core, each with its own copy of the libraries in memory; timeout and markers are in pyproject.toml.
PYTEST := $(RUN) -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help environment demo test test-slow lint format types contracts notebooks colab-replica colab-links clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-15s %s\n", $$1, $$2}'

environment:  ## create or find the environment that .venv links to
	@$(PYTHON) tools/environment.py dev

demo: environment  ## run the notebooks on the built-in examples; results in runs/demo/
	@$(RUN) tools/demo.py

test: environment  ## the quick tests, a few minutes
	@$(TEST_ENV) $(PYTEST)

test-slow: environment  ## the tests that make test leaves out: slow, package index, Colab replica
	@$(TEST_ENV) $(PYTEST) -m "slow or network or replica"

lint: environment  ## style of the code and the notebooks
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

format: environment  ## put the code into the house style
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

types: environment  ## static types
	@$(RUN) -m mypy

contracts: environment  ## which layer may import which
	@.venv/bin/lint-imports

notebooks: environment  ## write the bootstrap cell into every notebook
	@$(RUN) tools/colab_links.py --sync

colab-replica:  ## build an environment with the versions of a Colab runtime
	@$(PYTHON) tools/environment.py replica

colab-links:  ## stamp the repository's address everywhere: make colab-links REPO=owner/name
	@$(PYTHON) tools/colab_links.py $(REPO)

clean:  ## remove caches and runs/, never an environment
	@rm -rf runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find utils tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
