# `make demo` and `make test` each install what they need, once, into .venv and then run.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SEEDS  ?= 1
JOBS   ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo compare reproduce results test bench lint format docs clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 16

setup: $(STAMP)  ## Install everything into .venv (a Detectron2 that is there already is kept)

$(STAMP): setup.py constraints.txt tools/install_detectron2.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "setuptools<81" wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	PIP_CONSTRAINT=constraints.txt $(BIN)/python tools/install_detectron2.py
	@touch $@

demo: $(STAMP)  ## Train teacher, plain and distilled student on digit scenes; write output/demo (SEEDS=3 for three)
	$(BIN)/python tools/demo.py --output output/demo --seeds $(SEEDS)

reproduce: $(STAMP)  ## Run a table of experiments (TABLE=digits_modules SEEDS=3), resumable; see results/tables
	$(BIN)/python tools/reproduce.py $(TABLE) --seeds $(SEEDS) --jobs $(JOBS) $(ARGS)

compare: TABLE = digits_methods digits_methods_retinanet
compare: SEEDS = 2
compare: reproduce  ## Compare every method on digit scenes, two seeds each

results: $(STAMP)  ## Render docs/results.md and the README's results from the files in results/
	$(BIN)/python tools/results.py

test: $(STAMP)  ## Run the tests
	$(BIN)/python -m pytest tests

bench: $(STAMP)  ## Measure what a distilled step costs on the CPU (minutes); see docs/performance.md
	$(BIN)/python -W ignore benchmarks/step_time.py --device cpu --pairs R101-R50 R34-R18 --losses GlobalKD --rounds 3

lint: $(STAMP)  ## Check style and the docs that are generated
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/config_reference.py --check docs/config.md
	$(BIN)/python tools/results.py --check

format: $(STAMP)  ## Reformat the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## Regenerate the pages that are made from code
	$(BIN)/python tools/config_reference.py docs/config.md

clean:  ## Remove the environment and what was written
	rm -rf $(VENV) output build *.egg-info projects/GlobalKD/*.egg-info
