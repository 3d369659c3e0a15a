VENV := .venv
RUN := $(VENV)/bin/python
# Written when the environment holds what the lock says; removed with it.
READY := $(VENV)/.ready
PYTHON ?= python3.13 python3.12 python3.11 python3 python

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test parity lock clean

help: ## print this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

demo: $(READY) ## train on generated text; results in runs/demo
	rm -rf runs/demo
	$(RUN) experiments/sentiment.py --out runs/demo

# Most of the time goes into compiling small programs that run once: without LLVM's optimisation,
# and with the older writer of fused loops, half as much. Fusions then differ a little from those
# that users get; the test that counts their bytes asks for the users'. A program stays in one
# piece: to compile its parts side by side costs more than it gains where all cores are busy.
test parity: export XLA_FLAGS += --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false \
  --xla_cpu_parallel_codegen_split_count=1
# What one test has compiled another need not, nor the next run.
test parity: export JAX_COMPILATION_CACHE_DIR = $(CURDIR)/.jax_cache
test parity: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS = 0
test: $(READY) ## formatting, lint, types, all tests
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy rlhfjax
	$(RUN) -m pytest -q --numprocesses auto --maxprocesses 8 --dist loadfile \
	  --no-loadscope-reorder

parity: $(VENV)/.parity ## models and data against transformers and PEFT
	$(RUN) -m pytest -q tests/parity tests/data/test_records.py

lock: $(READY) ## resolve requirements.lock anew
	$(RUN) -m pip install --quiet uv
	$(VENV)/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 \
	  --fork-strategy fewest --default-index https://pypi.org/simple --extra dev \
	  --no-emit-package rlhfjax --custom-compile-command "make lock" \
	  --output-file requirements.lock pyproject.toml

clean: ## remove the environment and all caches, keep runs/
	rm -rf $(VENV) .jax_cache .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml requirements.lock | $(RUN)
	@echo "installing requirements.lock into $(VENV)"
	$(RUN) -m pip install --quiet -r requirements.lock
	$(RUN) -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $(READY)

$(VENV)/.parity: $(READY)
	@echo "installing torch, transformers and peft into $(VENV)"
	$(RUN) -m pip install --quiet --constraint requirements.lock --no-build-isolation -e '.[parity]'
	@touch $@

# A name on the path proves nothing (a version manager's shim may fail, a distribution may leave
# out ensurepip), so each candidate is tried.
$(RUN):
	@for candidate in $(PYTHON); do \
	  if "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
	      2>/dev/null; then \
	    echo "creating $(VENV) with $$candidate"; \
	    exec "$$candidate" -m venv --clear $(VENV); \
	  fi; \
	done; \
	echo "No Python 3.11 or newer with venv and ensurepip among: $(PYTHON)." >&2; \
	echo "Install one (on Debian and Ubuntu also its python3-venv package)," >&2; \
	echo "or name it: make PYTHON=/path/to/python3 ..." >&2; \
	exit 1
