# Every target prepares what it needs, from a fresh clone with Python 3.11 or newer and make.
# Settings: PYTHON=python3.12, VENV=.venv, JOBS=2 (processes that run tests).

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
READY := $(VENV)/.ready
TOOLS := $(VENV)/.tools

.DEFAULT_GOAL := help
.PHONY: help demo test check lint docs site bench clean

help:  ## tell what can be made
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)  ## merge experts on real digits, in about a minute; writes runs/demo
	$(BIN)/spolia demo --out runs/demo

test: lint  ## everything: style, types, all tests; at most 15 minutes on two cores
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

check: lint  ## style, types and the fast tests; at most 2 minutes
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --hypothesis-profile quick -m "not slow"

lint: $(TOOLS)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

docs: $(READY)  ## fill settings tables and measured numbers into the pages
	$(BIN)/python docs/fill.py

site: $(TOOLS)  ## the pages as a site that can be searched, in build/site; warnings are errors
	$(BIN)/python -m zensical build --strict

bench: $(TOOLS)  ## measure merging; benchmarks/README.md tells how to read it and how to add the peer
	$(BIN)/python benchmarks/merge.py

clean:  ## remove what was made here, except runs/
	rm -rf $(VENV) build dist .cache .pytest_cache .ruff_cache .hypothesis
	find src tests docs examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are written last, so that an interrupted installation is taken up again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
	|| { echo "$(PYTHON) is older than 3.11; name another: make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[digits]'
	@touch $@

$(TOOLS): $(READY)
	$(PIP) --editable '.[test,lint]'
	@touch $@
