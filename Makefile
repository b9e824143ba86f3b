# Everything that a checkout needs, from one command: every target builds .venv first if it is
# missing or out of date. Works with GNU make 3.81 (macOS) and newer.

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.downpour-stamp
SOURCE := downpour cluster models paramserver shuffler workers tests benchmarks examples

# `make PYTHON=/path/to/python3.12 demo` picks the interpreter; empty means the first that fits.
PYTHON ?=
export PYTHON

# The tests start hundreds of processes, which would each compile the sources again.
unexport PYTHONDONTWRITEBYTECODE

# Many tests wait more than they compute; each process needs a processor for a part of its time.
TEST_PROCESSES ?= 2
PYTEST := $(BIN)/python -m pytest
SHARED_OUT := -n $(TEST_PROCESSES) --dist loadscope --no-loadscope-reorder
# About half of the fast tests.
PURE_APART := tests/pure/paramserver tests/pure/shuffler tests/pure/workers \
              tests/pure/test_docs.py tests/pure/test_imports.py

.DEFAULT_GOAL := help
.PHONY: help demo test test-pure test-soak test-cluster lint format check bench lock clean

help:
	@echo 'make demo       train the MNIST net with batch normalization: 10 replicas x 5 steps'
	@echo 'make test       run every test that this machine can run'
	@echo 'make test-pure  run the fast tests only (no Ray; under 10 s on two cores)'
	@echo 'make test-soak  run what takes long: more sizes, seeds and faults, every benchmark'
	@echo 'make test-cluster  launch a cluster of hosts of their own here (root; some minutes)'
	@echo 'make lint       check style (ruff) and types (mypy)'
	@echo 'make format     rewrite the sources in the house format'
	@echo 'make check      lint, then test'
	@echo 'make bench      run the benchmarks behind the claims of speed'
	@echo 'make lock       write requirements.lock again from pyproject.toml'
	@echo 'make clean      remove .venv and caches (runs/ stays)'

demo: $(STAMP)
	@$(BIN)/downpour train mnist-bn --stop-at-accuracy 0.975

test: $(STAMP)
	@$(PYTEST) $(SHARED_OUT) -m 'not cluster and not soak'

test-cluster: $(STAMP)
	@$(PYTEST) tests/cluster

# Two processes side by side. Each loads its own part only, which pytest-xdist's do not.
test-pure: $(STAMP)
	@log=$$(mktemp) && trap 'rm -f "$$log"' EXIT && \
	{ $(PYTEST) $(PURE_APART) >"$$log" 2>&1 & } && apart=$$! && trap 'kill $$apart' INT TERM && \
	$(PYTEST) tests/pure $(PURE_APART:%=--ignore=%); rest=$$?; \
	wait $$apart; apart=$$?; cat "$$log"; exit $$((rest | apart))

test-soak: $(STAMP)
	@$(PYTEST) -m soak
	@$(PYTEST) -m hypothesis --hypothesis-profile soak tests/pure tests/inprocess

lint: $(STAMP)
	@echo 'ruff check'
	@$(BIN)/ruff check --quiet $(SOURCE)
	@echo 'ruff format --check'
	@$(BIN)/ruff format --quiet --check $(SOURCE)
	@echo 'mypy'
	@$(BIN)/mypy

format: $(STAMP)
	@$(BIN)/ruff check --quiet --fix $(SOURCE)
	@$(BIN)/ruff format --quiet $(SOURCE)

check:
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory test

bench: $(STAMP)
	@$(BIN)/python -m downpour.benchmarks

lock:
	@sh .ci/lock

clean:
	rm -rf $(VENV) .venv-lock build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(SOURCE) -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is newer than both files exactly when the environment was built from them.
$(STAMP): requirements.lock pyproject.toml
	@sh .ci/setup $(VENV) && touch $@
