# Two commands do everything: `make train` and `make test`. `make help` lists the rest.

PYTHON ?=
TORCH ?=
CONFIG ?= configs/quickstart.yaml
NPROC ?= 2
ARGS ?=
# The quickstart may be repeated; any other run of the same name is replaced only when asked to (ARGS=--overwrite).
AGAIN := $(if $(filter configs/quickstart.yaml,$(CONFIG)),$(if $(ARGS),,--overwrite))

VENV := .venv
export PYTHONUNBUFFERED := 1

.PHONY: help setup train test test-gpu clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile
	@echo '  make train takes CONFIG=file.yaml NPROC=processes ARGS="key=value ...", make test ARGS="pytest arguments"'

setup: $(VENV)/.installed ## .venv with the pinned versions (runs by itself before the others)

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt .ci/setup
	@PYTHON='$(PYTHON)' TORCH='$(TORCH)' bash .ci/setup

train: $(VENV)/.installed ## train configs/quickstart.yaml on two processes, into runs/
	@echo '[train] $(NPROC) processes: nsa-cp train $(CONFIG) $(ARGS) $(AGAIN)'
	@NPROC_PER_NODE=$(NPROC) bash launch/torchrun.sh train $(CONFIG) $(ARGS) $(AGAIN)

test: $(VENV)/.installed ## the whole test suite on the CPU
	@echo '[test] all tests that need no GPU, on the CPU'
	@CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m 'not gpu' --durations=15 $(ARGS)

test-gpu: $(VENV)/.installed ## the tests that need CUDA devices
	@echo '[test] the tests that need a GPU'
	@$(VENV)/bin/python -m pytest -m gpu --durations=15 $(ARGS)

clean: ## remove .venv, build leftovers and caches (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
