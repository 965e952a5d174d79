# comfyui-temporal: `make demo` and `make test` do everything on a machine with Python >= 3.11, git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup lint types imports test clean

help: ## list every target
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## make the venv and install the locked dependencies

$(VENV)/.ready: requirements.lock
	@test -x $(BIN)/uv || ($(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet --disable-pip-version-check uv)
	@$(BIN)/uv pip sync --quiet --require-hashes --python $(BIN)/python requirements.lock
	@touch $@

lint: setup ## ruff: style and format
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: setup ## mypy --strict
	@$(BIN)/mypy

imports: setup ## who may import whom
	@$(BIN)/lint-imports

test: setup lint types imports ## lint, types, import rules, schemas, tests
	@$(BIN)/python -m pytest

clean: ## remove the venv and what the stack left
	rm -rf $(VENV) .run
