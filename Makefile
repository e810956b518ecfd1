# Each target sets up what it needs, from Python 3.11 or newer and make alone.
#   make demo   trains a small model in minutes and writes its report     make test   all tests
#   make lint   format, lint, types, imports, dead code                   make bench  what produced the numbers in the docs
#   make observe   Prometheus beside a run on this machine (grpo run --metrics 9464), with the alerts
#   make gpu-smoke   what only a GPU can show, on a machine that has one
#   make e2e    a real Kubernetes node, images, chart, jobs (root)        make cluster  leaves one running to play with

SHELL := /bin/bash
PYTHON ?= python3
CACHE ?= $(HOME)/.cache/grpo-operator
UV_VERSION := 0.13.9
UV := $(CACHE)/uv-$(UV_VERSION)/bin/uv
export UV_CACHE_DIR := $(CACHE)/uv
export CACHE

VENV := .venv
BIN := $(VENV)/bin
# The environment is remade when the constraints change: its stamp carries their hash. Its bytecode is compiled once, here: where Python may
# not write any (PYTHONDONTWRITEBYTECODE), each process of a run would compile torch and vLLM again, for 15 to 30 s.
LOCK := $(shell cat constraints/cpu.txt Makefile 2>/dev/null | sha256sum | cut -c1-16)
STAMP := $(VENV)/.ready-$(LOCK)

SOURCES := operator worker tests benchmarks e2e charts
LOCK_FLAGS := --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-header --no-emit-index-url --no-annotate

.PHONY: demo test e2e cluster cluster-down lint format bench observe gpu-smoke generated lock clean

demo: $(STAMP)
	$(BIN)/grpo demo run

test: $(STAMP)
	$(BIN)/python -m pytest tests --durations 20

# The first time some minutes to build Kubernetes and the images; kept in $(CACHE).
e2e: $(STAMP)
	$(BIN)/python -m pytest e2e

cluster: $(STAMP)
	$(BIN)/python -m e2e.cluster up

cluster-down: $(STAMP)
	$(BIN)/python -m e2e.cluster down

lint: $(STAMP)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check --no-cache $(SOURCES)
	$(BIN)/mypy
	$(BIN)/mypy --explicit-package-bases -p e2e.cluster -p e2e.scenarios -p charts.dashboards -p benchmarks
	$(BIN)/lint-imports
	$(BIN)/vulture

format: $(STAMP)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

bench: $(STAMP)
	$(BIN)/python -m benchmarks

observe:
	@command -v prometheus >/dev/null || { echo "There is no prometheus here: apt-get install prometheus, or https://prometheus.io/download" >&2; exit 1; }
	prometheus --config.file=examples/observe/prometheus.yaml --storage.tsdb.path=$(CACHE)/observe --web.listen-address=127.0.0.1:9090

# With the environment that the GPU machine has (docs/gpu.md), not the one of this file: PYTHON=python3 make gpu-smoke
gpu-smoke:
	PYTHONPATH=worker:operator:.:$$PYTHONPATH $(PYTHON) -m pytest $(wildcard tests/*/test_*_gpu.py) tests/weightsync/test_shared_memory.py -rA --tb=short --show-capture=no

# Files made from the models; a test fails when they differ.
generated: $(STAMP)
	$(BIN)/grpo crd > crds/grpojobs.grpo.dev.yaml
	$(BIN)/grpo docs > docs/configuration.md
	$(BIN)/grpo docs metrics > docs/metrics.md
	$(BIN)/python -m charts.dashboards
	cp crds/grpojobs.grpo.dev.yaml charts/grpo-operator/files/crds/

# Newest versions that pyproject.toml allows, with hashes.
lock: $(UV)
	$(UV) pip compile -q --upgrade $(LOCK_FLAGS) --extra worker --extra operator --extra cpu --extra dev --extra wandb \
	  --override constraints/cpu-overrides.txt -o constraints/cpu.txt pyproject.toml
	$(UV) pip compile -q --upgrade $(LOCK_FLAGS) --extra worker --extra operator --extra rollout --extra wandb -o constraints/gpu.txt pyproject.toml
	printf 'hatchling>=1.27\nuv==$(UV_VERSION)\n' | $(UV) pip compile -q --upgrade $(LOCK_FLAGS) -o constraints/build.txt -
	$(UV) pip compile -q $(LOCK_FLAGS) --extra operator -c constraints/cpu.txt -o constraints/operator.txt pyproject.toml
	$(UV) pip compile -q $(LOCK_FLAGS) --extra worker --extra cpu --extra wandb --override constraints/cpu-overrides.txt \
	  -c constraints/cpu.txt -o constraints/worker-cpu.txt pyproject.toml
	$(UV) pip compile -q $(LOCK_FLAGS) --extra worker --extra rollout --extra wandb -c constraints/gpu.txt -o constraints/worker-cuda.txt pyproject.toml

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(VENV): $(STAMP)

$(STAMP): | $(UV)
	rm -rf $(VENV)
	$(UV) venv -q --python $(PYTHON) $(VENV)
	$(UV) pip sync -q --python $(BIN)/python --require-hashes --compile-bytecode constraints/cpu.txt
	$(UV) pip install -q --python $(BIN)/python --no-deps --editable .
	touch $@

$(UV):
	$(PYTHON) -m venv $(CACHE)/uv-$(UV_VERSION)
	$(CACHE)/uv-$(UV_VERSION)/bin/pip install -q --disable-pip-version-check uv==$(UV_VERSION)
