# make setup test          everything a change must pass
# make demo                a first run: five questions about large pictures, and a picture of the tokens used
# Settings, all optional:  make setup PYTHON=python3.12
#                          make setup TORCH_INDEX=https://download.pytorch.org/whl/cu130
#                          make test TRANSFORMERS=5.20     (in .cache/versions/5.20; also test-slow, test-upstream)
#                          make test-versions MINORS='5.20 5.24'
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
TRANSFORMERS ?=
MINORS ?=
WORKERS ?= 2
PYTEST_ARGS ?=
MUTATION_ARGS ?=
GPU_ARGS ?=
LOCK_ARGS ?=

BIN := $(VENV)/bin
PY := $(BIN)/python
INSTALL := $(PY) scripts/install.py
VERSIONS := $(PY) scripts/versions.py --workers $(WORKERS)
TEST_PY := $(if $(TRANSFORMERS),.cache/versions/$(TRANSFORMERS)/bin/python,$(PY))
PYTEST := OMP_NUM_THREADS=1 $(TEST_PY) -m pytest

# A stamp is named after the content it stands for, so a second `make setup` does nothing and a changed lock reinstalls.
key = $(shell { printf '%s\n' '$(TORCH_INDEX)'; $(1); } | cksum | cut -d ' ' -f 1)
TORCH_STAMP := $(VENV)/.torch-$(call key,grep ^torch= constraints.txt)
CORE_STAMP := $(VENV)/.core-$(call key,cat constraints.txt pyproject.toml)
SETUP_STAMP := $(VENV)/.setup-$(call key,cat constraints.txt pyproject.toml benchmarks/needle/pyproject.toml)

.PHONY: help setup demo docs lock test test-slow test-gpu test-versions test-latest test-upstream test-vllm \
	test-harnesses coverage mutation quality format clean distclean
.NOTPARALLEL:

help:
	@echo "make setup | demo | docs | lock | test | test-slow | test-gpu | test-versions | test-latest | test-upstream"
	@echo "     test-vllm | test-harnesses | coverage | mutation | quality | format | clean | distclean"

setup: $(SETUP_STAMP)

$(PY):
	@echo "1 of 3: an environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or newer is needed; name one: make setup PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "$(PYTHON) has no venv module; on Debian and Ubuntu install python3-venv"; exit 1; }

$(TORCH_STAMP): | $(PY)
	@echo "2 of 3: torch, about 200 MB without CUDA"
	@rm -f $(VENV)/.torch-*
	@$(PY) -m pip install --disable-pip-version-check -qq --constraint constraints.txt pip
	@$(INSTALL) --torch $(if $(TORCH_INDEX),--index $(TORCH_INDEX))
	@touch $@

$(CORE_STAMP): $(TORCH_STAMP)
	@echo "3 of 3: transformers and what the model needs, about 40 packages, 70 MB"
	@rm -f $(VENV)/.core-*
	@$(INSTALL) --editable .
	@touch $@

$(SETUP_STAMP): $(TORCH_STAMP)
	@echo "3 of 3: transformers, trainers and tools, about 100 packages, 450 MB"
	@rm -f $(VENV)/.core-* $(VENV)/.setup-*
	@$(INSTALL) --editable '.[dev]' --editable benchmarks/needle
	@touch $(CORE_STAMP) $@

demo: $(CORE_STAMP)
	OMP_NUM_THREADS=$(WORKERS) $(PY) examples/demo.py

docs: $(SETUP_STAMP)
	$(INSTALL) --editable '.[docs]'
	$(PY) -m mkdocs build --strict

# The versions that all of this installs; LOCK_ARGS=--upgrade for the newest.
lock: | $(PY)
	$(PY) scripts/lock.py $(LOCK_ARGS)

$(BIN)/pytest $(BIN)/ruff:
	@echo "no environment in $(VENV); run: make setup"; exit 1

.cache/versions/%/bin/python: | $(BIN)/pytest
	$(VERSIONS) prepare $*

test: quality | $(BIN)/pytest $(TEST_PY)
	$(PYTEST) tests -m "not slow and not gpu" -n $(WORKERS) $(PYTEST_ARGS)

test-slow: | $(BIN)/pytest $(TEST_PY)
	$(PYTEST) tests -m "slow and not gpu" -n $(WORKERS) $(PYTEST_ARGS) || [ $$? -eq 5 ]  # 5: there is no slow test

# What needs CUDA, at most 8 minutes; GPU_ARGS=--dry-run shows on a CPU that all of it runs.
test-gpu: | $(BIN)/pytest
	$(PY) benchmarks/gpu.py $(GPU_ARGS)

# What may break with a version, at each supported minor of transformers and at the newest of everything but torch.
# These three write their results into docs/compatibility.md, unless PYTEST_ARGS chooses among the tests.
test-versions: | $(BIN)/pytest
	$(VERSIONS) minors $(MINORS) -- $(PYTEST_ARGS)

test-latest: | $(BIN)/pytest
	$(VERSIONS) latest -- $(PYTEST_ARGS)

# transformers' own common tests on our classes; its source distribution is downloaded once into .cache/upstream
test-upstream: | $(BIN)/pytest
	$(VERSIONS) upstream $(TRANSFORMERS) -- $(PYTEST_ARGS)

# Serving, in .cache/vllm with a vLLM for CPUs: 3 minutes and 3.4 GB the first time.
test-vllm: | $(BIN)/pytest
	$(VERSIONS) vllm -- $(PYTEST_ARGS)

# lmms-eval and VLMEvalKit, in .cache/harnesses: two minutes and 1.2 GB the first time.
test-harnesses: | $(BIN)/pytest
	$(PY) scripts/harnesses.py -- $(PYTEST_ARGS)

coverage: | $(BIN)/pytest
	$(PY) -m coverage erase
	$(PYTEST) tests -m "not slow and not gpu" -n $(WORKERS) --cov --cov-report= $(PYTEST_ARGS)
	$(PY) -m coverage report

# Stopped and called again it goes on where it was; one module: MUTATION_ARGS='hires_lmm.modeling.packing*'
mutation: $(SETUP_STAMP)
	$(INSTALL) --editable '.[mutation]'
	OMP_NUM_THREADS=1 $(PY) -m mutmut run --max-children $(WORKERS) $(MUTATION_ARGS)
	$(PY) -m mutmut results

quality: | $(BIN)/ruff
	$(PY) -m ruff check .
	$(PY) -m ruff check --preview --select DOC102 src  # a documented argument that the function does not take
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	@! awk 'FNR == 601 { print FILENAME ": more than 600 lines" }' $$(find src -name '*.py') | grep .

format: | $(BIN)/ruff
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf build dist mutants .coverage .coverage.* htmlcov .pytest_cache .ruff_cache .mypy_cache
	find src tests scripts -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .cache/versions .cache/harnesses .cache/lock
