# `make demo` and `make test` need Python >= 3.10 and make, nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
LOWEST := .venv-lowest
LOWEST_TESTS := $(addprefix tests/,schedulers/test_scheduler_contract.py schedulers/test_schedulers.py sampling \
	pipelines/test_calls.py pipelines/test_saving.py pipelines/test_conditional_pipelines.py \
	pipelines/test_pipeline_likelihood.py test_saved_by_earlier_versions.py hub/test_export.py \
	images/test_sources.py images/test_streaming.py metrics training/test_trainer.py)
# pillow 10.1 writes no 16-bit PGM for the first; the launched processes of the second do not end with these versions.
LOWEST_TESTS += --deselect tests/images/test_sources.py::test_sixteen_bits_of_every_byte_order_are_the_same_image
LOWEST_TESTS += --deselect tests/training/test_trainer.py::test_two_processes_train_like_one

# Every pip, those it starts to build packages included, is held to the tested versions.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-lowest test-space lint format types course docs dist test-wheel clean

help:  ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV)/.installed-dev  ## Create .venv and install everything for development.

demo: $(VENV)/.installed-training  ## Train a score model on digits and sample it in three ways, into outputs/demo.
	$(BIN)/python scripts/demo.py

test: lint types  ## Lint, check types, run the tests (PYTEST_ARGS adds options).
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

test-lowest: $(LOWEST)/.installed  ## Run a part of the tests with the lowest versions that pyproject.toml declares.
	$(LOWEST)/bin/python -m pytest -n 2 $(LOWEST_TESTS) $(PYTEST_ARGS)

test-space: .venv-space/.installed  ## Try the page (diffusers-sde space) in Chromium, at the width of a desk and of a phone.
	.venv-space/bin/python -m pytest tests/space $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev  ## Check style and formatting.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev  ## Format the code and fix what can be fixed.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed-dev  ## Check the types of src and scripts.
	$(BIN)/mypy

course: $(VENV)/.installed-dev  ## Run the course; write its outputs, pictures, Chinese code and notebooks.
	$(BIN)/python scripts/course.py

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

clean:  ## Remove the environments, caches and builds; outputs stay.
	rm -rf $(VENV) $(LOWEST) .venv-space build dist site .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# One stamp per extra: pip runs again only when the requirements change.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV); the first time this takes a few minutes."
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$*]'
	@touch $@

# The page has versions of its own: gradio takes a pillow below 13. torch comes first, so that it is the tested build.
.venv-space/.installed: pyproject.toml constraints-space.txt | $(BIN)/python
	$(PYTHON) -m venv .venv-space
	.venv-space/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	PIP_CONSTRAINT=constraints-space.txt .venv-space/bin/python -m pip install --quiet \
		-c constraints-space.txt -e '.[space]' playwright pytest
	@touch $@

# pip builds the package with a hatchling of its own, which the lowest versions do not hold.
$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	PIP_CONSTRAINT= PIP_BUILD_CONSTRAINT= $(LOWEST)/bin/python -m pip install --quiet -c constraints-lowest.txt \
		-e '.[training]' hypothesis pytest pytest-xdist scipy
	@touch $@
