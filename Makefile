# Every target does its own set-up: a virtual environment in .venv, renewed when the requirements change.
# Needs Python >= 3.10 (choose one with `make PYTHON=python3.12 test`) and make.

PYTHON ?= python3
VENV ?= .venv
# Versions to install with, and what `make test` needs beside the package; `make test-oldest` has others.
CONSTRAINTS ?= constraints.txt
TEST_EXTRA ?= dev
OLDEST_PYTHON ?= $(or $(shell python3.10 -c 'print("python3.10")' 2>/dev/null),$(PYTHON))
# Test processes; "auto" is one per core.
WORKERS ?= auto
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
RESULTS_ARGS ?=

BIN := $(VENV)/bin
# Python compiles what it imports; pip would compile every file of every package.
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-compile --quiet --constraint $(CONSTRAINTS)
REQUIREMENTS := pyproject.toml $(CONSTRAINTS)

# So what a first process compiles must stay: with this set, every process would compile for 25 seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-fast test-oldest test-gpu test-deepspeed lint types format families docs bench results wheel clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    study two packaged models with artifacts: what repairs them, and at what cost"
	@echo "make test    run the tests (PYTEST_ARGS='-k layer' for some of them, WORKERS=1 for one process)"
	@echo "make test-fast  one case of each test, without the slow ones: under two minutes"
	@echo "make test-oldest  the same with the oldest versions that are supported (docs/versions.md)"
	@echo "make test-gpu   the tests of a CUDA device, which the others leave alone"
	@echo "make test-deepspeed  the tests of DeepSpeed, which the others skip because it is not installed"
	@echo "make lint    check style (ruff) and spelling (codespell)"
	@echo "make types   check types (mypy --strict)"
	@echo "make format  rewrite the sources in the project's style"
	@echo "make families  renew the tables of supported models in README.md and docs/families.md"
	@echo "make docs    build the documentation into site/; a broken link is an error"
	@echo "make bench   measure the overhead (BENCH_ARGS='--models s'; hours without it)"
	@echo "make results  compute a part of the results again, compare, and make all tables and figures (ten minutes)"
	@echo "make wheel   build the wheel into dist/"
	@echo "make clean   remove the environment and everything that was built"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is missing or older than Python 3.10; choose another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }

# One stamp per extra; it is older than a requirement that changed. The extras dev and test contain demo.
$(VENV)/.installed-%: $(REQUIREMENTS) | $(BIN)/python
	@echo "installing register-adapter[$*] into $(VENV)"
	@$(PIP_INSTALL) -e '.[$*]'
	@touch $@ $(VENV)/.installed-demo

# The extra docs does not contain demo.
$(VENV)/.installed-docs: $(REQUIREMENTS) | $(BIN)/python
	@echo "installing register-adapter[docs] into $(VENV)"
	@$(PIP_INSTALL) -e '.[docs]'
	@touch $@

# Each study goes on where it was stopped; remove the folder demo to begin anew. One thread is as fast for such models.
demo: $(VENV)/.installed-demo
	OMP_NUM_THREADS=1 $(BIN)/register-adapter study grown-tiles tiles --seeds 3 --out demo/grown \
		--arm "4 random registers" --arm "1 zero register" --arm "fit: 1 register" --arm "train: 4 registers" \
		--arm "train: 4 registers + LoRA" --arm "train: LoRA alone" $(DEMO_ARGS)
	OMP_NUM_THREADS=1 $(BIN)/register-adapter study planted scenes --no-training --max-images 256 --out demo/planted

# One thread per process: the processes already take the cores. Worksteal keeps a file's tests together, so that what
# they share is made once. No test needs a network beyond loopback.
test: $(VENV)/.installed-$(TEST_EXTRA)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)

test-fast:
	$(MAKE) test PYTEST_ARGS='--fast $(PYTEST_ARGS)'

test-oldest:
	$(MAKE) test VENV=.venv-oldest PYTHON=$(OLDEST_PYTHON) CONSTRAINTS=constraints-oldest.txt TEST_EXTRA=test

test-gpu:
	REGISTER_ADAPTER_TEST_GPU=1 $(MAKE) test PYTEST_ARGS='tests/test_cuda.py tests/test_cuda_execution.py $(PYTEST_ARGS)'

test-deepspeed:
	$(MAKE) test VENV=.venv-deepspeed TEST_EXTRA=test-deepspeed PYTEST_ARGS='-k "deepspeed or zero3" $(PYTEST_ARGS)'

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: $(VENV)/.installed-dev
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

families: $(VENV)/.installed-dev
	$(BIN)/register-adapter families --into README.md
	$(BIN)/register-adapter families --full --into docs/families.md

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/overhead.py $(BENCH_ARGS)

results: $(VENV)/.installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/results.py $(RESULTS_ARGS)

wheel: $(VENV)/.installed-dev
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) .venv-oldest .venv-deepspeed build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
