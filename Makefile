# make setup test          everything a change must pass
# make demo                a first run: five questions about large pictures, and a picture of the tokens used
# Settings, all optional:  make setup PYTHON=python3.12
#                          make setup TRANSFORMERS='==5.20.*'
#                          make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
VENV ?= .venv
TRANSFORMERS ?=
TORCH_INDEX ?=
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
PYTEST_ARGS ?=
MUTATION_ARGS ?=

BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest

# A stamp is named after the content it stands for, so a second `make setup` does nothing and a changed setting reinstalls.
key = $(shell { printf '%s\n' $(1); cat $(2); } | cksum | cut -d ' ' -f 1)
TORCH_STAMP := $(VENV)/.torch-$(call key,'$(TORCH_INDEX)',$(CONSTRAINTS))
SETUP_STAMP := $(VENV)/.setup-$(call key,'$(TORCH_INDEX)' '$(TRANSFORMERS)',$(CONSTRAINTS) pyproject.toml)

.PHONY: help setup demo docs test test-slow test-upstream coverage mutation quality format clean distclean
.NOTPARALLEL:

help:
	@echo "make setup | demo | docs | test | test-slow | test-upstream | coverage | mutation | quality | format | clean | distclean"

setup: $(SETUP_STAMP)

$(PY):
	@echo "creating $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or newer is needed; name one: make setup PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "$(PYTHON) has no venv module; on Debian and Ubuntu install python3-venv"; exit 1; }

$(TORCH_STAMP): | $(PY)
	@echo "installing torch"
	@rm -f $(VENV)/.torch-*
	@$(if $(TORCH_INDEX),$(PIP) uninstall --yes torch)
	@$(PIP) install --constraint $(CONSTRAINTS) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@touch $@

$(SETUP_STAMP): $(TORCH_STAMP)
	@echo "installing hires-lmm and its tools"
	@rm -f $(VENV)/.setup-*
	@$(PIP) install --constraint $(CONSTRAINTS) --upgrade 'transformers$(TRANSFORMERS)' --editable '.[dev]'
	@touch $@

demo: $(SETUP_STAMP)
	OMP_NUM_THREADS=$(WORKERS) $(PY) examples/demo.py

docs: $(SETUP_STAMP)
	$(PIP) install --constraint $(CONSTRAINTS) --editable '.[docs]'
	$(PY) -m mkdocs build --strict

$(BIN)/pytest $(BIN)/ruff:
	@echo "no environment in $(VENV); run: make setup"; exit 1

test: quality | $(BIN)/pytest
	$(PYTEST) tests -m "not slow and not gpu" -n $(WORKERS) $(PYTEST_ARGS)

test-slow: | $(BIN)/pytest
	$(PYTEST) tests -m "slow and not gpu" -n $(WORKERS) $(PYTEST_ARGS) || [ $$? -eq 5 ]  # 5: there is no slow test

coverage: | $(BIN)/pytest
	$(PY) -m coverage erase
	$(PYTEST) tests -m "not slow and not gpu" -n $(WORKERS) --cov --cov-report= $(PYTEST_ARGS)
	$(PY) -m coverage report

# Stopped and called again it goes on where it was; one module: MUTATION_ARGS='hires_lmm.modeling.packing*'
mutation: $(SETUP_STAMP)
	$(PIP) install --constraint $(CONSTRAINTS) --editable '.[mutation]'
	OMP_NUM_THREADS=1 $(PY) -m mutmut run --max-children $(WORKERS) $(MUTATION_ARGS)
	$(PY) -m mutmut results

# transformers' own common tests on our classes; its source distribution is downloaded once into .cache/upstream
test-upstream: | $(BIN)/pytest
	$(PY) tests/upstream/upstream_suite/fetch.py
	CUDA_VISIBLE_DEVICES= $(PYTEST) tests/upstream/suite_*.py -n $(WORKERS) $(PYTEST_ARGS)

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
	rm -rf $(VENV)
