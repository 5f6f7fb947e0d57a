# Each target first makes .venv if pyproject.toml or constraints.txt changed since it was made.

TASK ?= dmc/cartpole-swingup
AGENT ?= dreamer
RUN_DIR ?= runs/$(notdir $(TASK))$(if $(SEED),-seed$(SEED))

python := .venv/bin/python
installed := .venv/.installed

.PHONY: help install rendering train test lint format

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo
	@echo '  make train TASK=dmc/walker-walk SEED=2 RUN_DIR=runs/walker ARGS="--env-steps 50000"'
	@echo '  make test ARGS="-k replay"'
	@echo
	@echo '  On Linux pip installs the CUDA build of torch, about 3 GB. For the CPU build, the first time:'
	@echo '  make install PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu'

train: install rendering ## train an agent, with live progress; again to go on: TASK SEED AGENT RUN_DIR ARGS
	$(python) -m runners.train --task $(TASK) --agent $(AGENT) $(if $(SEED),--seed $(SEED)) --run-dir $(RUN_DIR) $(ARGS)

test: install rendering ## run every test: ARGS
	$(python) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: install ## check style and types
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m mypy

format: install ## put the source in the style that lint asks for
	$(python) -m ruff check --fix
	$(python) -m ruff format

install: $(installed) ## make .venv with the pinned dependencies: PYTHON

rendering: $(installed) ## check that a frame can be rendered; install OpenGL where apt may be used
	@sh runners/bootstrap.sh rendering

$(installed): pyproject.toml constraints.txt
	@PYTHON="$(PYTHON)" sh runners/bootstrap.sh install
	@touch $@
