# Everything starts here: `make demo` and `make test` set up by themselves what they need.
VENV    ?= .venv
PYTHON  ?= python3
PY      := $(VENV)/bin/python
# torch is pinned: on Linux this release is CUDA-capable where pip finds a CUDA build, and CPU-only where it finds that.
TORCH   ?= torch==2.13.0
STAMP   := $(VENV)/.installed
MODELS  := $(VENV)/.models
OUT     ?= demo_output

.PHONY: help setup demo test test-all check format bench docs clean

help:                ## list these commands
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:  *##' $(MAKEFILE_LIST) | sed -E 's/:.*##/:/' | awk -F: '{printf "  make %-9s %s\n", $$1, $$2}'

setup: $(MODELS)     ## virtual environment, torch, this package, embedded models

# nnU-Net's network comes without the torchvision that its package asks for and does not need.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "vlm3d needs Python 3.10 or newer; set PYTHON=..."; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev,quant,train,bench]'
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps dynamic-network-architectures==0.4.4
	@touch $(STAMP)

$(MODELS): $(STAMP) src/vlm3d/pretrained.py
	$(PY) -m vlm3d.pretrained
	@touch $(MODELS)

demo: $(MODELS)      ## make a phantom chest CT, predict it, print where its page is
	$(PY) -m vlm3d demo --out $(OUT)

test: $(MODELS)      ## the default tests, offline (real scans too, where ../shared/data or VLM3D_REAL_DATA is)
	$(PY) -m pytest -q

test-all: $(MODELS)  ## the slow tests as well
	$(PY) -m pytest -q -m 'not gpu'

check: $(STAMP)      ## lint, format, types, import layers
	$(VENV)/bin/ruff check src tests benchmarks examples runs
	$(VENV)/bin/ruff format --check src tests benchmarks examples runs
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(STAMP)     ## apply the format and the safe fixes
	$(VENV)/bin/ruff check --fix src tests benchmarks examples runs
	$(VENV)/bin/ruff format src tests benchmarks examples runs

bench: $(MODELS)     ## the measurements that need no trained store, with their peers in the same run, as JSON lines
	for file in $$(grep -l __main__ benchmarks/*.py); do echo "# $$file"; $(PY) $$file || exit 1; done

docs: $(STAMP)       ## check that the documentation's links and commands exist
	$(PY) -m pytest -q tests/test_documentation.py

clean:               ## remove what these commands made
	rm -rf $(VENV) $(OUT) .pytest_cache .mypy_cache .ruff_cache .hypothesis
