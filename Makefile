# Every target does all the set-up it needs; `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.make-setup
DOCS := $(VENV)/.make-docs
LINT := build/lint
SHELL := /bin/bash

.DEFAULT_GOAL := help
.PHONY: help setup demo test quick lint wheel docs format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "%-8s %s\n", $$1, $$2 }' Makefile

# The build backend comes first, so that it is pinned too: isolated builds would fetch one of their own.
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/*.cpp csrc/*.h)
	@$(PYTHON) -c 'import sys; sys.exit("$(PYTHON) is Python %d.%d; stepgraph needs 3.10 or newer: make PYTHON=..." % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt 'setuptools>=77'
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[test,lint,onnx,emoji]'
	@touch $@

setup: $(STAMP) ## Create .venv with the pinned versions and the package, editable

demo: $(STAMP) ## Run the demonstration
	$(BIN)/stepgraph demo

test: lint ## Lint, then run all tests that need no GPU, and list the 20 slowest
	$(BIN)/python -m pytest -n auto --dist worksteal --durations=20

quick: $(STAMP) ## Run the tests that are not marked slow, without lint
	$(BIN)/python -m pytest -n auto --dist worksteal -m 'not gpu and not slow'

lint: wheel ## Check format, lint rules, import direction and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/ruff check --config core/cli/ruff.toml core/__init__.py core/cli
	MYPYPATH=$(LINT)/site $(BIN)/mypy --strict -p stepgraph

# mypy and the API reference cannot follow the editable install's mapped folders, so they read the package as users get it: the
# wheel, which needs no native library for that.
wheel: $(STAMP)
	@rm -rf $(LINT) build/lib build/lib.* build/bdist.*
	CC=/bin/false CXX=/bin/false $(BIN)/python -m pip wheel -q --disable-pip-version-check --no-build-isolation --no-deps --no-index -w $(LINT)/wheel .
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-index --target $(LINT)/site $(LINT)/wheel/*.whl

docs: wheel $(DOCS) ## Build the site from docs/ and the docstrings, in build/site; a dead link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[docs]'
	@touch $@

format: $(STAMP) ## Format the code and apply the lint rules' safe fixes
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean: ## Remove what was built; .venv stays
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
