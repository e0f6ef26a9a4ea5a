# Every target does its own set-up: a virtual environment in .venv, renewed when the requirements change.
# Needs Python >= 3.10 (choose one with `make PYTHON=python3.12 test`) and make.

PYTHON ?= python3
VENV ?= .venv
# Test processes; "auto" is one per core.
WORKERS ?= auto
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
REQUIREMENTS := pyproject.toml constraints.txt

.PHONY: help demo test lint types format bench wheel clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    train registers for the packaged model, and show what they change"
	@echo "make test    run the tests (PYTEST_ARGS='-k layer' for some of them, WORKERS=1 for one process)"
	@echo "make lint    check style (ruff)"
	@echo "make types   check types (mypy --strict)"
	@echo "make format  rewrite the sources in the project's style"
	@echo "make bench   measure the overhead (BENCH_ARGS='--models s'; hours without it)"
	@echo "make wheel   build the wheel into dist/"
	@echo "make clean   remove the environment and everything that was built"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is missing or older than Python 3.10; choose another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }

# One stamp for each set of extras; it is older than a requirement that changed.
$(VENV)/.installed-demo: $(REQUIREMENTS) | $(BIN)/python
	@echo "installing register-adapter[demo] into $(VENV)"
	@$(PIP_INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.installed-dev: $(REQUIREMENTS) | $(BIN)/python
	@echo "installing register-adapter[dev] into $(VENV)"
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.installed-demo

demo: $(VENV)/.installed-demo
	$(BIN)/register-adapter demo $(DEMO_ARGS)

# One thread a process: the processes already take the cores. No test needs a network beyond loopback.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/overhead.py $(BENCH_ARGS)

wheel: $(VENV)/.installed-dev
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
