# Two commands for a newcomer: `make quickstart` and `make test`. Each sets up .venv first; `make setup` does only that.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup quickstart test test-all lint docs tiny-base lock

setup: .venv/ready

quickstart: .venv/ready
	$(BIN)/mmdora train configs/quickstart.yaml --overwrite

# One test process per core, up to four. Tests of one file stay together, because they share fixtures.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/ready
	$(BIN)/python docs/build.py

tiny-base: .venv/ready
	$(BIN)/python assets/tiny-llava/recipe.py configs/tiny_base.yaml

# The lock holds names, versions and hashes, and no URLs. uv installs torch and torchvision as a matching pair, which plain
# pip does not do on every machine. Bytecode is compiled here, once: importing torch and transformers without it takes
# 18 s of CPU more, in every process if Python may not write it.
.venv/ready: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("mmdora needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	touch $@

lock:
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --extra dev \
		--no-emit-index-url --no-annotate --no-header pyproject.toml -o requirements.lock
