# comfyui-temporal: `make demo` and `make test` do everything on a machine with Python >= 3.11, git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# DBOS is measured beside us. What it needs forbids newer versions of other packages, so it has a venv of its own.
BENCH := .venv-bench
# The auditors' own dependencies are no part of ours.
AUDIT := .venv-audit
STACK := $(BIN)/python -m local_stack
OWN := $(if $(COMFYUI),--comfyui $(COMFYUI)) $(if $(CREDITS),--credits $(CREDITS))
PACE := $(if $(SPEED),--speed $(SPEED)) $(OWN) $(if $(PROFILE),--credits-profile $(PROFILE))
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Hundreds of processes start here: without bytecode each compiles the whole tree again.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup demo up down status env logs test test-long test-all test-comfyui test-containers simulate mutation kill-points soak bench screenshots first-minutes audit lint types imports schemas pytest pytest-long pytest-all format lock clean

help: ## list every target
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## make the venv and install the locked dependencies
	@:

$(VENV)/.ready: requirements-dev.lock Makefile
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed: make PYTHON=/path/to/it") if sys.version_info < (3, 11) else 0'
	@test -x $(BIN)/uv || { echo "setting up $(VENV) ..."; $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet --disable-pip-version-check uv; }
	@$(BIN)/uv pip sync --quiet --compile-bytecode --require-hashes --python $(BIN)/python requirements-dev.lock
	@printf '#!/bin/sh\nexec "%s/python" "%s/starter.py" "$$@"\n' "$(CURDIR)/$(BIN)" "$(CURDIR)" > $(BIN)/comfyui-tasks
	@chmod +x $(BIN)/comfyui-tasks
	@touch $@

demo: setup ## one image and one training task, start to finish (SPEED=100, COMFYUI=http://…, CREDITS=http://…, PROFILE=field)
	@$(STACK) demo $(PACE)

up: setup ## start the local stack and leave it running (SPEED=100, COMFYUI=http://…, CREDITS=http://…, PROFILE=field)
	@$(STACK) up $(PACE)

down: setup ## end the local stack
	@$(STACK) down

status: setup ## what runs, and where
	@$(STACK) status

env: setup ## what a shell needs to know of the stack, to be evaluated
	@$(STACK) env

logs: setup ## follow the local stack's logs
	@$(STACK) logs

# Prints how long a part took; $(1) is its name, $(2) its command.
define timed
	@echo "== $(1)"; began=$$(date +%s); $(2); code=$$?; echo "== $(1): $$(($$(date +%s) - began)) s"; exit $$code
endef

test: lint types imports schemas pytest ## all checks and most tests, in about six minutes

test-long: pytest-long ## the tests that take a second each and more: outages, kills, fleets, whole pages (PART=1/4)

test-all: lint types imports schemas pytest-all ## every test, the slow ones too

test-comfyui: setup ## against a real ComfyUI that nobody else uses (COMFYUI=http://127.0.0.1:8188), or two (COMFYUI_2=…)
	@test -n "$(COMFYUI)" || { echo "say which: make test-comfyui COMFYUI=http://127.0.0.1:8188"; exit 2; }
	@COMFYUI="$(COMFYUI)" RESTART="$(RESTART)" COMFYUI_2="$(COMFYUI_2)" KILL_2="$(KILL_2)" START_2="$(START_2)" \
		$(BIN)/python -m pytest tests/bridge/real

test-containers: setup ## builds the image and runs docker-compose.yml; makes an engine where root and Debian allow (FOLDER=/tmp/…)
	@$(BIN)/python -m proof.containers $(if $(FOLDER),--folder $(FOLDER))

lint: setup ## ruff: style and format
	$(call timed,lint,$(BIN)/ruff check . && $(BIN)/ruff format --check .)

types: setup ## mypy --strict
	$(call timed,types,$(BIN)/mypy)

imports: setup ## who may import whom
	$(call timed,imports,$(BIN)/lint-imports)

schemas: setup ## whether docs/schemas and docs/openapi.json are what the code says
	$(call timed,schemas,$(BIN)/python -m comfyui_temporal.contracts.schemas --check && $(BIN)/python -m gateway.openapi_export --check)

# Processes with servers of their own; most tests wait for a server, so two for each processor are not too many.
SIDE_BY_SIDE := -n 4 --dist loadfile --no-loadscope-reorder

pytest: setup
	$(call timed,tests,$(BIN)/python -m pytest -m "not slow and not long" $(SIDE_BY_SIDE))
	@echo "left out: longer tests, by make test-long, and slow ones, by make test-all"

pytest-long: setup
	$(call timed,longer tests,$(BIN)/python -m pytest -m "long and not slow" $(if $(PART),--part $(PART)) $(SIDE_BY_SIDE))

pytest-all: setup $(BENCH)/.ready
	$(call timed,tests,$(BIN)/python -m pytest $(SIDE_BY_SIDE))
	$(call timed,flows with every callback a signal,$(BIN)/python -m pytest tests/workflows -m "not slow" --signals $(SIDE_BY_SIDE))
	$(call timed,tests of the benchmarks,$(BENCH)/bin/python -m pytest tests/benchmarks)

simulate: setup ## both workflows by seeds, without a server (SEEDS=10000 PROFILE=both)
	@$(BIN)/python -m proof.simulation --seeds $(or $(SEEDS),1000) $(if $(PROFILE),--profile $(PROFILE))

mutation: setup ## which small mistakes neither simulation nor tests see (ONLY=workflows/stop.py, READ=1 SAMPLE=60 SEED=1, SEEDS=1200)
	@$(BIN)/python -m proof.mutation $(if $(READ),--read) $(if $(ONLY),--only $(ONLY)) $(if $(SAMPLE),--sample $(SAMPLE)) $(if $(SEED),--seed $(SEED)) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(TESTS),--tests $(TESTS))

kill-points: setup ## the whole stack struck at every instant of both flows (ONLY="image: commit" KINDS=worker-killed,… PROFILE=field)
	@$(BIN)/python -m proof.kill_points $(if $(PROFILE),--profile $(PROFILE)) $(if $(ONLY),--only "$(ONLY)") $(if $(KINDS),--kinds $(KINDS)) $(if $(WITHIN),--within $(WITHIN))

screenshots: setup ## the live page's pictures for README and docs/page.md (needs Chromium)
	@mkdir -p docs/images && SCREENSHOTS=docs/images $(BIN)/python -m pytest -q tests/page/test_pictures.py

first-minutes: setup ## the README on a fresh clone, timed: docs/first-ten-minutes.md
	@$(BIN)/python -m proof.first_minutes --out docs/first-ten-minutes.md

soak: setup ## tasks under random faults on a whole stack (TASKS=10000 SEED=1 PROFILE=field, RESUME=1)
	@$(BIN)/python -m proof.soak $(if $(PROFILE),--profile $(PROFILE)) $(if $(TASKS),--tasks $(TASKS)) $(if $(SEED),--seed $(SEED)) $(if $(RESUME),--resume)

$(BENCH)/.ready: requirements-bench.lock | setup
	@test -x $(BENCH)/bin/python || $(PYTHON) -m venv --without-pip $(BENCH)
	@$(BIN)/uv pip sync --quiet --compile-bytecode --require-hashes --python $(BENCH)/bin/python requirements-bench.lock
	@touch $@

bench: $(BENCH)/.ready ## figures and ratios on this machine, as a table and as JSON (QUICK=1, ONLY=waits)
	@PATH="$(CURDIR)/$(BENCH)/bin:$$PATH" $(BENCH)/bin/python -m proof.benchmarks $(if $(QUICK),--quick) $(if $(ONLY),--only $(ONLY))

$(AUDIT)/.ready: Makefile | setup
	@test -x $(AUDIT)/bin/python || $(PYTHON) -m venv --without-pip $(AUDIT)
	@$(BIN)/uv pip install --quiet --python $(AUDIT)/bin/python pip-audit==2.10.1 cyclonedx-bom==7.5.0
	@touch $@

audit: $(AUDIT)/.ready ## known vulnerabilities of the locks, and an SBOM: dist/sbom.json (SERVICE="--service osv"); 3: no database
	@mkdir -p dist
	@$(AUDIT)/bin/cyclonedx-py requirements requirements.lock --pyproject pyproject.toml --output-reproducible --of JSON -o dist/sbom.json
	@$(BIN)/python -m proof.lock_audit $(AUDIT)/bin/pip-audit $(SERVICE)

format: setup ## ruff: mend style and format
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

# Each lock takes the versions of the production lock where it has them.
LOCK := $(BIN)/uv pip compile --quiet --universal --generate-hashes --no-annotate --no-header --python-version 3.11 \
	--upgrade pyproject.toml --extra cli

lock: setup ## lock the newest dependencies that pyproject.toml allows: for production (with traces: otel), development, benchmarks
	@$(LOCK) --group server --output-file requirements.lock
	@$(LOCK) --extra otel --group server --constraint requirements.lock --output-file requirements-otel.lock
	@$(LOCK) --extra otel --group dev --constraint requirements.lock --output-file requirements-dev.lock
	@$(LOCK) --group bench --constraint requirements.lock --output-file requirements-bench.lock

clean: ## end the stack; remove the venvs and everything that the stack kept
	@test ! -x $(BIN)/python || test ! -d .run || $(STACK) down
	rm -rf $(VENV) $(BENCH) $(AUDIT) .run
