# `make demo` and `make test` need Python >= 3.10 and make, nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=

# Every pip, those it starts to build packages included, is held to the tested versions.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint format types docs dist test-wheel clean

help:  ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV)/.installed-dev  ## Create .venv and install everything for development.

demo: $(VENV)/.installed-training  ## Train a score model on digits and sample it in three ways, into outputs/demo.
	$(BIN)/python scripts/demo.py

test: lint types  ## Lint, check types, run the tests (PYTEST_ARGS adds options).
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev  ## Check style and formatting.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev  ## Format the code and fix what can be fixed.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed-dev  ## Check the types of src and scripts.
	$(BIN)/mypy

docs: $(VENV)/.installed-dev $(VENV)/.installed-docs  ## Run the code of the pages and build the site into site/.
	$(BIN)/python -m pytest -q -n 2 tests/test_guides.py tests/test_gallery.py \
		tests/test_extending.py tests/test_course.py tests/test_site.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

dist: $(VENV)/.installed-dev  ## Build the source archive and the wheel into dist/.
	rm -rf dist
	$(BIN)/python -m hatchling build

test-wheel: dist  ## Install the wheel into an empty environment and try it there.
	rm -rf build/empty
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install --quiet dist/*.whl
	cd build && empty/bin/python ../scripts/check_installed.py ../src

clean:  ## Remove .venv, caches and builds; outputs stay.
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# One stamp per extra: pip runs again only when the requirements change.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV); the first time this takes a few minutes."
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$*]'
	@touch $@
