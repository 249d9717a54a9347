# Every target sets up what it needs: a fresh clone runs `make demo` or `make test` as they are.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo test test-all check evidence bench runtimes models clean
help:            ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## create .venv with pinned dependencies
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[datasets,test,check]'
	@touch $@

demo: setup      ## cut the bundled MoE to half its expert memory and show the report
	$(BIN)/moestro fit --overwrite --out out/demo

test: setup      ## the quick tests
	$(BIN)/pytest -q -n auto --maxprocesses 4 --dist worksteal

test-all: setup  ## the quick and the slow tests
	$(BIN)/pytest -q -m ''

check: setup     ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

evidence: setup  ## rerun every paper's experiment and regenerate docs/evidence.md
	$(BIN)/moestro reproduce --all

bench: setup     ## speed beside transformers' own backends
	$(BIN)/python benchmarks/experts.py
	$(BIN)/python benchmarks/train.py

runtimes: setup  ## load what moestro saves in other programs, measure, write docs/runtimes.md (builds llama.cpp)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[gguf]'
	PYTHONPATH=tests $(BIN)/python -W ignore -m runtimes.run

models: setup    ## train the bundled models from scratch (hours)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[recipe]'
	$(BIN)/python -m moestro.train.recipe

clean:           ## remove what the targets made
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache
