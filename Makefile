# hasgpu: `make help` lists the targets. Everything lives in .venv; nothing is installed elsewhere.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# a client of the protocol that nobody here wrote, in an environment of its own
TRITON := $(VENV)/tritonclient
PACKAGES := proto libs/core libs/predictor libs/device libs/runtime libs/sim \
            services/gateway services/scheduler services/node-agent services/rapp services/scaler cli
SOURCES := $(foreach p,$(PACKAGES),$(wildcard $(p)/src))
TESTS ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup check format lint types imports proto proto-check docs docs-check test test-fast demo bench gpu-lab images compose-up compose-down compose-backup compose-restore compose-test clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(READY) ## make .venv with everything; the command is .venv/bin/hasgpu

$(READY): requirements.txt constraints.txt $(addsuffix /pyproject.toml,$(PACKAGES)) libs/device/src/hasgpu_device/native/gate.c
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hasgpu needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + "; set PYTHON=")'
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@echo "setup: installing the packages of requirements.txt (about 2 GB, most of it torch; a few minutes) ..."
	@$(BIN)/pip install --quiet --requirement requirements.txt --constraint constraints.txt
	@echo "setup: linking the workspace ..."
	@$(BIN)/pip install --quiet --no-build-isolation --no-deps $(foreach p,$(PACKAGES),--editable ./$(p))
	@$(BIN)/python -m hasgpu_device.native || echo "setup: going on without it"
	@touch $@
	@echo "setup: done, the command is $(BIN)/hasgpu"

check: $(READY) proto-check docs-check lint types imports ## ruff, mypy strict, import rules, generated files up to date

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy $(SOURCES) tools bench

imports: $(READY)
	$(BIN)/lint-imports

format: $(READY) ## let ruff format and mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(READY) ## generate proto/gen again
	$(BIN)/python tools/protos.py

docs: $(READY) ## write the pages and dashboards that come from the code
	$(BIN)/python tools/settings_reference.py
	$(BIN)/python tools/observability_reference.py
	$(BIN)/python -m tools.dashboards

docs-check: $(READY)
	$(BIN)/python tools/settings_reference.py --check
	$(BIN)/python tools/observability_reference.py --check
	$(BIN)/python -m tools.dashboards --check

proto-check: $(READY)
	$(BIN)/python tools/protos.py --check

$(TRITON)/.ready: constraints.txt
	@"$(PYTHON)" -m venv $(TRITON)
	@$(TRITON)/bin/pip install --quiet 'tritonclient[grpc]==2.73.0'
	@touch $@

test: $(READY) $(TRITON)/.ready ## all tests, on real brokers and real processes
	$(BIN)/pytest $(TESTS)

test-fast: $(READY) ## without those that start the whole system
	$(BIN)/pytest -m "not slow" $(TESTS)

demo: $(READY) ## deploy two models, replay a load, watch their shares; writes out/demo/
	$(BIN)/hasgpu demo --out out/demo

bench: $(READY) ## measure; JSON under bench/results/
	$(BIN)/python bench/quota.py --device cpu
	$(BIN)/python bench/quota.py --device emulated
	$(BIN)/python bench/resize.py --device cpu
	$(BIN)/python bench/resize.py --device emulated
	$(BIN)/python bench/emulated.py
	$(BIN)/python bench/gateway.py
	$(BIN)/python bench/rapp.py
	$(BIN)/python bench/rapp_service.py --json bench/results/cpu/rapp_service.json
	$(BIN)/python bench/rapp_plots.py || test $$? -eq 3
	$(BIN)/python bench/queue_order.py
	$(BIN)/python bench/metrics.py --out bench/results/cpu/metrics.json

# on a bare GPU machine any Python with torch, numpy and grpcio does; without a GPU it says so (status 3) and is content
LAB_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

gpu-lab: ## on a GPU, in 9 minutes: probe, conformance, benchmarks, a profile; LAB_PYTHON= needs torch and grpcio alone
	@$(LAB_PYTHON) tools/gpu_lab.py || test $$? -eq 3

COMPOSE ?= $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)

images: ## build the container images and print their sizes; VARIANT=cuda for GPUs
	@"$(PYTHON)" tools/compose_images.py --variant $(or $(VARIANT),cpu)

compose-up: ## the system in containers, detached; the same as `docker compose up -d` in deploy/compose
	cd deploy/compose && $(COMPOSE) up --detach

compose-down: ## end it; functions and profiles stay in their volumes
	cd deploy/compose && $(COMPOSE) down

compose-backup: ## the state of the system in containers as one file: FILE=state.tar.gz; it runs on meanwhile
	@COMPOSE="$(COMPOSE)" deploy/compose/backup.sh "$(or $(FILE),$(error name the file: make compose-backup FILE=state.tar.gz))"

compose-restore: ## that file into an installation without state: FILE=state.tar.gz
	@COMPOSE="$(COMPOSE)" deploy/compose/restore.sh "$(or $(FILE),$(error name the file: make compose-restore FILE=state.tar.gz))"

compose-test: $(READY) images ## that system through its whole life on a real engine; writes bench/results/compose.json
	HASGPU_COMPOSE_TEST=1 HASGPU_COMPOSE_RESULTS=bench/results/compose.json $(BIN)/pytest -s tests/compose

clean: ## remove .venv, caches and out/
	rm -rf $(VENV) out .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache catboost_info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
