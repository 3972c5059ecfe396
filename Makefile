# make demo [SEED=n]   the whole system on a laptop CPU, in outputs/demo-seed<n>/
# make demo-control    the same with rewards shuffled between samples: it must not learn
# make test            the tests        make check    lint, format and types
# A virtual environment is made in .venv the first time.

SEED ?= 1
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed

.PHONY: install demo demo-control test check

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch first and by its exact version: a CPU build (2.13.0+cpu) satisfies this pin wherever one is offered,
	# while a range in the middle of a larger resolution may pull in a CUDA build and gigabytes of libraries.
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)
	PATH="$(BIN):$$PATH" SEED=$(SEED) bash scripts/demo.sh

demo-control: $(STAMP)
	PATH="$(BIN):$$PATH" SEED=$(SEED) CONTROL=1 bash scripts/demo.sh

test: $(STAMP)
	PATH="$(BIN):$$PATH" python3 -m pytest

check: $(STAMP)
	PATH="$(BIN):$$PATH" ruff check
	PATH="$(BIN):$$PATH" ruff format --check
	PATH="$(BIN):$$PATH" pyright
