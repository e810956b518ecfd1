# Each target sets up what it needs, from Python 3.11 or newer and make alone.
#   make demo   trains a small model in minutes and writes its report     make test   all tests
#   make lint   format, lint, types, import arrows                        make bench  what produced the numbers in the docs

SHELL := /bin/bash
PYTHON ?= python3
CACHE ?= $(HOME)/.cache/grpo-operator
UV_VERSION := 0.13.9
UV := $(CACHE)/uv-$(UV_VERSION)/bin/uv
export UV_CACHE_DIR := $(CACHE)/uv

VENV := .venv
BIN := $(VENV)/bin
# The environment is remade when the constraints change: its stamp carries their hash.
LOCK := $(shell cat constraints/cpu.txt Makefile 2>/dev/null | sha256sum | cut -c1-16)
STAMP := $(VENV)/.ready-$(LOCK)

.PHONY: demo test lint format bench generated lock clean

demo: $(STAMP)
	$(BIN)/grpo demo run

test: $(STAMP)
	$(BIN)/python -m pytest tests

lint: $(STAMP)
	$(BIN)/ruff format --check operator worker tests benchmarks
	$(BIN)/ruff check operator worker tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format operator worker tests benchmarks
	$(BIN)/ruff check --fix operator worker tests benchmarks

bench: $(STAMP)
	$(BIN)/python -m benchmarks

# Files made from the models; a test fails when they differ.
generated: $(STAMP)
	$(BIN)/grpo crd > crds/grpojobs.grpo.dev.yaml
	$(BIN)/grpo docs > docs/configuration.md

# Newest versions that pyproject.toml allows, with hashes.
lock: $(UV)
	$(UV) pip compile -q --upgrade --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	  --extra worker --extra operator --extra cpu --extra dev --extra wandb --override constraints/cpu-overrides.txt \
	  --generate-hashes --no-header --no-emit-index-url --no-annotate -o constraints/cpu.txt pyproject.toml
	$(UV) pip compile -q --upgrade --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	  --extra worker --extra operator --extra rollout --extra wandb \
	  --generate-hashes --no-header --no-emit-index-url --no-annotate -o constraints/gpu.txt pyproject.toml

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(VENV): $(STAMP)

$(STAMP): | $(UV)
	rm -rf $(VENV)
	$(UV) venv -q --python $(PYTHON) $(VENV)
	$(UV) pip sync -q --python $(BIN)/python --require-hashes constraints/cpu.txt
	$(UV) pip install -q --python $(BIN)/python --no-deps --editable .
	touch $@

$(UV):
	$(PYTHON) -m venv $(CACHE)/uv-$(UV_VERSION)
	$(CACHE)/uv-$(UV_VERSION)/bin/pip install -q --disable-pip-version-check uv==$(UV_VERSION)
