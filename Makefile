# `make cycle` on an empty machine: installs everything and runs one full cycle on the embedded world.
PYTHON ?= python3
BIN := .venv/bin
PARAMS ?=
# Tests run in so many processes, each of one thread: tiny models gain nothing from more.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup --no-loadscope-reorder

.PHONY: install cycle up down test test-avx2 test-slow lint format

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt overrides.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --python $(BIN)/python --editable '.[hpsv2]' --group test \
	    --constraint constraints.txt --build-constraint constraints.txt --override overrides.txt --compile-bytecode
	touch $@

# One cycle, start to finish, leaving nothing running. PARAMS="--param scorer=hpsv2" is handed on.
cycle: install
	$(BIN)/rlaif cycle $(PARAMS)

# The server, its UI, a worker and the nightly schedule, kept in the background until `make down`.
up: install
	$(BIN)/rlaif up

down: install
	$(BIN)/rlaif down

test: install
	$(PYTEST)

# What networks compute, as on a processor without AVX-512: bounds must hold on any machine.
test-avx2: install
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) -m "numerical and not slow"

test-slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
