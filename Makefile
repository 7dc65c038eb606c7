# Everything that one does with this repository. `make help` explains the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
# Installed before anything that needs it. The plain Linux package brings CUDA libraries of several GB; for a
# machine without a GPU, take the CPU build by pointing pip at PyTorch's index of CPU wheels, for example
#   PIP_EXTRA_INDEX_URL=<that index> make setup TORCH='torch==2.13.0+cpu'
TORCH ?= torch==2.13.0
WORKERS ?= 1
# GPUs that hold the model of each worker together (docs/parallel.md).
TP ?= 1
MODEL ?= smollm2-135m-instruct
DEVICE ?= cpu
# More options of `pagoda serve` for `make cluster`, as in SERVE='--dtype float32 --max-slots 32'.
SERVE ?=
# Where Prometheus listens, on 127.0.0.1.
PROMETHEUS_PORT ?= 9090
# More options of pytest for `make test`, as in PYTEST='tests/unit -k settings'.
PYTEST ?=
# More options of the runner for `make verify`, as in VERIFY='--only replay'.
VERIFY ?=

VENV := .venv
PY := $(VENV)/bin/python
# Tools of others that are run against the gateway; each has a list of pins and an environment of its own.
DOORS := aiperf guidellm lm-eval sdks
NEEDS := pyproject.toml clients/python/pyproject.toml
SERVER := -e 'clients/python[cli]' -e '.[gateway,worker,fallback,cluster]'
MYPY_ROOTS := scheduler_svc gateway_svc gpu_worker hf_backend kernels clients/python/pagoda

.PHONY: help setup dev model demo test verify lint types protos check-protos lint-protos bench-scheduler \
        client-tools clients test-clients test-doors stubs browser cluster down prometheus boards monitoring \
        clean

help: ## Explain every target (this text).
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  Variables: WORKERS=$(WORKERS) TP=$(TP) MODEL=$(MODEL) DEVICE=$(DEVICE) TORCH=$(TORCH) SERVE= PYTEST= VERIFY="

setup: $(VENV)/.setup $(VENV)/.kernels ## Make .venv, install the three services and the client, compile the CPU kernels.

$(VENV)/.setup: $(NEEDS) tools/make_venv.sh
	@echo "== 1/3 virtual environment"
	PYTHON=$(PYTHON) tools/make_venv.sh $(VENV)
	@echo "== 2/3 $(TORCH)"
	$(PY) -m pip install $(TORCH)
	@echo "== 3/3 Pagoda and what it needs"
	$(PY) -m pip install $(SERVER)
	@touch $@

# A stamp of its own: a changed kernel is compiled here, with a word, and not while a worker starts.
$(VENV)/.kernels: $(VENV)/.setup $(wildcard kernels/cpu/*.[ch]) kernels/cpu/build.py
	@echo "== CPU kernels"
	$(PY) -c 'from kernels.cpu.build import build; print(build())' || \
	  echo "warning: no CPU kernels; a CPU worker will be slow until gcc is installed" >&2
	@touch $@

dev: $(VENV)/.dev ## Install what tests, linters and type checks need, on top of `setup`.

$(VENV)/.dev: $(VENV)/.setup
	@echo "== development tools"
	$(PY) -m pip install $(SERVER) -e '.[dev]'
	@touch $@

model: setup ## Get the embedded model (SmolLM2-135M-Instruct), converted once and kept in the cache.
	@$(PY) tools/get_model.py

demo: setup model ## Start everything, ask "What is the capital of France?", print the answer, stop.
	@$(PY) tools/demo.py

test: dev model node_modules/.bin/buf .prometheus/.unpacked browser ## Run the tests that need no GPU (a fixed slice of the long ones included).
	@command -v curl > /dev/null || { apt-get update -q && apt-get install -qy curl; }
	$(PY) -m pytest -q -m "not full and not clients and not doors" $(PYTEST)

# By themselves, for they need environments of several GB that nothing else needs.
test-doors: dev model $(DOORS:%=.venv-doors/%/.installed) ## Run others' clients and benchmark tools against live services.
	$(PY) -m pytest -q -m doors tests/e2e/test_doors.py

.venv-doors/%/.installed: tests/support/doors/%.txt tools/make_venv.sh
	@echo "== $*"
	@mkdir -p .venv-doors
	PYTHON=$(PYTHON) tools/make_venv.sh .venv-doors/$*
	$(if $(filter guidellm lm-eval,$*),.venv-doors/$*/bin/python -m pip install -q $(TORCH))
	.venv-doors/$*/bin/python -m pip install -q -r $<
	@touch $@

client-tools: ## Install what clients/ is built with, where it is missing (Debian's packages; by root).
	tools/get_client_tools.sh

clients: client-tools ## Build the clients in TypeScript, Go, C++ and Java.
	$(MAKE) -C clients

# By themselves, for they need compilers that nothing else needs.
test-clients: dev model clients node_modules/.bin/buf ## Run these clients against the live services.
	$(PY) -m pytest -q -m clients tests/e2e/test_clients.py

stubs: client-tools node_modules/.bin/buf ## Generate stubs for more languages into build/stubs (buf.gen.yaml).
	node_modules/.bin/buf generate

verify: dev model node_modules/.bin/buf .prometheus/.unpacked ## Run every row of the acceptance table in full; resumable; figures in .verify/.
	$(PY) tools/verify.py $(VERIFY)

lint: dev ## Check style (ruff).
	$(PY) -m ruff check .

types: dev ## Check types (mypy; strict on scheduler_svc).
	$(PY) -m mypy $(MYPY_ROOTS)

protos: ## Generate the Python stubs from protos/ again.
	tools/gen_protos.sh

check-protos: ## Fail when the checked-in stubs differ from what protos/ gives.
	tools/gen_protos.sh --check

lint-protos: node_modules/.bin/buf ## Check protos/ (buf, its STANDARD rules).
	node_modules/.bin/buf lint

node_modules/.bin/buf: package.json tools/get_buf.sh
	tools/get_buf.sh
	@touch $@

browser: ## Install what tests of the page at /ui need, where it is missing (Debian's chromium; by root).
	@tools/get_chromium.sh

bench-scheduler: dev ## Measure what the scheduler costs for each step.
	$(PY) -m benchmarks.scheduler

cluster: setup ## Run a local cluster in the foreground: WORKERS=n TP=n MODEL=name|path DEVICE=cpu|cuda.
	@if [ "$(MODEL)" = smollm2-135m-instruct ]; then $(PY) tools/get_model.py; fi
	@$(VENV)/bin/pagoda serve --run-dir .run --workers $(WORKERS) --tensor-parallel $(TP) --model $(MODEL) --device $(DEVICE) $(SERVE)

down: ## Stop the cluster that `make cluster` runs, from another terminal.
	@$(VENV)/bin/pagoda down --run-dir .run

prometheus: .prometheus/.unpacked ## Unpack Debian's Prometheus in .prometheus; installs and starts nothing.

.prometheus/.unpacked: tools/get_prometheus.sh
	tools/get_prometheus.sh
	@touch $@

boards: dev ## Write Grafana's boards in deploy/grafana from tools/boards.
	$(PY) -m tools.boards

monitoring: setup ## Run Prometheus against the local cluster, until Ctrl-C: PROMETHEUS_PORT=9090.
	@$(PY) tools/monitoring.py --run-dir .run --port $(PROMETHEUS_PORT) --workers $(WORKERS)

clean: ## Remove what was built and installed here; the model cache stays.
	rm -rf $(VENV) .venv-tools .venv-doors .prometheus node_modules .run .verify .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf *.egg-info clients/python/*.egg-info build
	$(MAKE) -C clients clean
